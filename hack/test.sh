#!/usr/bin/env bash
# Runs one layer of tests: test.sh unit|netlab|kernel|cluster|cilium. Each package runs in exactly one.
# ARGS="-run TestX -count=1" is passed on to go test.
set -euo pipefail
cd "$(dirname "$0")/.."

# Packages whose tests build networks of namespaces.
namespaces() {
	go list -f '{{if or (eq .ImportPath "'"$module"'/test/netlab")}}{{.ImportPath}}{{else}}{{range .TestImports}}{{if eq . "'"$lab"'"}}{{$.ImportPath}}{{"\n"}}{{end}}{{end}}{{range .XTestImports}}{{if eq . "'"$lab"'"}}{{$.ImportPath}}{{"\n"}}{{end}}{{end}}{{end}}' ./... |
		grep . | grep -v -E "^$module/test/(kernel|cluster)" | sort -u
}

# measuring are the tests that measure, or hold the processor to times: they mind the
# neighbours.
measuring='^(TestScale.*|TestPerformance.*|TestSpeed|TestStreamSpeed|TestOneStream.*|TestOneMoreNode|TestConnectLatency|TestStalledReader|TestIdleCo.*|TestUnreachablePeersCostLittle|TestReconnectStorm|TestTenThousand.*|TestRestartWithAThousand.*|TestTransitions|TestLossDoesNotFlap|TestSmoke)$'

# measures prints those of the packages that have such tests.
measures() {
	go list -f '{{.ImportPath}} {{.Dir}}' "$@" | while read -r package dir; do
		if grep -qE "^func ${measuring:1:-1}\(" "$dir"/*_test.go; then
			echo "$package"
		fi
	done
}

# state names everything that a test can see of the checkout, but for texts, and of the machine. The
# go command knows only what a test imports and opens, and not what the programs see that it
# runs. So tests of programs get it as a pattern of tests to skip, which matches none: go test
# serves a result from its cache only to the same arguments.
state() {
	{
		git ls-files -z --cached --others --exclude-standard -- ':!*.md' | xargs -0 sha256sum || date +%s%N # unknown: no other's result
		uname -srvm
		id -u
		nproc
		go env GOVERSION GOARCH
		dpkg-query -W || true
	} 2>/dev/null | sha256sum | cut -c1-16 | sed 's/^/state-/'
}

module=$(go list -m)
lab=$module/internal/lab/labtest
case "$1" in
unit)
	packages=$(comm -23 <(go list ./... | grep -v -E "^$module/test/(kernel|cluster)" | sort) <(namespaces))
	hack/layer.sh "unit and golden tests: $(wc -w <<<"$packages") packages"
	hack/helm.sh >/dev/null # not in a test's time
	flags=(-timeout 5m)
	# Those that run programs on files.
	programs="^$module/(hack|internal/floors|test/chart)$"
	alone=$(grep -E "$programs" <<<"$packages")
	packages=$(grep -v -E "$programs" <<<"$packages")
	flagsAlone=(-timeout 5m -skip "$(state)")
	;;
netlab)
	packages=$(namespaces)
	hack/layer.sh "tests in network namespaces: $(wc -w <<<"$packages") packages"
	if [[ $EUID -ne 0 ]]; then
		echo "SKIP: not root: most of them will skip"
	fi
	flags=(-timeout 15m)
	if [[ " ${ARGS:-}" != *" -run"* ]]; then
		# Most of them wait most of the time: two packages at a time, the longest first; then what
		# measures, alone.
		packages="$module/test/netlab $(grep -v "^$module/test/netlab$" <<<"$packages")"
		# shellcheck disable=SC2086 # one word per package
		alone=$(measures $packages)
		flags+=(-p 2 -skip "$measuring|$(state)")
		flagsAlone=(-timeout 15m -p 1 -run "$measuring" -skip "$(state)")
	else
		flags+=(-p 1 -skip "$(state)")
	fi
	;;
kernel)
	packages=./test/kernel
	hack/layer.sh "tests on Debian's stock kernel in a virtual machine"
	kernel=$(hack/kernel.sh 2>/dev/null || true)
	flags=(-timeout 25m -skip "$(state)-${kernel##*/}")
	;;
cluster)
	# Those that hold gateways to times, or count what a cluster leaves, have the machine to
	# themselves. The others mostly wait, so two run at a time, each with a cluster of its own.
	alone=$(go list ./test/cluster/... | grep -E '/(cluster|gateway|jobs|nodelink)$')
	packages=$(go list ./test/cluster/... | grep -v -E '/(cluster|gateway|jobs|nodelink|cilium)$')
	hack/layer.sh "tests in real Kubernetes clusters of two nodes"
	hack/kubernetes.sh >/dev/null
	hack/helm.sh >/dev/null
	hack/image.sh
	hack/image.sh --check
	export CULVERT_IMAGE=$PWD/.cache/image/culvert.tar # not once more in each package
	flags=(-timeout 25m -p 2 -skip "$(state)")
	flagsAlone=(-timeout 25m -p 1 -skip "$(state)")
	;;
cilium)
	packages=./test/cluster/cilium
	hack/layer.sh "tests in a real Kubernetes cluster with a real Cilium"
	hack/kubernetes.sh >/dev/null
	hack/cilium.sh >/dev/null
	hack/helm.sh >/dev/null
	hack/image.sh
	export CULVERT_IMAGE=$PWD/.cache/image/culvert.tar
	flags=(-timeout 25m -skip "$(state)")
	;;
*)
	echo "usage: $0 unit|netlab|kernel|cluster|cilium" >&2
	exit 2
	;;
esac
# shellcheck disable=SC2086 # one word per package and argument
{
	status=0
	go test -json "${flags[@]}" ${ARGS:-} $packages || status=$?
	if [[ -n "${alone:-}" ]]; then
		go test -json "${flagsAlone[@]}" ${ARGS:-} $alone || status=$?
	fi
	exit $status
} | go run ./hack/results
