package agent

import "github.com/culvert-vpn/culvert/internal/cni"

// chain is our plug-in's place behind the node's network plug-in; on a node of which nobody
// said where that is configured it does nothing.
type chain struct{ *cni.Chain }

func newChain(o *cni.Options) *chain {
	if o == nil {
		return &chain{}
	}
	return &chain{cni.New(*o)}
}

func (c *chain) Set(want bool) (int, error) {
	if c.Chain == nil {
		return 0, nil
	}
	return c.Chain.Set(want)
}

func (c *chain) Changes() <-chan struct{} {
	if c.Chain == nil {
		return nil
	}
	return c.Chain.Changes()
}

func (c *chain) Close() {
	if c.Chain != nil {
		_ = c.Chain.Close()
	}
}
