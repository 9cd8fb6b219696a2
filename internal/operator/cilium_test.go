package operator

import (
	"net/netip"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/model"
)

func settings(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: cilium.ConfigNamespace, Name: cilium.ConfigName}, Data: data}
}

// Where Cilium cannot carry what is behind a gateway, the gateway's condition says so, and Cilium is
// told nothing; what it once was told is taken back.
func TestCiliumRefused(t *testing.T) {
	for name, c := range map[string]struct {
		config  *corev1.ConfigMap // nil: none
		off     bool              // cilium.enabled=false
		refused string            // the message has it; empty: accepted
	}{
		"tunnels":        {config: settings(map[string]string{"routing-mode": "tunnel"})},
		"native routing": {config: settings(map[string]string{"routing-mode": "native"}), refused: "with native routing packets would leave the nodes"},
		"no Cilium":      {refused: "there is no ConfigMap kube-system/cilium-config"},
		"not installed":  {config: settings(nil), off: true, refused: "cilium.enabled=true"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, gateway(func(s *v1alpha1.VPNGatewaySpec) { s.ClusterTraffic.NodeLink = v1alpha1.NodeLinkCiliumEndpoint }))
			if c.config != nil {
				w.create(c.config)
			}
			w.endpoint("culvert-edge-0")
			o := w.operator(interceptor.Funcs{})
			var told []cilium.Endpoint
			if !c.off {
				o.Behind = func(pods []cilium.Endpoint, _ []netip.Prefix) { told = pods }
			}
			w.rounds(o)
			var g v1alpha1.VPNGateway
			get(w, &g, "default", "edge")
			a := meta.FindStatusCondition(g.Status.Conditions, v1alpha1.ConditionAccepted)
			if a == nil || (a.Status == metav1.ConditionTrue) != (c.refused == "") {
				t.Fatalf("Accepted is %+v", a)
			}
			if c.refused != "" && (a.Reason != model.ReasonNetworkPlugin || !strings.Contains(a.Message, c.refused) || !strings.Contains(a.Message, "set Encapsulated")) {
				t.Errorf("Accepted is %s: %s", a.Reason, a.Message)
			}
			switch {
			case c.off:
			case len(told) != 1:
				t.Errorf("Cilium is told of %v", told)
			case (len(told[0].Ranges) > 0) != (c.refused == ""):
				t.Errorf("Cilium is told of %v", told)
			}
		})
	}
}

// A link that Cilium cannot carry leaves the one in use that was, also with another operator, until
// one is asked for that can be carried; what the gateway consists of stays as it is.
func TestCiliumRefusedKeepsTheLink(t *testing.T) {
	w := newWorld(t, gateway(), site("berlin", "10.1.0.0/16"))
	config := settings(map[string]string{"routing-mode": "native"})
	w.create(config)
	w.endpoint("culvert-edge-0")
	var told []cilium.Endpoint
	operator := func() *Operator {
		o := w.operator(interceptor.Funcs{})
		o.Behind = func(pods []cilium.Endpoint, _ []netip.Prefix) { told = pods }
		return o
	}
	ask := func(link v1alpha1.NodeLink) {
		edit(w, &v1alpha1.VPNGateway{}, "edge", func(g *v1alpha1.VPNGateway) { g.Spec.ClusterTraffic.NodeLink = link })
	}
	wants := func(o *Operator, link v1alpha1.NodeLink, accepted string) {
		t.Helper()
		w.rounds(o)
		var g v1alpha1.VPNGateway
		get(w, &g, "default", "edge")
		if g.Status.NodeLink != link {
			t.Errorf("the link in use is %q, not %q", g.Status.NodeLink, link)
		}
		w.wants(says(g.Status.Conditions, v1alpha1.ConditionAccepted), accepted)
		if len(told) != 1 || (len(told[0].Ranges) > 0) != (link == v1alpha1.NodeLinkCiliumEndpoint) {
			t.Errorf("with the link %q Cilium is told of %v", link, told)
		}
		annotated := w.podAnnotation("config.cilium.io/disable-source-ip-verification") != ""
		if link != "" && annotated != (link == v1alpha1.NodeLinkCiliumEndpoint) {
			t.Errorf("with the link %q the pods are annotated for Cilium: %t", link, annotated)
		}
	}
	o := operator()
	wants(o, v1alpha1.NodeLinkEncapsulated, "True Accepted")
	ask(v1alpha1.NodeLinkCiliumEndpoint)
	for range 2 {
		wants(o, v1alpha1.NodeLinkEncapsulated, "False NetworkPlugin spec.clusterTraffic.nodeLink: CiliumEndpoint: with native routing")
		o = operator() // another process
	}
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	if got := says(g.Status.Conditions, v1alpha1.ConditionAccepted); !strings.HasSuffix(got, "; Encapsulated, the last good link, stays in use") {
		t.Errorf("it says %q", got)
	}
	ask(v1alpha1.NodeLinkDirect)
	wants(o, v1alpha1.NodeLinkDirect, "True Accepted")
	ask(v1alpha1.NodeLinkCiliumEndpoint)
	wants(o, v1alpha1.NodeLinkDirect, "False NetworkPlugin")

	config.Data["routing-mode"] = "tunnel"
	w.update(config)
	wants(o, v1alpha1.NodeLinkCiliumEndpoint, "True Accepted")
	config.Data["routing-mode"] = "native"
	w.update(config)
	wants(o, "", "False NetworkPlugin") // nothing good is known: what was before was given up
	ask(v1alpha1.NodeLinkEncapsulated)
	wants(o, v1alpha1.NodeLinkEncapsulated, "True Accepted")
}

// podAnnotation is one of the gateway's pods.
func (w *world) podAnnotation(name string) string {
	w.t.Helper()
	var s appsv1.StatefulSet
	get(w, &s, "default", "culvert-edge")
	return s.Spec.Template.Annotations[name]
}

func (w *world) update(o client.Object) {
	w.t.Helper()
	if err := w.client.Update(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

// endpoint has a gateway's pod say that it is the active one.
func (w *world) endpoint(pod string) {
	w.t.Helper()
	var g v1alpha1.VPNGateway
	get(w, &g, "default", "edge")
	g.Status.Endpoints = []v1alpha1.GatewayEndpoint{{Pod: pod, Node: "n1", PodIPs: []v1alpha1.IP{"10.244.1.5"}, Active: true}}
	if err := w.client.Status().Update(w.t.Context(), &g); err != nil {
		w.t.Fatal(err)
	}
}
