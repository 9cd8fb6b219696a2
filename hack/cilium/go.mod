module github.com/culvert-vpn/culvert/hack/cilium

go 1.26.0

require github.com/cilium/cilium v1.15.19

// Cilium's own.
replace (
	go.universe.tf/metallb => github.com/cilium/metallb v0.1.1-0.20220829170633-5d7dfb1129f7
	sigs.k8s.io/controller-tools => github.com/cilium/controller-tools v0.8.0-1
)
