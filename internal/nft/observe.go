package nft

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/google/nftables"
)

// Observation is what the table has done since it was made or last replaced.
type Observation struct {
	// Present is whether the table is there. When it is not, the next SetFirewall and
	// SetServices make it again.
	Present bool
	// Dropped counts packets by reason: "spoofed" (from a tunnel's link with a source that
	// is none of its tunnels', or over the node link from an address that is no end of it), "denied" (not covered by the tunnel's access), "leak" (for
	// a tunnel, but about to leave through another link), "invalid" (unknown to connection
	// tracking). All reasons are always there.
	Dropped map[string]uint64
	// Rejected counts packets to service addresses where nothing answers.
	Rejected uint64
	// Services and Endpoints are what mode Translate has in the table, as of the last Set.
	Services, Endpoints int
}

// Observe reads the counters.
func (n *NFT) Observe(context.Context) (Observation, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o := Observation{Dropped: map[string]uint64{}}
	for _, c := range counters {
		if c != "rejected" {
			o.Dropped[c] = 0
		}
	}
	conn, err := nftables.New()
	if err != nil {
		return o, fmt.Errorf("observe nftables table %s: %w", Table, err)
	}
	objects, err := conn.GetObj(&nftables.CounterObj{Table: nftTable})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return o, fmt.Errorf("observe nftables table %s: %w", Table, err)
	}
	for _, obj := range objects {
		c, ok := obj.(*nftables.CounterObj)
		if !ok {
			continue
		}
		o.Present = true
		if c.Name == "rejected" {
			o.Rejected = c.Packets
		} else {
			o.Dropped[c.Name] = c.Packets
		}
	}
	o.Services = len(n.ports.byKey)
	for _, p := range n.ports.byKey {
		o.Endpoints += len(p.eps)
	}
	return o, nil
}
