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
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/model"
)

// encryptionStatus is what "culvert status" says of the encryption between nodes.
type encryptionStatus struct {
	Scope       string `json:"scope"`
	Enforcement string `json:"enforcement"`
	Ready       string `json:"ready"`
	Enforced    string `json:"enforced"`
	Message     string `json:"message,omitempty"` // of Ready, or of Enforced when that is what is missing
	// ReadyNodes answer all others and are answered by them, of TotalNodes.
	ReadyNodes int32 `json:"readyNodes"`
	TotalNodes int32 `json:"totalNodes"`
	// Exempt is what passes in the clear, beside WireGuard itself and what neighbours need.
	Exempt   []string         `json:"exempt"`
	Nodes    []nodeStatus     `json:"nodes"`
	Problems []conditionTexts `json:"problems,omitempty"`
}

type nodeStatus struct {
	Name      string                 `json:"name"`
	Peers     int32                  `json:"peers"`
	Connected int32                  `json:"connected"`
	Key       string                 `json:"key"`
	NextKey   string                 `json:"nextKey,omitempty"`
	Silent    []v1alpha1.SilentPeer  `json:"silent,omitempty"`
	Plain     []v1alpha1.PlainPacket `json:"plain,omitempty"`
}

// encryption asks about the encryption between nodes; nil when there is none, or it is not
// for the asker's eyes: what has no namespace not everybody sees.
func (c *connection) encryption(ctx context.Context) (*encryptionStatus, error) {
	var all v1alpha1.NodeEncryptionList
	var tunnels v1alpha1.NodeTunnelList
	err := c.List(ctx, &all)
	if err == nil && len(all.Items) > 0 {
		err = c.List(ctx, &tunnels)
	}
	if apierrors.IsForbidden(err) || err == nil && len(all.Items) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain(err)
	}
	return encryptionOf(&all.Items[0], tunnels.Items), nil
}

func encryptionOf(o *v1alpha1.NodeEncryption, tunnels []v1alpha1.NodeTunnel) *encryptionStatus {
	ready, enforced := condition(o.Status.Conditions, v1alpha1.ConditionReady), condition(o.Status.Conditions, model.ConditionEnforced)
	s := &encryptionStatus{
		Scope: string(o.Spec.Scope), Enforcement: string(o.Spec.Enforcement), Ready: string(ready.Status), Enforced: string(enforced.Status),
		ReadyNodes: o.Status.ReadyNodes, TotalNodes: o.Status.TotalNodes, Exempt: []string{}, Nodes: []nodeStatus{},
		Problems: problemsOf(o.Status.Conditions),
	}
	if o.Spec.Enforcement == v1alpha1.EnforcementStrict && enforced.Status != metav1.ConditionTrue {
		s.Message = enforced.Message
	}
	for i := range tunnels {
		t := &tunnels[i]
		s.Exempt = append(s.Exempt, t.Status.Exemptions...)
		s.Nodes = append(s.Nodes, nodeStatus{
			Name: t.Name, Peers: t.Status.Peers, Connected: t.Status.ConnectedPeers, Key: string(t.Spec.PublicKey), NextKey: string(t.Spec.NextPublicKey),
			Silent: t.Status.SilentPeers, Plain: t.Status.PlainPackets,
		})
		for _, kind := range []string{v1alpha1.ConditionReady, model.ConditionPodsHeld} {
			if c := meta.FindStatusCondition(t.Status.Conditions, kind); c != nil && c.Status == metav1.ConditionFalse {
				s.Problems = append(s.Problems, conditionTexts{"NodeTunnel " + t.Name, c.Reason, c.Message})
			}
		}
	}
	slices.Sort(s.Exempt)
	s.Exempt = slices.Compact(s.Exempt)
	return s
}

func printEncryption(w io.Writer, s *encryptionStatus, now time.Time) error {
	enforced := ""
	if s.Enforcement == string(v1alpha1.EnforcementStrict) {
		enforced = ", enforced: " + s.Enforced
	}
	fmt.Fprintf(w, "Encryption between nodes: %d of %d nodes ready (scope %s, %s%s)\n", s.ReadyNodes, s.TotalNodes, s.Scope, s.Enforcement, enforced)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tPEERS\tANSWER\tKEY")
	var lines []string
	for _, n := range s.Nodes {
		key := n.Key
		if n.NextKey != "" {
			key += " (changing)"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", n.Name, n.Peers, n.Connected, key)
		for _, p := range n.Silent {
			last := "never"
			if p.LastHandshakeTime != nil {
				last = ago(now.Sub(p.LastHandshakeTime.Time))
			}
			lines = append(lines, fmt.Sprintf("silent: %s hears nothing from %s: last handshake %s", n.Name, p.Node, last))
		}
		for _, p := range n.Plain {
			did := "let through"
			if p.Dropped {
				did = "dropped"
			}
			lines = append(lines, fmt.Sprintf("%s: %s: %s (%s), first from %s to %s protocol %d, %s",
				did, n.Name, guard.Describe(p.Kind), p.Kind, p.Source, p.Destination, p.Protocol, ago(now.Sub(p.Time.Time))))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, x := range s.Exempt {
		lines = append(lines, "exempt: "+x)
	}
	if s.Message != "" {
		lines = append(lines, "waits: "+s.Message)
	}
	for _, p := range s.Problems {
		lines = append(lines, fmt.Sprintf("problem: %s: %s: %s", p.Type, p.Reason, p.Message))
	}
	if len(lines) == 0 {
		return nil
	}
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}
