package tunnel

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/source/manifests"
)

// open finds the RemoteCluster and its state.
func open(opts HubOptions) (*model.RemoteCluster, *State, string, error) {
	if opts.Manifests == "" {
		return nil, nil, "", fmt.Errorf("--manifests is missing: the directory with the RemoteCluster")
	}
	c, err := FindRemoteCluster(manifests.NewFiles(opts.Manifests), opts.Name)
	if err != nil {
		return nil, nil, "", err
	}
	s, err := OpenState(opts.State, c.ID)
	if err != nil {
		return nil, nil, "", err
	}
	uid, err := s.UID(c.UID)
	return c, s, uid, err
}

// Invite makes an invitation for a spoke or client of that name.
func Invite(opts HubOptions, role pki.Role, name string) (*Invitation, error) {
	c, s, uid, err := open(opts)
	if err != nil {
		return nil, err
	}
	spokes, clients, err := addressesFor(c, uid, opts)
	if err != nil {
		return nil, err
	}
	if role == pki.Spoke {
		clients = spokes
	}
	return s.Invite(c, pki.Identity{UID: uid, Role: role, Name: name}, clients)
}

// Invite makes an invitation for whom the identity names; hubs is where these reach them.
func (s *State) Invite(c *model.RemoteCluster, id pki.Identity, hubs []wire.HubAddress) (*Invitation, error) {
	now := time.Now()
	token, trusted, err := s.NewToken(id, now)
	if err != nil {
		return nil, err
	}
	i := &Invitation{
		RemoteCluster: c.ID.String(), UID: id.UID, Role: id.Role, Name: id.Name, Hubs: hubs,
		Authorities: EncodeAuthorities(trusted), Token: token, Expires: now.Add(pki.TokenLifetime).UTC().Truncate(time.Second),
	}
	if id.Role == pki.Spoke {
		i.Targets = targetsOf(c)
	}
	return i, nil
}

// targetsOf writes parsed targets as they stand in a manifest.
func targetsOf(c *model.RemoteCluster) []v1alpha1.RemoteTarget {
	var out []v1alpha1.RemoteTarget
	for _, t := range c.Targets {
		var x v1alpha1.RemoteTarget
		for _, p := range t.CIDRs {
			x.CIDRs = append(x.CIDRs, v1alpha1.CIDR(netip.Prefix.String(p)))
		}
		for _, n := range t.Names {
			x.Names = append(x.Names, v1alpha1.TargetName(n))
		}
		for _, p := range t.Ports {
			port := v1alpha1.TargetPort{Port: int32(p.First)}
			if p.Last != p.First {
				end := int32(p.Last)
				port.EndPort = &end
			}
			x.Ports = append(x.Ports, port)
		}
		out = append(out, x)
	}
	return out
}

// IssueClient writes a client's certificate and key into a directory.
func IssueClient(opts HubOptions, name, dir string) error {
	_, s, uid, err := open(opts)
	if err != nil {
		return err
	}
	pair, trusted, err := s.Issue(pki.Identity{UID: uid, Role: pki.Client, Name: name}, time.Now())
	if err != nil {
		return err
	}
	return WritePair(dir, pair, EncodeAuthorities(trusted))
}

// Revoke takes the certificates of a spoke or client back.
func Revoke(opts HubOptions, role pki.Role, name string) error {
	_, s, _, err := open(opts)
	if err != nil {
		return err
	}
	return s.Revoke(role, name, time.Now())
}
