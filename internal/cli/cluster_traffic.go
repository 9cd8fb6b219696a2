package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// traffic is what the working pods of gateways measure, which no object says.
type traffic struct {
	// Established is the last handshake (WireGuard) or when the SA was established (IPsec).
	Established   *metav1.Time `json:"established,omitempty"`
	ReceivedBytes uint64       `json:"receivedBytes"`
	SentBytes     uint64       `json:"sentBytes"`
	// LatencySeconds is the round trip of the last probe through the tunnel that is used; 0:
	// none is sent.
	LatencySeconds float64 `json:"latencySeconds,omitempty"`
}

// agentStatus is the agent of one node.
type agentStatus struct {
	Node  string `json:"node"`
	Pod   string `json:"pod"`
	Ready bool   `json:"ready"`
}

// remoteStatus is one RemoteCluster.
type remoteStatus struct {
	Name      string           `json:"name"`
	Ready     string           `json:"ready"`
	Connected string           `json:"connected"`
	Hubs      int              `json:"hubs"`
	Spokes    []string         `json:"spokes"` // those connected, by name
	Since     *metav1.Time     `json:"since,omitempty"`
	Problems  []conditionTexts `json:"problems,omitempty"`
	Message   string           `json:"message,omitempty"`
}

const (
	metricsPort    = "9586" // of a gateway's pod
	metricsTimeout = 5 * time.Second
	mostMetrics    = 64 << 20 // bytes: of tens of thousands of peers
)

// measured asks the working pods of gateways, through the API server, for their peers: by kind
// ("site", "device") and name. Why one cannot be asked is told, and is no failure.
func (c *connection) measured(ctx context.Context, gateways []v1alpha1.VPNGateway) (map[[2]string]*traffic, []string) {
	out := map[[2]string]*traffic{}
	var notes []string
	for i := range gateways {
		o := &gateways[i]
		at := slices.IndexFunc(o.Status.Endpoints, func(e v1alpha1.GatewayEndpoint) bool { return e.Active })
		if at < 0 {
			continue
		}
		if err := c.metrics(ctx, o.Namespace, o.Status.Endpoints[at].Pod, out); err != nil {
			notes = append(notes, fmt.Sprintf("traffic of %s/%s is not known: %v", o.Namespace, o.Name, err))
		}
	}
	return out, notes
}

// metrics reads the metrics of a gateway's pod.
func (c *connection) metrics(ctx context.Context, namespace, pod string, into map[[2]string]*traffic) error {
	ctx, cancel := context.WithTimeout(ctx, metricsTimeout)
	defer cancel()
	h, err := rest.HTTPClientFor(c.config)
	if err != nil {
		return err
	}
	url := fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s:%s/proxy/metrics", strings.TrimSuffix(c.config.Host, "/"), namespace, pod, metricsPort)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := h.Do(req)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusForbidden {
		return fmt.Errorf("pod %s: you may not get pods/proxy", pod)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("pod %s says %s", pod, resp.Status)
	}
	return readTraffic(io.LimitReader(resp.Body, mostMetrics), into)
}

// readTraffic reads what is about peers from Prometheus's text format.
func readTraffic(r io.Reader, into map[[2]string]*traffic) error {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		name, labels, value, ok := sample(lines.Text())
		if !ok {
			continue
		}
		kind := labels["kind"]
		if strings.HasPrefix(name, "culvert_path_") { // of a site
			kind = "site"
		}
		key := [2]string{kind, labels["name"]}
		t := into[key]
		if t == nil {
			t = &traffic{}
		}
		switch name {
		case "culvert_peer_received_bytes_total":
			t.ReceivedBytes = uint64(value)
		case "culvert_peer_sent_bytes_total":
			t.SentBytes = uint64(value)
		case "culvert_peer_established_seconds":
			if value > 0 {
				t.Established = &metav1.Time{Time: time.Unix(int64(value), 0)}
			}
		case "culvert_path_rtt_seconds":
			if value > 0 && (t.LatencySeconds == 0 || value < t.LatencySeconds) {
				t.LatencySeconds = value
			}
		default:
			continue
		}
		into[key] = t
	}
	return lines.Err()
}

