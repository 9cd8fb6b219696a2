#!/usr/bin/env bash
# Installs what building, tests and the demo need besides Go, gcc, make and git, by name,
# on Debian 12 as root. Does nothing when all is there.
set -euo pipefail

packages=(
	ca-certificates curl jq procps kmod openssl
	# networks of namespaces, and the programs that look at them
	iproute2 iputils-ping ethtool nftables iptables conntrack
	tcpdump socat iperf3 dnsutils netcat-openbsd haproxy openvpn
	# real peers
	wireguard-tools wireguard-go
	charon-systemd strongswan-swanctl strongswan-pki
	libcharon-extra-plugins libstrongswan-standard-plugins libstrongswan-extra-plugins
	# the virtual machine of test/kernel
	qemu-system-x86 seabios busybox-static cpio
	# nodes of test/cluster
	containerd runc containernetworking-plugins
	# Cilium on them, which compiles its programs at run time
	clang-19 llvm-19 bpftool ipset
	# the image
	mmdebstrap
)

if ! command -v dpkg-query apt-get >/dev/null; then
	echo "setup: SKIP: no Debian here; the programs of these packages must be there: ${packages[*]}"
	[[ "${CI:-}" != true ]]
	exit
fi
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
	sed -n 's/^installed //p' || true)
missing=$(comm -23 <(printf '%s\n' "${packages[@]}" | sort -u) <(sort -u <<<"$installed"))
if [[ -z "$missing" ]]; then
	echo "setup: all ${#packages[@]} packages are installed"
	exit
fi
if [[ $EUID -ne 0 ]]; then
	echo "setup: SKIP: not root; missing: ${missing//$'\n'/ }"
	[[ "${CI:-}" != true ]]
	exit
fi

echo "setup: installing ${missing//$'\n'/ }"
export DEBIAN_FRONTEND=noninteractive
# The daemons among them are for the tests to start, not for this machine to run.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
apt-get -q update </dev/null
# shellcheck disable=SC2086 # one word per package
apt-get -q -y install --no-install-recommends $missing </dev/null
