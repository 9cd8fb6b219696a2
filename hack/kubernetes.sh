#!/usr/bin/env bash
# Prints the directory with the programs of test/cluster's Kubernetes (the servers are one binary with
# links to it), kubectl and CoreDNS, and builds what is not there: once for each state of the
# modules in hack/kubernetes. The first time takes some minutes and 2 GB of module cache.
set -euo pipefail
cd "$(dirname "$0")/kubernetes"
. ../cache.sh

build() {
	local version minor stamp component=k8s.io/component-base/version name
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	minor=${version#v1.}
	minor=${minor%%.*}
	stamp="-X $component.gitVersion=$version -X $component.gitMajor=1 -X $component.gitMinor=$minor -X $component.gitTreeState=clean"
	echo "building Kubernetes, kubectl and CoreDNS (once; the first time takes some minutes)"
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w $stamp" -o "$1/kubernetes" .
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w $stamp" -o "$1/kubectl" ./kubectl
	for name in etcd kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy; do
		ln -s kubernetes "$1/$name"
	done
	(cd coredns && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1/coredns" .)
}

key=$({ go env GOVERSION GOOS GOARCH; cat ../kubernetes.sh main.go go.mod go.sum */*.go */go.mod */go.sum; } | sha256sum | cut -c1-16)
cached kubernetes "$key" build
