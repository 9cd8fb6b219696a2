package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/egress"
	"github.com/culvert-vpn/culvert/internal/reverse/identity"
	"github.com/culvert-vpn/culvert/internal/reverse/link"
	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/policy"
	"github.com/culvert-vpn/culvert/internal/reverse/spoke"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// MemberOptions are what "culvert spoke" and "culvert egress" share.
type MemberOptions struct {
	Common
	Invitation string // file; empty: joined already
	Keeper     Keeper
	Instance   string // how this one calls itself; empty: the host's name
	Least      int    // connections to each hub
	Most       int
}

// SpokeOptions are those of "culvert spoke".
type SpokeOptions struct {
	MemberOptions
	Policy string // file with the spoke's own targets; empty: the invitation's
}

// EgressOptions are those of "culvert egress".
type EgressOptions struct {
	MemberOptions
	Socket string      // path of the Unix socket; empty: none
	Mode   os.FileMode // of the socket
	Listen string      // loopback address:port; empty: none
}

// start joins, and makes what connecting to hubs needs.
func (o *MemberOptions) start(ctx context.Context, role pki.Role, protocol string) (*member, *link.Options, error) {
	m := &member{keeper: o.Keeper, dialer: &link.Dialer{}, logger: o.Logger}
	if err := m.enter(ctx, role, o.Invitation); err != nil {
		return nil, nil, err
	}
	if o.Instance == "" {
		o.Instance, _ = os.Hostname()
	}
	if o.Least < 1 || o.Most < o.Least || o.Most > 64 {
		return nil, nil, fmt.Errorf("%d to %d connections to each hub: use at least 1, at most 64", o.Least, o.Most)
	}
	return m, &link.Options{
		Dialer: m.dialer,
		TLS:    func(serverName string) *tls.Config { return identity.Dial(&m.holder, serverName, protocol) },
		Hello:  wire.Hello{Name: o.Instance, Version: process.Version()},
		Least:  o.Least, Most: o.Most, Logger: o.Logger,
	}, nil
}

// RunSpoke runs a spoke until ctx ends, and then lets open streams end for a while.
func RunSpoke(ctx context.Context, opts SpokeOptions) error {
	m, links, err := opts.start(ctx, pki.Spoke, wire.ALPNSpoke)
	if err != nil {
		return err
	}
	registry := process.NewRegistry()
	m.meter = meter.New(registry, "spoke", m.now.RemoteCluster)
	m.meter.Expires(m.holder.Get().Certificate.Leaf.NotAfter)
	links.Meter = m.meter
	s := spoke.New(spoke.Options{Links: *links, Hubs: m.now.Hubs, Logger: opts.Logger, Meter: m.meter})
	own, err := readPolicy(opts.Policy, m.now.Targets)
	if err != nil {
		return err
	}
	s.SetPolicy(own)
	g := process.NewGroup(ctx)
	name := m.now.RemoteCluster
	if err := opts.serveHTTP(g, registry, s.Ready, status(func() any {
		return map[string]any{"remoteCluster": name, "hubs": s.Hubs(), "exports": exportAddresses(s)}
	})); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	g.Go("spoke", s.Run)
	g.Go("renew", func(ctx context.Context) error { m.renew(ctx, s.Hubs, s.Renew); return nil })
	if opts.Policy != "" {
		g.Go("policy", func(ctx context.Context) error { followPolicy(ctx, opts, s.SetPolicy); return nil })
	}
	opts.Logger.Info("spoke runs", "remoteCluster", name, "instance", opts.Instance, "hubs", len(s.Hubs()))
	return g.Wait()
}

func exportAddresses(s *spoke.Spoke) map[string]string {
	out := map[string]string{}
	for name, a := range s.Exports() {
		out[name] = a.String()
	}
	return out
}

func status(get func() any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(get())
	})
}

// RunEgress runs an egress until ctx ends, and then lets open streams end for a while.
func RunEgress(ctx context.Context, opts EgressOptions) error {
	if opts.Socket == "" && opts.Listen == "" {
		return errors.New("nowhere to listen: give --socket or --listen")
	}
	m, links, err := opts.start(ctx, pki.Client, wire.ALPNClient)
	if err != nil {
		return err
	}
	registry := process.NewRegistry()
	m.meter = meter.New(registry, "egress", m.now.RemoteCluster)
	m.meter.Expires(m.holder.Get().Certificate.Leaf.NotAfter)
	links.Meter = m.meter
	e := egress.New(egress.Options{Links: *links, Hubs: m.now.Hubs, Meter: m.meter})
	g := process.NewGroup(ctx)
	name := m.now.RemoteCluster
	if err := serveEgress(ctx, g, e, opts); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	if err := opts.serveHTTP(g, registry, e.Ready, status(func() any {
		return map[string]any{"remoteCluster": name, "hubs": e.Hubs()}
	})); err != nil {
		g.Stop()
		return errors.Join(err, g.Wait())
	}
	g.Go("egress", e.Run)
	g.Go("renew", func(ctx context.Context) error { m.renew(ctx, e.Hubs, e.Renew); return nil })
	opts.Logger.Info("egress runs", "remoteCluster", name, "socket", opts.Socket, "listen", opts.Listen)
	return g.Wait()
}

func serveEgress(ctx context.Context, g *process.Group, e *egress.Egress, opts EgressOptions) error {
	if opts.Socket != "" {
		l, err := process.ListenUnix(ctx, opts.Socket, opts.Mode)
		if err != nil {
			return err
		}
		g.Go("socket", func(ctx context.Context) error { return e.Serve(ctx, l) })
	}
	if opts.Listen != "" {
		if err := loopbackOnly(opts.Listen); err != nil {
			return err
		}
		l, err := listenTCP(ctx, "clients", opts.Listen)
		if err != nil {
			return err
		}
		g.Go("listener", func(ctx context.Context) error { return e.Serve(ctx, l) })
	}
	return nil
}

// followEvery is how often a policy file is looked at.
const followEvery = 2 * time.Second

// followPolicy puts changes of the policy file into effect. One that cannot be read leaves
// the last good one.
func followPolicy(ctx context.Context, opts SpokeOptions, set func(*policy.Policy)) {
	var last os.FileInfo
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		info, err := os.Stat(opts.Policy)
		if err == nil && (last == nil || !os.SameFile(last, info) || !info.ModTime().Equal(last.ModTime()) || info.Size() != last.Size()) {
			last = info
			p, err := readPolicy(opts.Policy, nil)
			if err != nil {
				opts.Logger.Error("the last good policy stays in effect", "error", err)
			} else {
				set(p)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// readPolicy reads a spoke's own policy: the file's, written as spec.targets of a
// RemoteCluster is, or without a file the given targets.
func readPolicy(path string, targets []v1alpha1.RemoteTarget) (*policy.Policy, error) {
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
		var file struct {
			Targets []v1alpha1.RemoteTarget `json:"targets"`
		}
		if err := yaml.UnmarshalStrict(b, &file); err != nil {
			return nil, fmt.Errorf("policy %s: %w", path, err)
		}
		targets = file.Targets
	}
	var objects model.Objects
	objects.Add(model.Decoded{Object: &v1alpha1.RemoteCluster{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: model.KindRemoteCluster},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "policy"},
		Spec:       v1alpha1.RemoteClusterSpec{Targets: targets},
	}})
	parsed := model.Parse(objects, model.ParseOptions{})
	for _, p := range parsed.Problems {
		return nil, fmt.Errorf("policy %s: %s: %s", path, p.Field, p.Message)
	}
	p := policyOf(parsed.RemoteClusters[0].Targets)
	return &p, nil
}
