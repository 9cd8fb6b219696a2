#!/usr/bin/env bash
# Prints the path of helm, which hack/helm/go.mod pins, and builds it when it is not there:
# once for each go.sum and Go version.
set -euo pipefail
cd "$(dirname "$0")/helm"
. ../cache.sh

build() {
	local version minor flags p
	echo "building helm (once; takes some minutes)"
	version=$(go list -m -f '{{.Version}}' helm.sh/helm/v3)
	# The Kubernetes version that "template" and "lint" take for granted, as in helm's releases.
	minor=$(go list -m -f '{{.Version}}' k8s.io/client-go | cut -d. -f2)
	flags="-s -w -X helm.sh/helm/v3/internal/version.version=$version"
	for p in pkg/chartutil pkg/lint/rules; do
		flags+=" -X helm.sh/helm/v3/$p.k8sVersionMajor=1 -X helm.sh/helm/v3/$p.k8sVersionMinor=$minor"
	done
	CGO_ENABLED=0 go build -trimpath -ldflags "$flags" -o "$1/" tool
}

key=$({ go env GOVERSION GOOS GOARCH; cat go.mod go.sum ../helm.sh; } | sha256sum | cut -c1-16)
directory=$(cached helm "$key" build)
echo "$directory/helm"
