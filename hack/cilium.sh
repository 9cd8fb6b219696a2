#!/usr/bin/env bash
# Prints the directory with the programs of test/cluster/cilium's Cilium (agent, operator,
# command-line tool), its BPF sources (bpf/), CNI plug-ins (cni/), Helm chart (chart/) and the
# compiler that its agent calls (tools/), and builds what is not there: once for each state
# of the module in hack/cilium. The first time takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/cilium"

cache=$(cd ../.. && pwd)/.cache/cilium
key=$({ go env GOVERSION; cat ../cilium.sh go.mod go.sum; } | sha256sum | cut -c1-16)
dir=$cache/$key
module=github.com/cilium/cilium

mkdir -p "$dir"
# One build at a time: a second caller waits and finds it done.
exec 9>"$cache/lock"
flock 9
if [[ -e $dir/complete ]]; then
	echo "$dir"
	exit
fi

# The agent reads /proc/modules at its start, which a kernel without modules lacks: built
# from a copy of the module that reads a file of the cluster's instead.
version=$(go list -mod=mod -m -f '{{.Version}}' $module)
original=$(go mod download -json $module@"$version" | jq -r .Dir)
work=$(mktemp -d "$cache/build-XXXXXX")
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
tar -C "$original" --exclude ./Documentation --exclude ./test --exclude ./examples -cf - . | tar -C "$work" --no-same-owner -xf -
chmod -R u+w "$work"
sed -i 's,"/proc/modules","/etc/kernel-modules",' "$work/pkg/datapath/linux/modules/modules_linux.go"
grep -q '"/etc/kernel-modules"' "$work/pkg/datapath/linux/modules/modules_linux.go"
cp go.sum "$work/../${work##*/}.sum"
trap 'chmod -R u+w "$work" && rm -rf "$work" "$work".sum "$work".mod' EXIT
{ cat go.mod; echo "replace $module => $work"; } >"$work.mod"

build() { # name of the program, package, further build tags
	[[ -e $dir/$1 ]] && return
	echo "building $1 of Cilium $version (once; the first time takes some minutes)" >&2
	CGO_ENABLED=0 go build -modfile "$work.mod" -mod=mod -trimpath -tags "osusergo${3:+,$3}" \
		-ldflags "-s -w -X '$module/pkg/version.ciliumVersion=${version#v} module 1970-01-01T00:00:00+00:00'" \
		-o "$dir/.$1" "$module/$2" >&2
	mv "$dir/.$1" "$dir/$1"
}

build cilium-cni plugins/cilium-cni
build cilium-dbg cilium-dbg
build cilium-operator operator ipam_provider_operator
build cilium-agent daemon
rm -rf "$dir"/{bpf,chart,cni,tools}
mkdir "$dir"/{cni,tools}
cp -r "$work/bpf" "$dir/bpf"
cp -r "$work/install/kubernetes/cilium" "$dir/chart"
ln "$dir/cilium-cni" "$dir/cni/cilium-cni"
ln -s /usr/lib/cni/loopback "$dir/cni/loopback"
# This Cilium was made for clang 17, which knew no such warning.
printf '#!/bin/sh\nexec clang-19 "$@" -Wno-shorten-64-to-32\n' >"$dir/tools/clang"
printf '#!/bin/sh\nexec llc-19 "$@"\n' >"$dir/tools/llc"
chmod 755 "$dir"/tools/*
touch "$dir/complete"
echo "$dir"
