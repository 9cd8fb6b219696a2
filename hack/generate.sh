#!/usr/bin/env bash
# Writes deep copies and CRDs from the types in api/. With --check it fails when that
# changes a file (which it has then made current).
set -euo pipefail
cd "$(dirname "$0")/.."

crds=charts/culvert/crds
state() { cat api/*/zz_generated.*.go "$crds"/*.yaml 2>/dev/null | sha256sum; }

hack/layer.sh "generated files"
before=$(state)
"$(hack/tools.sh)/controller-gen" object paths=./api/... crd "output:crd:artifacts:config=$crds"
if [[ "${1:-}" == --check && "$(state)" != "$before" ]]; then
	echo "generated files were out of date; they are current now: commit them" >&2
	exit 1
fi
