#!/usr/bin/env bash
# Prints the directory with the development tools that hack/tools/go.mod pins, and builds
# them when they are not there: once for each go.sum and Go version.
set -euo pipefail
cd "$(dirname "$0")/tools"

key=$({ go env GOVERSION; cat go.mod go.sum; } | sha256sum | cut -c1-16)
dir=$(cd ../.. && pwd)/.cache/tools/$key
if [[ ! -e $dir/complete ]]; then
	echo "building the development tools (once; takes some minutes)" >&2
	mkdir -p "$dir"
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$dir/" tool >&2
	touch "$dir/complete"
fi
echo "$dir"
