package operator

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

var update = flag.Bool("update", false, "write docs/reference/operator-metrics.md anew")

// connectedRemote has two hubs, one of them ready, and a spoke at both and one at one.
func connectedRemote(w *world, o *Operator) {
	w.frontHas("192.0.2.7")
	w.rounds(o)
	at := func(days int) *metav1.Time {
		return new(metav1.NewTime(w.now.Add(time.Duration(days) * 24 * time.Hour)))
	}
	var c v1alpha1.RemoteCluster
	get(w, &c, "default", "prod")
	c.Status.Hubs = []v1alpha1.HubStatus{
		{Name: "culvert-hub-prod-0", CertificateExpirationTime: at(5), Spokes: []v1alpha1.SpokeStatus{{Name: "a", CertificateExpirationTime: at(4)}, {Name: "b", CertificateExpirationTime: at(3)}}},
		{Name: "culvert-hub-prod-1", CertificateExpirationTime: at(6), Spokes: []v1alpha1.SpokeStatus{{Name: "a", CertificateExpirationTime: at(4)}}},
	}
	if err := w.client.Status().Update(w.t.Context(), &c); err != nil {
		w.t.Fatal(err)
	}
	var set appsv1.StatefulSet
	get(w, &set, "default", "culvert-hub-prod")
	set.Status.ReadyReplicas = 1
	if err := w.client.Status().Update(w.t.Context(), &set); err != nil {
		w.t.Fatal(err)
	}
	w.rounds(o)
}

// The metrics say what the objects say, and the reference is generated from them.
func TestMetricsReferenceIsCurrent(t *testing.T) {
	w := newWorld(t, remote("prod"))
	o := w.operator(interceptor.Funcs{})
	connectedRemote(w, o)
	r := prometheus.NewPedanticRegistry()
	health := newRoundHealth(r)
	health.done(time.Second, nil)
	r.MustRegister(o.Metrics())
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.WriteString("# Metrics of the operator\n\nServed by `culvert operator --http ADDRESS` at `/metrics`, beside those of the Go runtime and the\nprocess. Generated from the metrics themselves (`go test ./internal/operator -update`).\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n")
	values := map[string]float64{}
	for _, f := range families {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, "`"+l.GetName()+"`")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
		for _, m := range f.Metric {
			key := f.GetName()
			for _, l := range m.Label {
				key += " " + l.GetValue()
			}
			values[key] = m.GetGauge().GetValue()
		}
	}
	b.WriteString("\nThose of RemoteClusters come from the operator that leads.\n")
	day := 24 * time.Hour
	for key, want := range map[string]float64{
		"culvert_remote_cluster_hubs default/prod":                                 2,
		"culvert_remote_cluster_hubs_ready default/prod":                           1,
		"culvert_remote_cluster_hubs_connected default/prod":                       2,
		"culvert_remote_cluster_spokes default/prod":                               2,
		"culvert_remote_cluster_certificate_expiration_seconds default/prod hub":   float64(w.now.Add(5 * day).Unix()),
		"culvert_remote_cluster_certificate_expiration_seconds default/prod spoke": float64(w.now.Add(3 * day).Unix()),
	} {
		if got, found := values[key]; !found || got != want {
			t.Errorf("%s = %v (there: %v), want %v", key, got, found, want)
		}
	}
	const path = "../../docs/reference/operator-metrics.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != b.String() {
		t.Errorf("docs/reference/operator-metrics.md is not current: go test ./internal/operator -update (%v)", err)
	}
	// What is gone is not told of any more.
	var c v1alpha1.RemoteCluster
	get(w, &c, "default", "prod")
	if err := w.client.Delete(t.Context(), &c); err != nil {
		t.Fatal(err)
	}
	w.rounds(o)
	if left, err := r.Gather(); err != nil || len(left) >= len(families) {
		t.Errorf("%d of %d metrics are left of one that was deleted: %v", len(left), len(families), err)
	}
}
