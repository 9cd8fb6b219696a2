#!/usr/bin/env bash
# Prints the directory with the programs of test/cluster's Kubernetes (one binary with
# links to it) and CoreDNS, and builds what is not there: once for each state of the
# modules in hack/kubernetes. The first time takes some minutes and 2 GB of module cache.
set -euo pipefail
cd "$(dirname "$0")/kubernetes"

cache=$(cd ../.. && pwd)/.cache/kubernetes
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${version#v1.}
minor=${minor%%.*}
component=k8s.io/component-base/version
stamp="-X $component.gitVersion=$version -X $component.gitMajor=1 -X $component.gitMinor=$minor -X $component.gitTreeState=clean"
key=$({ go env GOVERSION; cat ../kubernetes.sh main.go go.mod go.sum */*.go */go.mod */go.sum; } | sha256sum | cut -c1-16)
dir=$cache/$key

build() { # module directory, name of the program, package, linker flags
	[[ -e $dir/$2 ]] && return
	echo "building $2 (once; the first time takes some minutes)" >&2
	(cd "$1" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w ${4:-}" -o "$dir/.$2" "$3") >&2
	mv "$dir/.$2" "$dir/$2"
}

mkdir -p "$dir"
# One build at a time: a second caller waits and finds it done.
exec 9>"$cache/lock"
flock 9
if [[ ! -e $dir/complete ]]; then
	build . kubernetes . "$stamp"
	for name in etcd kubectl kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy; do
		ln -sfn kubernetes "$dir/$name"
	done
	build coredns coredns .
	touch "$dir/complete"
fi
echo "$dir"
