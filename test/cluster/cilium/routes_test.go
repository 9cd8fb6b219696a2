package cilium_test

import (
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// TestCiliumEndpointRoutes is both node links with endpoint routes beside kube-proxy.
func TestCiliumEndpointRoutes(t *testing.T) {
	if labtest.Goal(1, 0) == 0 {
		t.Skip("CULVERT_GOALS=1 runs it: it has a cluster of its own, and endpoint routes are nobody's default")
	}
	w := newWorld(t, []string{endpointRoutes}, "--set", "cilium.enabled=true")
	w.cell(t, cell{"endpoint routes, kube-proxy, tunnel", nil}, false)
	t.Run("node link CiliumEndpoint", w.endpointsWay)
}
