package cli

import (
	"context"
	"fmt"
	"io"
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
}

type objectStatus struct {
	Name      string           `json:"name"`
	Gateway   string           `json:"gateway"`
	Ready     string           `json:"ready"`
	Connected string           `json:"connected"`
	Since     *metav1.Time     `json:"since,omitempty"` // of Connected
	Endpoint  string           `json:"endpoint,omitempty"`
	Addresses []string         `json:"addresses"`
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
	s.Encryption, err = c.encryption(ctx)
	return s, err
}

func gatewayOf(o *v1alpha1.VPNGateway) gatewayStatus {
	g := gatewayStatus{
		Name: o.Namespace + "/" + o.Name, Address: o.Status.Address, PublicKey: o.Status.PublicKey,
		Ready: string(condition(o.Status.Conditions, v1alpha1.ConditionReady).Status), Problems: problemsOf(o.Status.Conditions),
	}
	for _, r := range o.Status.Replicas {
		g.Pods = append(g.Pods, gatewayPod{r.Name, r.NodeName, r.WireGuardDatapath, r.IPsecDatapath, r.MTU})
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
	return s.Encryption != nil && len(s.Encryption.Problems) > 0
}

func printClusterStatus(w io.Writer, s *clusterStatus, now time.Time) error {
	if len(s.Gateways)+len(s.Sites)+len(s.Devices) == 0 {
		if s.Encryption != nil {
			return printEncryption(w, s.Encryption, now)
		}
		_, err := fmt.Fprintln(w, "no VPNGateway, Site, Device or NodeEncryption")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var lines []string
	note := func(kind, name string, problems []conditionTexts) {
		for _, p := range problems {
			lines = append(lines, fmt.Sprintf("problem: %s %s: %s: %s: %s", kind, name, p.Type, p.Reason, p.Message))
		}
	}
	if len(s.Gateways) > 0 {
		fmt.Fprintln(t, "GATEWAY\tREADY\tADDRESS\tPODS\tPUBLIC KEY")
	}
	for _, g := range s.Gateways {
		var pods []string
		for _, p := range g.Pods {
			pods = append(pods, p.Name+"@"+orDash(p.Node))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", g.Name, g.Ready, orDash(g.Address), orDash(strings.Join(pods, ",")), orDash(g.PublicKey))
		note("VPNGateway", g.Name, g.Problems)
	}
	for _, kind := range []struct {
		title, kind string
		list        []objectStatus
	}{{"SITE", "Site", s.Sites}, {"DEVICE", "Device", s.Devices}} {
		if len(kind.list) == 0 {
			continue
		}
		fmt.Fprintf(t, "\n%s\tGATEWAY\tREADY\tSTATE\tSINCE\tENDPOINT\tADDRESSES\n", kind.title)
		for _, x := range kind.list {
			since := "-"
			if x.Since != nil {
				since = ago(now.Sub(x.Since.Time))
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Name, x.Gateway, x.Ready, upOrDown(x.Connected), since, orDash(x.Endpoint), orDash(strings.Join(x.Addresses, ",")))
			note(kind.kind, x.Name, x.Problems)
			if x.Connected == string(metav1.ConditionFalse) && x.Ready == string(metav1.ConditionTrue) && x.Message != "" {
				lines = append(lines, fmt.Sprintf("down: %s %s: %s", kind.kind, x.Name, x.Message))
			}
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(lines) > 0 {
		fmt.Fprintf(w, "\n%s\n", strings.Join(lines, "\n"))
	}
	if s.Encryption == nil {
		return nil
	}
	fmt.Fprintln(w)
	return printEncryption(w, s.Encryption, now)
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
