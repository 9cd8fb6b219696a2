#!/usr/bin/env bash
# Runs one layer of tests: test.sh unit|netlab|kernel|cluster|cilium. Each package runs in exactly one.
# ARGS="-run TestX -count=1" is passed on to go test.
set -euo pipefail
cd "$(dirname "$0")/.."

# Packages whose tests build networks of namespaces; they run one after the other, since
# they measure, and mind the neighbours.
namespaces() {
	go list -f '{{if or (eq .ImportPath "'"$module"'/test/netlab")}}{{.ImportPath}}{{else}}{{range .TestImports}}{{if eq . "'"$lab"'"}}{{$.ImportPath}}{{"\n"}}{{end}}{{end}}{{range .XTestImports}}{{if eq . "'"$lab"'"}}{{$.ImportPath}}{{"\n"}}{{end}}{{end}}{{end}}' ./... |
		grep . | grep -v -E "^$module/test/(kernel|cluster)" | sort -u
}

module=$(go list -m)
lab=$module/internal/lab/labtest
case "$1" in
unit)
	packages=$(comm -23 <(go list ./... | grep -v -E "^$module/test/(kernel|cluster)" | sort) <(namespaces))
	hack/layer.sh "unit and golden tests: $(wc -w <<<"$packages") packages"
	hack/helm.sh >/dev/null # not in a test's time
	flags=(-timeout 5m)
	;;
netlab)
	packages=$(namespaces)
	hack/layer.sh "tests in network namespaces: $(wc -w <<<"$packages") packages, one after the other"
	if [[ $EUID -ne 0 ]]; then
		echo "SKIP: not root: most of them will skip"
	fi
	flags=(-timeout 15m -p 1)
	;;
kernel)
	packages=./test/kernel
	hack/layer.sh "tests on Debian's stock kernel in a virtual machine"
	flags=(-timeout 25m)
	;;
cluster)
	# Those that hold gateways to times, or count what a cluster leaves, have the machine to themselves. The others mostly wait,
	# so two run at a time, each with a cluster of its own.
	alone=$(go list ./test/cluster/... | grep -E '/(cluster|gateway|jobs|nodelink)$')
	packages=$(go list ./test/cluster/... | grep -v -E '/(cluster|gateway|jobs|nodelink|cilium)$')
	hack/layer.sh "tests in real Kubernetes clusters of two nodes"
	hack/kubernetes.sh >/dev/null
	hack/helm.sh >/dev/null
	hack/image.sh
	hack/image.sh --check
	export CULVERT_IMAGE=$PWD/.cache/image/culvert.tar # not once more in each package
	flags=(-timeout 25m -p 2)
	;;
cilium)
	packages=./test/cluster/cilium
	hack/layer.sh "tests in a real Kubernetes cluster with a real Cilium"
	hack/kubernetes.sh >/dev/null
	hack/cilium.sh >/dev/null
	hack/helm.sh >/dev/null
	hack/image.sh
	export CULVERT_IMAGE=$PWD/.cache/image/culvert.tar
	flags=(-timeout 25m)
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
		go test -json "${flags[@]}" -p 1 ${ARGS:-} $alone || status=$?
	fi
	exit $status
} | go run ./hack/results
