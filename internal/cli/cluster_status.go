package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// clusterStatus is what "culvert status" says of a cluster.
type clusterStatus struct {
	Gateways []gatewayStatus `json:"gateways"`
	Sites    []objectStatus  `json:"sites"`
	Devices  []objectStatus  `json:"devices"`
	Remotes  []remoteStatus  `json:"remoteClusters"`
	Agents   []agentStatus   `json:"agents"`
	// Notes say what could not be found out, and why.
	Notes []string `json:"notes,omitempty"`
	// Encryption is that between the cluster's nodes; absent: none.
	Encryption *encryptionStatus `json:"encryption,omitempty"`
}

type gatewayStatus struct {
	Name      string           `json:"name"`
	Ready     string           `json:"ready"`
	Address   string           `json:"address,omitempty"`
	PublicKey string           `json:"publicKey,omitempty"`
	Pods      []gatewayPod     `json:"pods,omitempty"`
	Problems  []conditionTexts `json:"problems,omitempty"`
}

type gatewayPod struct {
	Name      string `json:"name"`
	Node      string `json:"node,omitempty"`
	WireGuard string `json:"wireguard,omitempty"`
	IPsec     string `json:"ipsec,omitempty"`
	MTU       int32  `json:"mtu,omitempty"`
	Active    bool   `json:"active"` // it works; others stand by
}

type objectStatus struct {
	Name      string           `json:"name"`
	Gateway   string           `json:"gateway"`
	Ready     string           `json:"ready"`
	Connected string           `json:"connected"`
	Since     *metav1.Time     `json:"since,omitempty"` // of Connected
	Endpoint  string           `json:"endpoint,omitempty"`
	Addresses []string         `json:"addresses"`
	Traffic   *traffic         `json:"traffic,omitempty"` // absent: not known
	Problems  []conditionTexts `json:"problems,omitempty"`
	// Message says why it is not connected.
	Message string `json:"message,omitempty"`
}

