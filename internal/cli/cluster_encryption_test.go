package cli

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

func TestEncryptionStatus(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	no := func(kind, why string) []metav1.Condition {
		return []metav1.Condition{{Type: kind, Status: metav1.ConditionFalse, Reason: "Waiting", Message: why}}
	}
	o := &v1alpha1.NodeEncryption{
		Spec:   v1alpha1.NodeEncryptionSpec{Scope: v1alpha1.ScopeAll, Enforcement: v1alpha1.EnforcementStrict},
		Status: v1alpha1.NodeEncryptionStatus{ReadyNodes: 1, TotalNodes: 2, Conditions: no("Enforced", "Strict waits until every node is ready")},
	}
	tunnels := []v1alpha1.NodeTunnel{{
		ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: v1alpha1.NodeTunnelSpec{PublicKey: "KEY", NextPublicKey: "NEXT"},
		Status: v1alpha1.NodeTunnelStatus{
			Peers: 1, Conditions: no("Ready", "1 of 1 other nodes do not answer"), Exemptions: []string{"etcd", "API server"},
			SilentPeers: []v1alpha1.SilentPeer{{Node: "b", LastHandshakeTime: &metav1.Time{Time: now.Add(-5 * time.Minute)}}},
			PlainPackets: []v1alpha1.PlainPacket{{Kind: "out_pods", Source: "10.244.1.5", Destination: "10.244.2.7", Protocol: 6, Dropped: true,
				Time: metav1.Time{Time: now.Add(-9 * time.Second)}}},
		},
	}, {ObjectMeta: metav1.ObjectMeta{Name: "b"}, Status: v1alpha1.NodeTunnelStatus{Exemptions: []string{"API server"}}}}
	s := &clusterStatus{Encryption: encryptionOf(o, tunnels)}
	var out strings.Builder
	if err := printClusterStatus(&out, s, now); err != nil {
		t.Fatal(err)
	}
	const want = `Encryption between nodes: 1 of 2 nodes ready (scope All, Strict, enforced: False)
NODE  PEERS  ANSWER  KEY
a     1      0       KEY (changing)
b     0      0       
silent: a hears nothing from b: last handshake 5m0s ago
dropped: a: in the clear for a pod or site of another node (out_pods), first from 10.244.1.5 to 10.244.2.7 protocol 6, 9s ago
exempt: API server
exempt: etcd
waits: Strict waits until every node is ready
problem: NodeTunnel a: Waiting: 1 of 1 other nodes do not answer
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	if !s.bad() {
		t.Error("a node that does not answer is a problem")
	}
}
