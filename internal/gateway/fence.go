package gateway

import (
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

// Fence takes the WireGuard device down that a gateway process has left which cannot do so
// any more, so that another pod can answer the peers.
func Fence() error { return wireguard.Remove(plan.WireGuardLink) }
