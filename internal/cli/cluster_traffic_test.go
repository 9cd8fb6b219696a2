package cli

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// What a gateway's pod serves as metrics is a line of the table.
func TestTrafficOfAMetricsPage(t *testing.T) {
	peers := map[[2]string]*traffic{}
	err := readTraffic(strings.NewReader(`# HELP culvert_peer_up 1 when the site or device is connected, else 0.
# TYPE culvert_peer_up gauge
culvert_peer_up{kind="site",name="vpn/berlin",type="wireguard"} 1
culvert_peer_received_bytes_total{kind="site",name="vpn/berlin",type="wireguard"} 2.097152e+06
culvert_peer_sent_bytes_total{kind="site",name="vpn/berlin",type="wireguard"} 1024
culvert_peer_established_seconds{kind="site",name="vpn/berlin",type="wireguard"} 1e+09
culvert_path_rtt_seconds{interface="cvtwg0",name="vpn/berlin"} 0.0123
culvert_path_rtt_seconds{interface="cvtwg1",name="vpn/berlin"} 0.5
culvert_peer_established_seconds{kind="device",name="vpn/berlin",type="wireguard"} 0
culvert_problems 0
go_goroutines 5
wireguard_sent_bytes_total{allowed_ips="10.0.0.0/8,10.1.0.0/16",friendly_name="a b",interface="x",public_key="k="} 5
`), peers)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1e9+30, 0)
	for key, want := range map[[2]string]string{
		{"site", "vpn/berlin"}: "30s ago 2.0 MiB 1.0 KiB 12.3ms", {"device", "vpn/berlin"}: "- 0 B 0 B -", {"device", "vpn/phone"}: "- - - -",
	} {
		a, b, c, d := peers[key].texts(now)
		if got := strings.Join([]string{a, b, c, d}, " "); got != want {
			t.Errorf("%v: %q, want %q", key, got, want)
		}
	}
}

func TestStatusOfRemoteClusters(t *testing.T) {
	since := metav1.NewTime(time.Unix(1e9, 0))
	o := &v1alpha1.RemoteCluster{ObjectMeta: metav1.ObjectMeta{Namespace: "t1", Name: "shop"}}
	o.Status.Conditions = []metav1.Condition{
		{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue}, {Type: v1alpha1.ConditionConnected, Status: metav1.ConditionFalse, Message: "no spoke", LastTransitionTime: since},
	}
	o.Status.Hubs = []v1alpha1.HubStatus{{Name: "h0", Spokes: []v1alpha1.SpokeStatus{{Name: "a"}, {Name: "b"}}}, {Name: "h1", Spokes: []v1alpha1.SpokeStatus{{Name: "a"}}}}
	s := &clusterStatus{Remotes: []remoteStatus{remoteOf(o)}, Agents: []agentStatus{{"n1", "s/a", false}}, Notes: []string{"nothing"}}
	var b strings.Builder
	if err := printClusterStatus(&b, s, time.Unix(1e9+60, 0)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"t1/shop", "True", "down", "a,b", "down: RemoteCluster t1/shop: no spoke", "n1", "not ready", "note: nothing"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
}
