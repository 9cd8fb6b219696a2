package encryption

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
)

// overlay gives the cluster's pods a network as flannel does: a VXLAN between the nodes with an
// address of each node's pod range, and the plug-in bridge on them.
func (w *world) overlay() {
	w.t.Helper()
	for i, n := range w.Nodes {
		var s strings.Builder
		fmt.Fprintf(&s, "set -e\nip link add flannel.1 address 02:00:00:00:f1:0%d mtu 1450 type vxlan id 1 dstport 8472 local %s nolearning\n", i, n.IPs()[0])
		fmt.Fprintf(&s, "ip link set flannel.1 up\nip addr add %s/32 dev flannel.1\nip addr add %s/128 dev flannel.1 nodad\n", n.PodCIDRs()[0].Addr(), n.PodCIDRs()[1].Addr())
		for j, o := range w.Nodes {
			if i == j {
				continue
			}
			fmt.Fprintf(&s, "bridge fdb append 02:00:00:00:f1:0%d dev flannel.1 dst %s\n", j, o.IPs()[0])
			for _, c := range o.PodCIDRs() {
				fmt.Fprintf(&s, "ip neigh add %s lladdr 02:00:00:00:f1:0%d dev flannel.1\nip route add %s via %[1]s dev flannel.1 onlink\n", c.Addr(), j, c)
			}
		}
		for k, family := range []string{"ip", "ip6"} {
			fmt.Fprintf(&s, "nft 'table %[1]s overlay { chain postrouting { type nat hook postrouting priority srcnat; %[1]s saddr %[2]s %[1]s daddr != { %[3]s, %[4]s } masquerade; }; }'\n",
				family, n.PodCIDRs()[k], cluster.PodCIDRs[k], []string{"224.0.0.0/4", "ff00::/8"}[k])
		}
		fmt.Fprintf(&s, "mkdir -p /etc/cni/net.d\ncat >/etc/cni/net.d/10-flannel.conflist <<'END'\n"+`{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
{"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450,
 "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}], [{"subnet": "%s"}]]}}]}`+"\nEND\n", n.PodCIDRs()[0], n.PodCIDRs()[1])
		if out, err := n.Run(context.Background(), "sh", "-c", s.String()); err != nil {
			w.t.Fatalf("%v: %s", err, out)
		}
	}
	w.Kubectl("wait", "nodes", "--all", "--for=condition=Ready", "--timeout=60s")
	w.noDNS = true // a cluster without a network for pods comes without
}

// Beside an overlay: what the network plug-in would wrap is encrypted instead, and nothing
// leaves in the overlay's own packets.
func TestOverlay(t *testing.T) {
	w := newWorld(t, cluster.Options{Nodes: 2, CNI: cluster.NoCNI})
	w.overlay()
	w.install()
	w.works(t, w.requests())
	wrapped := 0
	for _, lines := range w.heard() {
		for _, l := range lines {
			if strings.Contains(l, ".8472:") {
				wrapped++
			}
		}
	}
	if wrapped < 40 {
		t.Fatalf("with encryption off %d packets of the overlay were heard: the test proves nothing", wrapped)
	}
	w.encrypt()
	w.works(t, w.requests())
	w.silence(t, "overlay, scope All")

	w.Apply(strings.Replace(encryption("Strict"), "All", "Pods", 1))
	w.works(t, w.requests())
	w.heard() // while it changed
	w.works(t, w.requests())
	for node, lines := range w.heard() {
		for _, l := range lines {
			if strings.Contains(l, ".8472:") || strings.Contains(l, "10.244.") || strings.Contains(l, "fd00:244:") {
				t.Errorf("overlay, scope Pods: in the clear at %s: %s", node, l)
			}
		}
	}
	t.Run("uninstalled by force", w.forced)
	w.Kubectl("delete", "nodeencryption", "cluster")
	w.works(t, w.requests())
}

// forced uninstalls without asking: nothing goes out in the clear, nor out at all, until Culvert is
// installed again.
func (w *world) forced(t *testing.T) {
	w.Apply(encryption("Strict"))
	w.enforced()
	w.works(t, w.requests())
	w.heard()
	w.Helm("uninstall", clustertest.Release, "--namespace", clustertest.System, "--no-hooks", "--wait")
	for i, n := range w.Nodes {
		o := w.Nodes[(i+1)%len(w.Nodes)]
		if out, err := w.onNode(n, "get", url(w.ips("web-" + o.Name)[0])); err == nil {
			t.Errorf("%s reaches a pod of %s: %s", n.Name, o.Name, out)
		}
		w.held(t, n, true)
	}
	w.silence(t, "uninstalled by force")
	w.chart()
	w.works(t, w.requests())
	w.silence(t, "installed again")
}
