package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// maxExemptions is how many exemptions a NodeTunnel lists.
const maxExemptions = 128

func exemptions(list []netstate.Exemption) []string {
	var out []string
	for _, x := range list {
		out = append(out, x.String())
	}
	slices.Sort(out)
	out = slices.Compact(out)
	return out[:min(len(out), maxExemptions)]
}

// plainPackets are the kinds of packets in the clear of the last minutes, with the first of
// each: what was reported before stays as it was.
func (e *encryption) plainPackets(before []v1alpha1.PlainPacket, strict bool) []v1alpha1.PlainPacket {
	var out []v1alpha1.PlainPacket
	has := func(list []v1alpha1.PlainPacket, kind string) int {
		return slices.IndexFunc(list, func(p v1alpha1.PlainPacket) bool { return p.Kind == kind })
	}
	for _, p := range e.plain.Seen {
		if has(out, p.Kind) >= 0 {
			continue
		}
		if i := has(before, p.Kind); i >= 0 && before[i].Dropped == strict {
			out = append(out, before[i])
			continue
		}
		out = append(out, v1alpha1.PlainPacket{
			Kind: p.Kind, Source: p.From.String(), Destination: p.To.String(), Protocol: int32(p.Protocol),
			Dropped: strict, Time: metav1.Time{Time: time.Now().Truncate(time.Second)},
		})
	}
	slices.SortFunc(out, func(a, b v1alpha1.PlainPacket) int { return cmp.Compare(a.Kind, b.Kind) })
	return out
}

// announce logs the first packet of each kind and makes an event of it, once until it has been
// quiet for a while.
func (e *encryption) announce(ctx context.Context, own *v1alpha1.NodeTunnel, list []v1alpha1.PlainPacket) {
	told := map[string]bool{}
	for _, p := range list {
		key := fmt.Sprint(p.Kind, p.Dropped)
		told[key] = true
		if e.told[key] || slices.Contains(own.Status.PlainPackets, p) { // by the agent before this one
			continue
		}
		e.log.Warn("plain packets between nodes", "dropped", p.Dropped, "kind", p.Kind, "from", p.Source, "to", p.Destination,
			"protocol", p.Protocol, "packets", e.plain.Dropped[p.Kind])
		if err := e.event(ctx, own, p); err != nil {
			e.log.Warn("cannot write an event", "error", err)
		}
	}
	e.told = told
}

func (e *encryption) event(ctx context.Context, own *v1alpha1.NodeTunnel, p v1alpha1.PlainPacket) error {
	now := metav1.NowMicro()
	reason, action := "PlainPacketSeen", "Count"
	if p.Dropped {
		reason, action = "PlainPacketDropped", "Drop"
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return e.cluster.Apply(ctx, map[string]any{
		"apiVersion": eventsv1.SchemeGroupVersion.String(), "kind": "Event",
		"metadata":  map[string]any{"namespace": metav1.NamespaceDefault, "name": fmt.Sprintf("%s.%x", e.node, now.UnixNano())},
		"eventTime": now.UTC().Format(metav1.RFC3339Micro), "reportingController": "culvert.dev/agent", "reportingInstance": e.node,
		"regarding": map[string]any{"apiVersion": v1alpha1.GroupVersion.String(), "kind": "NodeTunnel", "name": own.Name, "uid": string(own.UID)},
		"type":      "Warning", "action": action, "reason": reason,
		"note": fmt.Sprintf("%s (%s): from %s to %s, protocol %d", guard.Describe(p.Kind), p.Kind, p.Source, p.Destination, p.Protocol),
	}, "")
}
