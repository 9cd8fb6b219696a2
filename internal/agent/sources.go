package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
)

// Cilium verifies sources again whenever its agent restarts, and tells nobody.
const (
	lookAtSources = 250 * time.Millisecond
	undoTimeout   = 3 * time.Second // for what is taken back when the agent is removed
)

// sources has Cilium let pass what the gateway pods of this node send with the addresses of sites
// and devices, for gateways with nodeLink: CiliumEndpoint: for the active pods of those, and
// for no longer than they are.
type sources struct {
	socket *cilium.Socket // nil: Cilium cannot be told
	log    *slog.Logger

	mu     sync.Mutex
	lift   map[sender]bool // those whose sources are not to be verified
	lifted map[sender]bool // those for which that was said, or may have been by an earlier process
	known  map[sender]bool // this node's gateway pods, as they were last named
	failed map[sender]error
}

// sender is a gateway's pod.
type sender struct {
	namespace, pod string
	ip             netip.Addr
}

func newSources(socket string, log *slog.Logger) *sources {
	s := &sources{log: log, lifted: map[sender]bool{}, failed: map[sender]error{}}
	if socket != "" {
		s.socket = cilium.NewSocket(socket)
	}
	return s
}

var errNoSocket = errors.New("nodeLink CiliumEndpoint needs the socket of Cilium's agent (--cilium-socket): install the chart with cilium.enabled=true, or set nodeLink to Encapsulated")

// set names the pods, and returns what went wrong with the ones of before.
func (s *sources) set(n node) (changed int, err error) {
	lift, known := map[sender]bool{}, map[sender]bool{}
	for _, gw := range n.model.Gateways {
		for _, pod := range n.facts.Pods[gw.ID] {
			if pod.Node != n.facts.Node.Name || len(pod.PodIPs) == 0 {
				continue
			}
			x := sender{gw.Namespace, pod.Name, pod.PodIPs[0]}
			known[x] = true
			if pod.Active && len(plan.BehindGateway(gw)) > 0 {
				lift[x] = true
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range known {
		if !s.known[x] && !lift[x] {
			s.lifted[x] = true // a change while no agent ran is not to leave them unverified
		}
	}
	s.lift, s.known = lift, known
	if s.socket == nil && len(lift) > 0 {
		return 0, errNoSocket
	}
	for x := range s.failed {
		if !lift[x] && !s.lifted[x] {
			delete(s.failed, x)
		}
	}
	return 0, s.errors()
}

// errors are those that stand, in one order.
func (s *sources) errors() error {
	return errors.Join(slices.SortedFunc(maps.Values(s.failed), func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })...)
}

// run keeps it so until ctx ends. What was said to Cilium holds then.
func (s *sources) run(ctx context.Context) error {
	if s.socket == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(lookAtSources)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			s.settle(ctx)
		}
	}
}

// settle says to Cilium what it does not know.
func (s *sources) settle(ctx context.Context) {
	s.mu.Lock()
	todo := maps.Clone(s.lift)
	for x := range s.lifted {
		todo[x] = s.lift[x]
	}
	s.mu.Unlock()
	for x, lift := range todo {
		changed, err := s.socket.VerifySources(ctx, x.namespace, x.pod, x.ip, !lift)
		if ctx.Err() != nil {
			return
		}
		if !lift && errors.Is(err, cilium.ErrNoEndpoint) {
			err = nil // the pod is gone
		}
		if changed {
			s.log.Info("told Cilium whether to verify the sources of a gateway's pod", "pod", model.ID{Namespace: x.namespace, Name: x.pod}, "verify", !lift)
		}
		s.mu.Lock()
		switch {
		case err != nil:
			s.failed[x] = err
		case lift:
			s.lifted[x] = true
			delete(s.failed, x)
		default:
			delete(s.lifted, x)
			delete(s.failed, x)
		}
		s.mu.Unlock()
	}
}

// remove has Cilium verify all sources again.
func (s *sources) remove() error {
	if s.socket == nil {
		return nil
	}
	s.mu.Lock()
	s.lift = nil
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	s.settle(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lifted) == 0 {
		return nil
	}
	return s.errors()
}
