package tunnel

import "strconv"

// EgressSelectorConfiguration is the file for kube-apiserver's
// --egress-selector-config-file (apiserver.k8s.io/v1beta1): what concerns the cluster goes
// through the Unix socket, everything else is dialled directly.
func EgressSelectorConfiguration(socket string) string {
	return `apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
- name: cluster
  connection:
    proxyProtocol: HTTPConnect
    transport:
      uds:
        udsName: ` + strconv.Quote(socket) + `
- name: controlplane
  connection:
    proxyProtocol: Direct
- name: etcd
  connection:
    proxyProtocol: Direct
`
}