// conditionTexts is a condition that is not as it should be.
type conditionTexts struct {
	Type    string `json:"type"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (c *connection) status(ctx context.Context, namespace string) (*clusterStatus, error) {
	inv, err := c.inventory(ctx, namespace)
	if apierrors.IsForbidden(err) && namespace == "" { // not everybody sees all namespaces
		inv, err = c.inventory(ctx, c.namespace)
	}
	if err != nil {
		return nil, err
	}
	s := &clusterStatus{Gateways: []gatewayStatus{}, Sites: []objectStatus{}, Devices: []objectStatus{}}
	for i := range inv.gateways {
		s.Gateways = append(s.Gateways, gatewayOf(&inv.gateways[i]))
	}
	for i := range inv.sites {
		o := &inv.sites[i]
		x := objectOf(&o.ObjectMeta, o.Spec.GatewayRef, o.Status.Conditions)
		for _, r := range o.Spec.CIDRs {
			x.Addresses = append(x.Addresses, string(r))
		}
		for _, p := range o.Status.Paths {
			if x.Endpoint == "" || p.State == v1alpha1.PathUp {
				x.Endpoint = p.Endpoint
			}
		}
		s.Sites = append(s.Sites, x)
	}
	for i := range inv.devices {
		o := &inv.devices[i]
		x := objectOf(&o.ObjectMeta, o.Spec.GatewayRef, o.Status.Conditions)
		x.Addresses, x.Endpoint = append(x.Addresses, o.Status.Addresses...), o.Status.Endpoint
		s.Devices = append(s.Devices, x)
	}
	if err := c.complete(ctx, s, inv, namespace); err != nil {
		return nil, err
	}
	s.Encryption, err = c.encryption(ctx)
	return s, err
}

// complete adds what others than the gateways' objects say.
func (c *connection) complete(ctx context.Context, s *clusterStatus, inv inventory, namespace string) (err error) {
	var peers map[[2]string]*traffic
	peers, s.Notes = c.measured(ctx, inv.gateways)
	for kind, list := range map[string][]objectStatus{"site": s.Sites, "device": s.Devices} {
		for i := range list {
			list[i].Traffic = peers[[2]string{kind, list[i].Name}]
		}
	}
	if s.Remotes, err = c.remotes(ctx, namespace); err != nil {
		return err
	}
	s.Agents, err = c.agents(ctx)
	return err
}

func gatewayOf(o *v1alpha1.VPNGateway) gatewayStatus {
	g := gatewayStatus{
		Name: o.Namespace + "/" + o.Name, Address: o.Status.Address, PublicKey: o.Status.PublicKey,
		Ready: string(condition(o.Status.Conditions, v1alpha1.ConditionReady).Status), Problems: problemsOf(o.Status.Conditions),
	}
	for _, r := range o.Status.Replicas {
		active := slices.ContainsFunc(o.Status.Endpoints, func(e v1alpha1.GatewayEndpoint) bool { return e.Pod == r.Name && e.Active })
		g.Pods = append(g.Pods, gatewayPod{r.Name, r.NodeName, r.WireGuardDatapath, r.IPsecDatapath, r.MTU, active})
	}
	return g
}

func objectOf(o *metav1.ObjectMeta, ref v1alpha1.GatewayReference, conditions []metav1.Condition) objectStatus {
	ns := ref.Namespace
	if ns == "" {
		ns = o.Namespace
	}
	connected := condition(conditions, v1alpha1.ConditionConnected)
	x := objectStatus{
		Name: o.Namespace + "/" + o.Name, Gateway: ns + "/" + ref.Name, Addresses: []string{},
		Ready: string(condition(conditions, v1alpha1.ConditionReady).Status), Connected: string(connected.Status),
		Problems: problemsOf(conditions),
	}
	if !connected.LastTransitionTime.IsZero() {
		x.Since = &connected.LastTransitionTime
	}
	if connected.Status != metav1.ConditionTrue {
		x.Message = connected.Message
	}
	return x
}

// problemsOf are the conditions that need somebody; a peer that is away is none.
func problemsOf(conditions []metav1.Condition) []conditionTexts {
	var out []conditionTexts
	said := map[string]bool{}
	for _, name := range []string{v1alpha1.ConditionAccepted, v1alpha1.ConditionResolvedRefs, v1alpha1.ConditionProgrammed, v1alpha1.ConditionReady} {
		c := condition(conditions, name)
		if c.Status == metav1.ConditionFalse && !said[c.Message] {
			said[c.Message] = true
			out = append(out, conditionTexts{c.Type, c.Reason, c.Message})
		}
	}
	return out
}

// bad reports whether anything is refused or not in effect.
func (s *clusterStatus) bad() bool {
	for _, g := range s.Gateways {
		if len(g.Problems) > 0 {
			return true
		}
	}
	for _, list := range [][]objectStatus{s.Sites, s.Devices} {
		for _, x := range list {
			if len(x.Problems) > 0 {
				return true
			}
		}
	}
	for _, r := range s.Remotes {
		if len(r.Problems) > 0 {
			return true
		}
	}
	return s.Encryption != nil && len(s.Encryption.Problems) > 0
}

func printClusterStatus(w io.Writer, s *clusterStatus, now time.Time) error {
	if len(s.Gateways)+len(s.Sites)+len(s.Devices)+len(s.Remotes) == 0 {
		if s.Encryption != nil {
			return printEncryption(w, s.Encryption, now)
		}
		_, err := fmt.Fprintln(w, "no VPNGateway, Site, Device, RemoteCluster or NodeEncryption")
		return err
	}
	p := statusPrinter{Writer: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), now: now}
	p.gateways(s.Gateways)
	p.objects("SITE", "Site", s.Sites)
	p.objects("DEVICE", "Device", s.Devices)
	p.remotes(s.Remotes)
	printAgents(p, s.Agents)
	for _, n := range s.Notes {
		p.lines = append(p.lines, "note: "+n)
	}
	if err := p.Flush(); err != nil {
		return err
	}
	if len(p.lines) > 0 {
		fmt.Fprintf(w, "\n%s\n", strings.Join(p.lines, "\n"))
	}
	if s.Encryption == nil {
		return nil
	}
	fmt.Fprintln(w)
	return printEncryption(w, s.Encryption, now)
}

// statusPrinter prints tables, and keeps what is to be said below them.
type statusPrinter struct {
	*tabwriter.Writer
	now   time.Time
	lines []string
}

func (p *statusPrinter) note(kind, name string, problems []conditionTexts) {
	for _, x := range problems {
		p.lines = append(p.lines, fmt.Sprintf("problem: %s %s: %s: %s: %s", kind, name, x.Type, x.Reason, x.Message))
	}
}

// down says why a peer is away that nothing is wrong with.
func (p *statusPrinter) down(kind, name, connected, ready, message string) {
	if connected == string(metav1.ConditionFalse) && ready == string(metav1.ConditionTrue) && message != "" {
		p.lines = append(p.lines, fmt.Sprintf("down: %s %s: %s", kind, name, message))
	}
}

func (p *statusPrinter) since(t *metav1.Time) string {
	if t == nil {
		return "-"
	}
	return ago(p.now.Sub(t.Time))
}

func (p *statusPrinter) gateways(list []gatewayStatus) {
	if len(list) > 0 {
		fmt.Fprintln(p, "GATEWAY\tREADY\tADDRESS\tPODS\tPUBLIC KEY")
	}
	for _, g := range list {
		var pods []string
		for _, x := range g.Pods {
			pod := x.Name + "@" + orDash(x.Node)
			if len(g.Pods) > 1 && x.Active {
				pod += "*"
			}
			pods = append(pods, pod)
		}
		fmt.Fprintf(p, "%s\t%s\t%s\t%s\t%s\n", g.Name, g.Ready, orDash(g.Address), orDash(strings.Join(pods, ",")), orDash(g.PublicKey))
		p.note("VPNGateway", g.Name, g.Problems)
	}
}

func (p *statusPrinter) objects(title, kind string, list []objectStatus) {
	if len(list) > 0 {
		fmt.Fprintf(p, "\n%s\tGATEWAY\tREADY\tSTATE\tSINCE\tHANDSHAKE\tRECEIVED\tSENT\tLATENCY\tENDPOINT\tADDRESSES\n", title)
	}
	for _, x := range list {
		handshake, received, sent, latency := x.Traffic.texts(p.now)
		fmt.Fprintln(p, strings.Join([]string{
			x.Name, x.Gateway, x.Ready, upOrDown(x.Connected), p.since(x.Since), handshake, received, sent, latency,
			orDash(x.Endpoint), orDash(strings.Join(x.Addresses, ",")),
		}, "\t"))
		p.note(kind, x.Name, x.Problems)
		p.down(kind, x.Name, x.Connected, x.Ready, x.Message)
	}
}

func (p *statusPrinter) remotes(list []remoteStatus) {
	if len(list) > 0 {
		fmt.Fprintln(p, "\nREMOTE CLUSTER\tREADY\tSTATE\tSINCE\tHUBS\tSPOKES")
	}
	for _, x := range list {
		fmt.Fprintf(p, "%s\t%s\t%s\t%s\t%d\t%s\n", x.Name, x.Ready, upOrDown(x.Connected), p.since(x.Since), x.Hubs, orDash(strings.Join(x.Spokes, ",")))
		p.note("RemoteCluster", x.Name, x.Problems)
		p.down("RemoteCluster", x.Name, x.Connected, x.Ready, x.Message)
	}
}

func upOrDown(status string) string {
	switch metav1.ConditionStatus(status) {
	case metav1.ConditionTrue:
		return "up"
	case metav1.ConditionFalse:
		return "down"
	}
	return "unknown"
}

// runClusterStatus prints the status of a namespace, or of all when none is named.
func runClusterStatus(cmd *cobra.Command, flags *clusterFlags, out *output) error {
	c, err := flags.connect()
	if err != nil {
		return err
	}
	s, err := c.status(cmd.Context(), flags.namespace)
	if err != nil {
		return err
	}
	if err := out.print(cmd.OutOrStdout(), s, func(w io.Writer) error { return printClusterStatus(w, s, time.Now()) }); err != nil {
		return err
	}
	if s.bad() {
		return errNo
	}
	return nil
}