// sample takes a line "name{label="value",…} number" apart; values of Culvert's labels hold no
// quotes.
func sample(line string) (name string, labels map[string]string, value float64, ok bool) {
	name, rest, ok := strings.Cut(line, "{")
	list, number, closed := strings.Cut(rest, "} ")
	if !ok || !closed || strings.HasPrefix(name, "#") {
		return "", nil, 0, false
	}
	labels = map[string]string{}
	for list != "" {
		k, after, quoted := strings.Cut(list, `="`)
		v, next, ended := strings.Cut(after, `"`)
		if !quoted || !ended {
			return "", nil, 0, false
		}
		labels[k] = v
		list = strings.TrimPrefix(next, ",")
	}
	value, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	return name, labels, value, err == nil
}

// agents are those of the nodes; none when their pods are not for the asker's eyes.
func (c *connection) agents(ctx context.Context) ([]agentStatus, error) {
	var pods corev1.PodList
	err := c.List(ctx, &pods, client.MatchingLabels{workload.LabelName: workload.Name, workload.LabelComponent: "agent"})
	if apierrors.IsForbidden(err) {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain(err)
	}
	list := []agentStatus{}
	for i := range pods.Items {
		p := &pods.Items[i]
		ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		list = append(list, agentStatus{p.Spec.NodeName, p.Namespace + "/" + p.Name, ready})
	}
	slices.SortFunc(list, func(a, b agentStatus) int { return strings.Compare(a.Node, b.Node) })
	return list, nil
}

// remotes are the RemoteClusters of a namespace, or of all.
func (c *connection) remotes(ctx context.Context, namespace string) ([]remoteStatus, error) {
	var all v1alpha1.RemoteClusterList
	err := c.List(ctx, &all, client.InNamespace(namespace))
	if apierrors.IsForbidden(err) {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain(err)
	}
	list := []remoteStatus{}
	for i := range all.Items {
		list = append(list, remoteOf(&all.Items[i]))
	}
	return list, nil
}

func remoteOf(o *v1alpha1.RemoteCluster) remoteStatus {
	connected := condition(o.Status.Conditions, v1alpha1.ConditionConnected)
	x := remoteStatus{
		Name: o.Namespace + "/" + o.Name, Hubs: len(o.Status.Hubs), Connected: string(connected.Status),
		Ready: string(condition(o.Status.Conditions, v1alpha1.ConditionReady).Status), Problems: problemsOf(o.Status.Conditions),
	}
	if !connected.LastTransitionTime.IsZero() {
		x.Since = &connected.LastTransitionTime
	}
	if connected.Status != metav1.ConditionTrue {
		x.Message = connected.Message
	}
	spokes := map[string]bool{}
	for _, h := range o.Status.Hubs {
		for _, s := range h.Spokes {
			spokes[s.Name] = true
		}
	}
	x.Spokes = slices.Sorted(maps.Keys(spokes))
	return x
}

func printAgents(w io.Writer, list []agentStatus) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintln(w, "\nNODE\tAGENT\tSTATE")
	for _, x := range list {
		state := "ready"
		if !x.Ready {
			state = "not ready"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", x.Node, x.Pod, state)
	}
}

// texts are the columns of a table.
func (t *traffic) texts(now time.Time) (established, received, sent, latency string) {
	if t == nil {
		return "-", "-", "-", "-"
	}
	established, latency = "-", "-"
	if t.Established != nil {
		established = ago(now.Sub(t.Established.Time))
	}
	if t.LatencySeconds > 0 {
		latency = time.Duration(t.LatencySeconds * float64(time.Second)).Round(100 * time.Microsecond).String()
	}
	return established, bytesText(t.ReceivedBytes), bytesText(t.SentBytes), latency
}
