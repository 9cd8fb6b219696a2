#!/usr/bin/env bash
# Measures Culvert beside its peers (test/bench): installs and builds all of them first.
# ONLY=tunnels,reverse,streams,services,relay,scale,operator,agents,failover,ipsec and ROUNDS=N choose; the outcome is
# .cache/bench/table.md, bench.json, and bench.txt for benchstat.
#
# "hack/bench.sh docs" puts the tables of the last run into docs/performance.md.
set -euo pipefail
cd "$(dirname "$0")/.."
. hack/cache.sh

if [[ ${1:-} == docs ]]; then
	tables=${BENCH_DIR:-.cache/bench}/table.md
	[[ -e $tables ]] || { echo "bench: no $tables: run make bench first" >&2; exit 1; }
	sed -i '/^## The last full run/q' docs/performance.md
	{ echo; cat "$tables"; } | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}' >>docs/performance.md
	exit
fi

if [[ $EUID -ne 0 ]]; then
	echo "bench: needs root: it builds networks of namespaces" >&2
	exit 1
fi
if ! command -v /usr/sbin/sshd >/dev/null && command -v apt-get >/dev/null; then
	policy=/usr/sbin/policy-rc.d # it is for the bench to start, not for this machine to run
	if [[ ! -e $policy ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f "$policy"' EXIT
	fi
	DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends openssh-server </dev/null
fi

build() {
	echo "building the peers (once; takes some minutes)"
	(cd hack/bench && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$1/" tool)
	(cd hack/bench/control && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$1/" . tool)
}

key=$({ go env GOVERSION GOOS GOARCH; cat hack/bench/go.mod hack/bench/go.sum hack/bench/control/*; } | sha256sum | cut -c1-16)
peers=$(cached bench "$key" build)

hack/kubernetes.sh >/dev/null # kube-proxy, and the operator's API server
hack/helm.sh >/dev/null

CULVERT_BENCH=1 BENCH_PEERS=$peers BENCH_DIR=${BENCH_DIR:-$PWD/.cache/bench} ONLY=${ONLY:-} ROUNDS=${ROUNDS:-} \
	go test ./test/bench -run '^TestBench$' -count=1 -timeout 120m -v ${ARGS:-}
