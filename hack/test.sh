#!/usr/bin/env bash
# Runs one layer of tests: test.sh unit|netlab|measuring|kernel|cluster|cilium. Each test runs in exactly one.
# ARGS="-run TestX -count=1" is passed on to go test.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=hack/cache.sh
. hack/cache.sh

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

# state names everything that a test can see of the checkout, but for texts, and of the machine.
state() {
	{
		git ls-files -z --cached --others --exclude-standard -- ':!*.md' | xargs -0 sha256sum || date +%s%N # unknown: no other's result
		uname -srvm
		id -u
		nproc
		go env GOVERSION GOARCH
		dpkg-query -W || true
		env | grep -E '^(CI|CULVERT_[A-Z]+)=' | sort || true
	} 2>/dev/null | sha256sum | cut -c1-16
}

# fresh PART PACKAGES… leaves, in packages, those that have not passed in the same state, and says so of
# the others. The go command's own cache does not serve here: it knows what a test imports and opens,
# and not what the programs see that a test runs, and it takes another checkout for another module.
fresh() {
	local package
	passed=$results/$1
	packages=
	for package in "${@:2}"; do
		if [[ -n $results && -e $passed/${package//\//_} ]]; then
			printf 'ok  \t%s\t(cached)\n' "$package"
		else
			packages+=" $package"
		fi
	done
}

# run FLAGS… tests the packages that fresh has left, and notes which of them passed.
run() {
	if [[ -n $packages ]]; then
		# shellcheck disable=SC2086 # one word per package and argument
		go test -json -count=1 "$@" ${ARGS:-} $packages | go run ./hack/results ${results:+-passed "$passed"} || status=1
	fi
}

# images makes, once for all packages, what clusters run, and what their nodes' containerd makes of it.
images() {
	hack/kubernetes.sh >/dev/null
	hack/helm.sh >/dev/null
	hack/image.sh
	export CULVERT_IMAGE=$PWD/.cache/image/culvert.tar CULVERT_IMAGES=$PWD/.cache/image/nodes
	go run ./hack/cluster images "$CULVERT_IMAGES" "$CULVERT_IMAGE" || unset CULVERT_IMAGES # then each node loads them
}

module=$(go list -m)
lab=$module/internal/lab/labtest
status=0
results= # with arguments, nothing is served from there or noted
if [[ -z ${ARGS:-} ]]; then
	results=$(cache_root)/passed/$(state)
	find "$(cache_root)/passed" -mindepth 1 -maxdepth 1 -mtime +30 -exec rm -rf {} + 2>/dev/null || true
fi
case "$1" in
unit)
	packages=$(comm -23 <(go list ./... | grep -v -E "^$module/test/(kernel|cluster)" | sort) <(namespaces))
	hack/layer.sh "unit and golden tests: $(wc -w <<<"$packages") packages"
	hack/helm.sh >/dev/null # not in a test's time
	# Of these the go command knows all that they see; the others run programs on files.
	programs="^$module/(hack|internal/floors|test/chart)$"
	# shellcheck disable=SC2046,SC2086 # one word per package and argument
	{
		go test -json -timeout 5m ${ARGS:-} $(grep -v -E "$programs" <<<"$packages") | go run ./hack/results || status=1
		fresh unit $(grep -E "$programs" <<<"$packages")
		run -timeout 5m
	}
	;;
netlab)
	all=$(namespaces)
	hack/layer.sh "tests in network namespaces: $(wc -w <<<"$all") packages"
	if [[ $EUID -ne 0 ]]; then
		echo "SKIP: not root: most of them will skip"
	fi
	# shellcheck disable=SC2046,SC2086 # one word per package
	if [[ " ${ARGS:-}" != *" -run"* ]]; then
		# Most of them wait most of the time: several packages at a time, the longest first.
		fresh netlab "$module/test/netlab" $(grep -v "^$module/test/netlab$" <<<"$all")
		run -timeout 15m -p 3 -skip "$measuring"
	else
		fresh netlab $all
		run -timeout 15m -p 1
	fi
	;;
measuring)
	# shellcheck disable=SC2046 # one word per package
	packages=$(measures $(namespaces))
	hack/layer.sh "tests that measure, in network namespaces: $(wc -w <<<"$packages") packages"
	# shellcheck disable=SC2086 # one word per package
	fresh measuring $packages
	run -timeout 15m -p 1 -run "$measuring"
	;;
kernel)
	hack/layer.sh "tests on Debian's stock kernel in a virtual machine"
	kernel=$(hack/kernel.sh 2>/dev/null || true)
	fresh "kernel-${kernel##*/}" "$module/test/kernel"
	run -timeout 25m
	;;
cluster)
	hack/layer.sh "tests in real Kubernetes clusters of two nodes"
	# Two packages run at a time, each with a cluster of its own, and the longest first: go test takes them in
	# this order, and what is not named comes last. Then, alone, what makes both processors work.
	all=$(go list ./test/cluster/... | grep -v -x -F "$module/test/cluster/cilium")
	all=$({ for name in encryption gateway chart jobs reverse faults; do grep "/cluster/$name$" <<<"$all"; done; echo "$all"; } | awk '!seen[$0]++')
	alone="/operator$"
	images
	hack/image.sh --check
	# shellcheck disable=SC2046 # one word per package
	{
		fresh cluster $(grep -v -E "$alone" <<<"$all")
		run -timeout 25m -p 2 -skip '^TestCilium'
		fresh cluster $(grep -E "$alone" <<<"$all")
		run -timeout 25m -p 1
	}
	;;
cilium)
	hack/layer.sh "tests in a real Kubernetes cluster with a real Cilium"
	fresh cilium "$module/test/cluster/cilium"
	if [[ -n $packages ]]; then
		hack/cilium.sh >/dev/null
		images
		run -timeout 25m
	fi
	;;
*)
	echo "usage: $0 unit|netlab|measuring|kernel|cluster|cilium" >&2
	exit 2
	;;
esac
exit $status
