package workload

import "github.com/culvert-vpn/culvert/internal/model"

// podAnnotations are those of a gateway's pods. Cilium (1.20) drops what leaves a pod with an
// address that is not the pod's, unless the pod's annotation says otherwise and a cluster
// administrator has allowed that in the namespace: docs/node-link.md.
func podAnnotations(gw *model.Gateway) map[string]string {
	if gw.NodeLink != "CiliumEndpoint" || gw.Masquerade {
		return nil
	}
	return map[string]string{"config.cilium.io/disable-source-ip-verification": "true"}
}
