package operator

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// Tunnel says how RemoteClusters are served. The zero value serves none, except those whose
// annotation asks for it.
type Tunnel struct {
	// Enabled is the feature gate ReversedTunnel; an object's annotation overrides it.
	Enabled bool
	// Address is where remote sides dial, host:port; empty: that of Service.
	Address string
	// Domain is what the hubs' server names are made below; never empty.
	Domain string
	// Service is the front's, of type LoadBalancer; no name: there is no front.
	Service model.ID
	// Routes is the ConfigMap with the front's table; no name: there is no front.
	Routes model.ID
}

// remoteState is a RemoteCluster that has hubs.
type remoteState struct {
	*model.RemoteCluster
	address, domain string // where the remote side dials, and what for
}

// Reasons of RemoteClusters' conditions.
const (
	reasonDisabled       = "FeatureDisabled" // the gate, or the annotation
	reasonNoFrontAddress = "NoFrontAddress"  // nobody knows where spokes dial
	reasonHubsStarting   = "HubsStarting"
	reasonHubsRunning    = "HubsRunning"
	reasonNoHub          = "NoHub"
	reasonNoSpoke        = "NoSpoke"
	reasonSomeHubs       = "SomeHubs" // spokes are not at all hubs
	reasonConnected      = "Connected"
)

// enabled reports whether an object is to have hubs.
func (t Tunnel) enabled(o *v1alpha1.RemoteCluster) bool {
	switch o.Annotations[model.ReversedTunnelAnnotation] {
	case "true":
		return true
	case "false":
		return false
	}
	return t.Enabled
}

// findRemotes decides which RemoteClusters have hubs, and where spokes dial.
func (r *round) findRemotes(ctx context.Context) error {
	r.remotes = map[model.ID]*remoteState{}
	var front string
	for _, c := range r.model.RemoteClusters {
		o, ok := r.seen.remotes[c.ID]
		if !ok || !r.Tunnel.enabled(o) {
			continue
		}
		s := &remoteState{RemoteCluster: c, address: c.FrontHost, domain: c.FrontName}
		if s.domain == "" {
			s.domain = r.Tunnel.Domain
		}
		if s.address == "" && front == "" {
			var err error
			if front, err = r.frontAddress(ctx); err != nil {
				return err
			}
		}
		for _, known := range []string{front, o.Status.Address} { // one that was there stays
			if s.address == "" {
				s.address = known
			}
		}
		if s.address == "" {
			r.waiting = true
		}
		r.remotes[c.ID] = s
	}
	return nil
}

// frontAddress is where the front is dialled; empty: not known yet.
func (r *round) frontAddress(ctx context.Context) (string, error) {
	if r.Tunnel.Address != "" || r.Tunnel.Service.Name == "" {
		return r.Tunnel.Address, nil
	}
	var s corev1.Service
	err := r.Live.Get(ctx, types.NamespacedName{Namespace: r.Tunnel.Service.Namespace, Name: r.Tunnel.Service.Name}, &s)
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("look for the front's Service %s: %w", r.Tunnel.Service, err)
	}
	if len(s.Spec.Ports) == 0 {
		return "", nil
	}
	port := strconv.Itoa(int(s.Spec.Ports[0].Port))
	if len(s.Status.LoadBalancer.Ingress) == 0 {
		return "", nil
	}
	in := s.Status.LoadBalancer.Ingress[0]
	return net.JoinHostPort(cmp.Or(in.Hostname, in.IP), port), nil
}

// hubs makes what the hubs of RemoteClusters consist of. Before it is known where spokes
// dial, hubs could not tell anybody.
func (r *round) hubs(ctx context.Context) error {
	var sets [][]workload.Object
	var failed []error
	for _, id := range sortedIDs(r.remotes) {
		s := r.remotes[id]
		if s.address == "" {
			continue
		}
		objects, err := workload.Hubs(s.RemoteCluster, r.Workload)
		if err != nil {
			failed = append(failed, err)
			labels := workload.HubLabels(id)
			for key, o := range r.seen.owned {
				if key.namespace == id.Namespace && sameRemote(o.meta.Labels, labels) {
					r.desired[key] = true
				}
			}
			continue
		}
		sets = append(sets, objects)
	}
	if err := r.applySets(ctx, sets); err != nil {
		failed = append(failed, err)
	}
	return summary(failed)
}

func sameRemote(a, b map[string]string) bool {
	return a[workload.LabelRemoteCluster] != "" && a[workload.LabelRemoteCluster] == b[workload.LabelRemoteCluster]
}

