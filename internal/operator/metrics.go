package operator

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// remoteFacts is what a round saw of a RemoteCluster.
type remoteFacts struct {
	name                         string // namespace/name
	wanted, ready, joined, spoke int    // hubs; those ready; those with a spoke; spokes
	expires                      map[string]time.Time
}

// remoteMetrics tells Prometheus of RemoteClusters, as the last round saw them. The zero
// value tells nothing; so does an operator that waits to lead.
type remoteMetrics struct{ facts atomic.Pointer[[]remoteFacts] }

var (
	remoteLabels     = []string{"remote_cluster"}
	descHubs         = prometheus.NewDesc("culvert_remote_cluster_hubs", "Hubs that a RemoteCluster is to have; 0: it is refused, or the feature gate is off.", remoteLabels, nil)
	descHubsReady    = prometheus.NewDesc("culvert_remote_cluster_hubs_ready", "Hubs whose pods are ready.", remoteLabels, nil)
	descHubsJoined   = prometheus.NewDesc("culvert_remote_cluster_hubs_connected", "Hubs with at least one spoke.", remoteLabels, nil)
	descSpokes       = prometheus.NewDesc("culvert_remote_cluster_spokes", "Spokes that are connected, each counted once.", remoteLabels, nil)
	descRemoteExpiry = prometheus.NewDesc("culvert_remote_cluster_certificate_expiration_seconds", "Unix time at which the first certificate expires, of the hubs or of the spokes that are connected.", append([]string{"role"}, remoteLabels...), nil)
)

// Describe implements prometheus.Collector.
func (m *remoteMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descHubs, descHubsReady, descHubsJoined, descSpokes, descRemoteExpiry} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (m *remoteMetrics) Collect(c chan<- prometheus.Metric) {
	facts := m.facts.Load()
	if facts == nil {
		return
	}
	for _, f := range *facts {
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append(labels, f.name)...)
		}
		gauge(descHubs, float64(f.wanted))
		gauge(descHubsReady, float64(f.ready))
		gauge(descHubsJoined, float64(f.joined))
		gauge(descSpokes, float64(f.spoke))
		for role, at := range f.expires {
			gauge(descRemoteExpiry, float64(at.Unix()), role)
		}
	}
}

// Metrics are those of RemoteClusters.
func (o *Operator) Metrics() prometheus.Collector { return &o.metrics }

// tellMetrics keeps what Prometheus asks for.
func (r *round) tellMetrics() {
	facts := []remoteFacts{}
	for _, id := range sortedIDs(r.seen.remotes) {
		facts = append(facts, r.remoteFacts(id, r.seen.remotes[id]))
	}
	r.metrics.facts.Store(&facts)
}

func (r *round) remoteFacts(id model.ID, o *v1alpha1.RemoteCluster) remoteFacts {
	f := remoteFacts{name: id.String(), expires: map[string]time.Time{}}
	if s := r.remotes[id]; s != nil {
		f.wanted = s.Replicas
	}
	f.ready = int(r.seen.readyPods[model.ID{Namespace: id.Namespace, Name: workload.HubName(id.Name)}])
	first := func(role string, at *metav1.Time) {
		if at != nil && (f.expires[role].IsZero() || at.Time.Before(f.expires[role])) {
			f.expires[role] = at.Time
		}
	}
	names := map[string]bool{}
	for _, h := range o.Status.Hubs {
		first("hub", h.CertificateExpirationTime)
		if len(h.Spokes) > 0 {
			f.joined++
		}
		for _, s := range h.Spokes {
			first("spoke", s.CertificateExpirationTime)
			names[s.Name] = true
		}
	}
	f.spoke = len(names)
	return f
}
