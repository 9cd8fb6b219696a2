package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// identityTimeout is how long the API server may take over the gateway's key.
const identityTimeout = 10 * time.Second

// Identity implements backing.
func (c *cluster) Identity(ctx context.Context, _ *model.Gateway) (id identity, err error) {
	if c.own == nil {
		return id, fmt.Errorf("there is no VPNGateway %s", c.opts.Gateway)
	}
	ctx, cancel := context.WithTimeout(ctx, identityTimeout)
	defer cancel()
	if k := c.kept; k != nil {
		return identity{private: k.PrivateKey, public: k.PublicKey, endpoints: maps.Clone(k.Endpoints)}, nil
	}
	if id.private, id.public, err = c.store.GatewayKey(ctx, c.own.UID); err != nil {
		return identity{}, err
	}
	if id.endpoints, err = c.store.Endpoints(ctx); err == nil {
		c.remains.identified(id)
	}
	return id, err
}

// Save implements backing: an API server keeps its objects itself.
func (c *cluster) Save() error { return nil }

// SaveEndpoints implements backing: in the background, the last ones win.
func (c *cluster) SaveEndpoints(m map[netstate.Key]netip.AddrPort) error {
	c.remains.moved(m)
	select {
	case <-c.save: // not written yet, and outdated
	default:
	}
	c.save <- maps.Clone(m)
	return nil
}

// saveEndpoints writes until ctx ends; what could not be written is tried again.
func (c *cluster) saveEndpoints(ctx context.Context) {
	failed := false
	for {
		var m map[netstate.Key]netip.AddrPort
		select {
		case <-ctx.Done():
			return
		case m = <-c.save:
		}
		for ctx.Err() == nil {
			err := c.saveOnce(ctx, m)
			if err == nil {
				failed = false
				break
			}
			if !failed && !errors.Is(err, context.Canceled) {
				c.log.Warn("cannot keep the peers' endpoints", "error", err)
			}
			failed = true
			select {
			case <-ctx.Done():
			case <-time.After(saveEvery):
			}
			select { // newer ones
			case m = <-c.save:
			default:
			}
		}
	}
}

func (c *cluster) saveOnce(ctx context.Context, m map[netstate.Key]netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, identityTimeout)
	defer cancel()
	uid, _ := c.uid.Load().(types.UID)
	return c.store.SaveEndpoints(ctx, uid, m)
}