// frontTable, frontRoute and frontBackend are the front's routing table as the file of
// "culvert front" has it.
type frontTable struct {
	Routes []frontRoute `json:"routes"`
}

type frontRoute struct {
	ServerName string         `json:"serverName"`
	Tenant     string         `json:"tenant"`
	Backends   []frontBackend `json:"backends"`
}

type frontBackend struct {
	Address       string `json:"address"`
	ProxyProtocol string `json:"proxyProtocol"`
}

// table leads each hub's server name to the Service that spokes reach it by.
func (r *round) table() frontTable {
	t := frontTable{Routes: []frontRoute{}}
	add := func(id model.ID, uid string, replicas int, domain string) {
		for i := range replicas {
			t.Routes = append(t.Routes, frontRoute{
				ServerName: wire.HubServerName(uid, i, domain), Tenant: id.String(),
				Backends: []frontBackend{{
					Address:       fmt.Sprintf("%s.%s.svc:%d", workload.HubSpokeService(id.Name, i), id.Namespace, workload.HubSpokePort),
					ProxyProtocol: "V2",
				}},
			})
		}
	}
	for _, id := range sortedIDs(r.seen.remotes) {
		if s := r.remotes[id]; s != nil {
			add(id, s.UID, s.Replicas, s.domain)
			continue
		}
		// One that is refused keeps the hubs that it has, and the way to them.
		o := r.seen.remotes[id]
		_, domain, _ := strings.Cut(o.Status.ServerName, ".")
		if uid, _, ok := wire.ParseHubServerName(o.Status.ServerName, domain); ok && r.refused(id) && r.Tunnel.enabled(o) && o.DeletionTimestamp.IsZero() {
			add(id, uid, len(o.Status.Hubs), domain)
		}
	}
	return t
}

// largestPlain is the size from which on a table is compressed: a ConfigMap holds 1 MiB.
const largestPlain = 512 << 10

// routes writes the front's table.
func (r *round) routes(ctx context.Context) error {
	if r.Tunnel.Routes.Name == "" {
		return nil
	}
	text, err := yaml.Marshal(r.table())
	if err != nil {
		return err
	}
	hash := hashOf(string(text))
	if r.written.hash == hash && r.Now().Sub(r.written.at) < forgetAfter {
		return nil
	}
	o := &corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: r.Tunnel.Routes.Namespace, Name: r.Tunnel.Routes.Name,
			Labels: map[string]string{workload.LabelName: workload.Name, workload.LabelComponent: "front", workload.LabelManagedBy: workload.Operator},
		},
		Data: map[string]string{"routes.yaml": string(text)},
	}
	if len(text) > largestPlain {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(text)
		_ = w.Close()
		o.Data, o.BinaryData = nil, map[string][]byte{"routes.yaml.gz": z.Bytes()}
	}
	if r.Workload.Owner != nil {
		o.OwnerReferences = []metav1.OwnerReference{*r.Workload.Owner}
	}
	u, err := applyConfiguration(o)
	if err != nil {
		return err
	}
	if err := r.Writer.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(Manager), client.ForceOwnership); err != nil {
		return fmt.Errorf("the front's table, ConfigMap %s: %w", r.Tunnel.Routes, err)
	}
	r.written.hash, r.written.at = hash, r.Now()
	return nil
}

// writtenTable is the table that was written last.
type writtenTable struct {
	hash [32]byte
	at   time.Time
}

// remoteStatus says what became of a RemoteCluster.
func (r *round) remoteStatus(id model.ID, o *v1alpha1.RemoteCluster) (statusWrite, bool) {
	ref := model.Ref{Kind: model.KindRemoteCluster, ID: id}
	want := o.Status
	s := r.remotes[id]
	if s != nil {
		want.Address, want.ServerName = s.address, wire.HubServerName(s.UID, 0, s.domain)
	}
	v := verdict{only: []metav1.Condition{r.judge(ref, o.Generation).accepted, r.hubsRun(s, o), r.spokesThere(s, o)}}
	if !r.Tunnel.enabled(o) && v.only[0].Status == metav1.ConditionTrue {
		v.only[0].Status, v.only[0].Reason = metav1.ConditionFalse, reasonDisabled
		v.only[0].Message = "the feature gate ReversedTunnel is off: turn it on (chart: featureGates.ReversedTunnel), or for this object alone with the annotation " + model.ReversedTunnelAnnotation + "=true"
		if o.Annotations[model.ReversedTunnelAnnotation] == "false" {
			v.only[0].Message = "the annotation " + model.ReversedTunnelAnnotation + " is false: take it away, or write true"
		}
	}
	if sameVerdict(v, o.Status.Conditions) && o.Status.ObservedGeneration == o.Generation &&
		want.Address == o.Status.Address && want.ServerName == o.Status.ServerName {
		return statusWrite{}, false
	}
	status := map[string]any{"observedGeneration": o.Generation}
	set(status, "address", want.Address)
	set(status, "serverName", want.ServerName)
	return statusWrite{object: o, kind: model.KindRemoteCluster, status: status, verdict: v, have: o.Status.Conditions}, true
}

