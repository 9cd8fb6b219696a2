#!/usr/bin/env bash
# Prints the directory with the development tools that hack/tools/go.mod pins, and builds
# them when they are not there: once for each go.sum and Go version.
set -euo pipefail
cd "$(dirname "$0")/tools"
. ../cache.sh

build() {
	echo "building the development tools (once; takes some minutes)"
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$1/" tool
}

key=$({ go env GOVERSION GOOS GOARCH; cat go.mod go.sum; } | sha256sum | cut -c1-16)
cached tools "$key" build
