#!/usr/bin/env bash
# Prints the directory with the programs of test/cluster/cilium's Cilium (agent, operator,
# command-line tool), its BPF sources (bpf/), CNI plug-ins (cni/), Helm chart (chart/) and the
# compiler that its agent calls (tools/), and builds what is not there: once for each state
# of the module in hack/cilium. The first time takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/cilium"
. ../cache.sh

module=github.com/cilium/cilium

build() {
	local version original work=$1/.work
	version=$(go list -mod=mod -m -f '{{.Version}}' $module)
	original=$(go mod download -json $module@"$version" | jq -r .Dir)
	echo "building Cilium $version (once; the first time takes some minutes)"
	# The agent reads /proc/modules at its start, which a kernel without modules lacks: built
	# from a copy of the module that reads a file of the cluster's instead.
	mkdir -p "$work/cilium"
	tar -C "$original" --exclude ./Documentation --exclude ./test --exclude ./examples -cf - . |
		tar -C "$work/cilium" --no-same-owner -xf -
	chmod -R u+w "$work/cilium"
	sed -i 's,"/proc/modules","/etc/kernel-modules",' "$work/cilium/pkg/datapath/linux/modules/modules_linux.go"
	grep -q '"/etc/kernel-modules"' "$work/cilium/pkg/datapath/linux/modules/modules_linux.go"
	cp go.sum "$work/go.sum"
	{ cat go.mod; echo "replace $module => $work/cilium"; } >"$work/go.mod"

	program "$1" cilium-cni plugins/cilium-cni
	program "$1" cilium-dbg cilium-dbg
	program "$1" cilium-operator operator ipam_provider_operator
	program "$1" cilium-agent daemon
	mkdir "$1"/{cni,tools}
	cp -r "$work/cilium/bpf" "$1/bpf"
	cp -r "$work/cilium/install/kubernetes/cilium" "$1/chart"
	ln "$1/cilium-cni" "$1/cni/cilium-cni"
	ln -s /usr/lib/cni/loopback "$1/cni/loopback"
	# This Cilium was made for clang 17, which knew no such warning.
	printf '#!/bin/sh\nexec clang-19 "$@" -Wno-shorten-64-to-32\n' >"$1/tools/clang"
	printf '#!/bin/sh\nexec llc-19 "$@"\n' >"$1/tools/llc"
	chmod 755 "$1"/tools/*
	rm -rf "$work"
}

# program builds one: directory, name, package, further build tags.
program() {
	local stamp=$module/pkg/version.ciliumVersion=${version#v}
	CGO_ENABLED=0 go build -modfile "$1/.work/go.mod" -mod=mod -trimpath -tags "osusergo${4:+,$4}" \
		-ldflags "-s -w -X '$stamp module 1970-01-01T00:00:00+00:00'" -o "$1/$2" "$module/$3"
}

key=$({ go env GOVERSION GOOS GOARCH; cat ../cilium.sh go.mod go.sum; } | sha256sum | cut -c1-16)
cached cilium "$key" build