// hubsRun is the condition Ready: Culvert did its part.
func (r *round) hubsRun(s *remoteState, o *v1alpha1.RemoteCluster) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, ObservedGeneration: o.Generation}
	if s == nil {
		c.Reason, c.Message = reasonNoHub, "there are no hubs: see the condition Accepted"
		return c
	}
	here := 0
	for i := range s.Replicas {
		if slices.ContainsFunc(o.Status.Hubs, func(h v1alpha1.HubStatus) bool { return h.Name == workload.HubPod(o.Name, i) }) {
			here++
		}
	}
	switch {
	case s.address == "":
		c.Reason = reasonNoFrontAddress
		c.Message = "nobody knows where the remote side dials: write spec.front.address, or the chart's front.address, or turn the chart's front on and see that its Service culvert-front gets an address"
	case here < s.Replicas:
		c.Reason = reasonHubsStarting
		c.Message = fmt.Sprintf("%d of %d hubs have reported: if it stays so, see 'kubectl -n %s describe pods -l %s=%s' and their logs", here, s.Replicas, o.Namespace, workload.LabelRemoteCluster, workload.HubLabels(s.ID)[workload.LabelRemoteCluster])
	default:
		c.Status, c.Reason = metav1.ConditionTrue, reasonHubsRunning
	}
	return c
}

// spokesThere is the condition Connected.
func (r *round) spokesThere(s *remoteState, o *v1alpha1.RemoteCluster) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionConnected, Status: metav1.ConditionFalse, ObservedGeneration: o.Generation}
	if s == nil {
		c.Reason, c.Message = reasonNoHub, "there are no hubs: see the condition Accepted"
		return c
	}
	with := 0
	for i := range s.Replicas {
		if slices.ContainsFunc(o.Status.Hubs, func(h v1alpha1.HubStatus) bool {
			return h.Name == workload.HubPod(o.Name, i) && len(h.Spokes) > 0
		}) {
			with++
		}
	}
	ready := r.seen.readyPods[model.ID{Namespace: o.Namespace, Name: workload.HubName(o.Name)}]
	switch {
	case with == 0 || ready == 0:
		c.Reason = reasonNoSpoke
		c.Message = fmt.Sprintf("no spoke is connected: 'kubectl culvert join %s -n %s' prints what to apply in the remote cluster; where that was done, see the spokes' logs there: they dial %s", o.Name, o.Namespace, s.address)
	case with < s.Replicas:
		c.Status, c.Reason = metav1.ConditionTrue, reasonSomeHubs
		c.Message = fmt.Sprintf("spokes are connected to %d of %d hubs", with, s.Replicas)
	default:
		c.Status, c.Reason = metav1.ConditionTrue, reasonConnected
	}
	return c
}

// departedHubs takes out of statuses what hubs wrote that are not wanted any more. The
// authority stays: it is what hubs that come later must find.
func (r *round) departedHubs(ctx context.Context) error {
	type departure struct {
		id             model.ID
		pod, authority string
	}
	var list []departure
	for id, o := range r.seen.remotes {
		if !o.DeletionTimestamp.IsZero() {
			continue
		}
		s := r.remotes[id]
		for _, h := range o.Status.Hubs {
			number, ok := strings.CutPrefix(h.Name, workload.HubName(id.Name)+"-")
			n, err := strconv.Atoi(number)
			if ok && err == nil && (s == nil && !r.refused(id) || s != nil && n >= s.Replicas) {
				list = append(list, departure{id, h.Name, o.Status.Authority})
			}
		}
	}
	return each(ctx, list, func(ctx context.Context, d departure) error {
		u := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"authority": d.authority}}}
		u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(model.KindRemoteCluster))
		u.SetNamespace(d.id.Namespace)
		u.SetName(d.id.Name)
		err := r.Writer.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner("culvert-hub/"+d.pod), client.ForceOwnership)
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("status of RemoteCluster %s, of pod %s: %w", d.id, d.pod, err)
		}
		return nil
	})
}

// refused reports whether an object that may be running is not accepted now.
func (r *round) refused(id model.ID) bool {
	return len(r.problems[model.Ref{Kind: model.KindRemoteCluster, ID: id}]) > 0
}
