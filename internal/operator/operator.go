// Package operator turns the objects in an API server into workloads, addresses, rights
// and conditions.
//
// It works in rounds: one look at everything that is cached, one decision (model.Parse),
// then the writes that are missing. A round that is cut off anywhere is completed by the
// next one, whoever runs it: what must be unique is made so by the API server, and nothing
// is remembered that is not also to be found there. It must not know how a gateway works.
package operator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// Manager is the field manager of everything that the operator applies.
const Manager = "culvert-operator"

// Config is what a round needs. Cached, Live and Writer may be one client.
type Config struct {
	Cached client.Reader // may lag behind
	Live   client.Reader // asks the API server
	Writer client.Client
	// ServiceCIDRs says that the API server has the kind (Kubernetes 1.33).
	ServiceCIDRs bool
	Workload     workload.Options
	Tunnel       Tunnel // what becomes of RemoteClusters
	// ServiceAccount is the operator's own: it grants itself single Secrets. No name: it
	// needs no grant.
	ServiceAccount model.ID
	// Behind is told, each round, which ranges lie behind which gateway pod, and which ones
	// nobody may masquerade; nil: nobody is told.
	Behind func(pods []cilium.Endpoint, unmasqueraded []netip.Prefix)
	// Event tells people of a transition; nil: nobody.
	Event  func(o runtime.Object, warning bool, reason, message string)
	Logger *slog.Logger
	Now    func() time.Time // nil: time.Now
}

// Operator runs rounds, one at a time. Make it with New.
type Operator struct {
	Config
	scheme *runtime.Scheme
	good   source.Incumbents
	// What was done and may not be in the cache yet. It saves writes, never decides.
	applied  map[objectKey]appliedObject
	statuses map[types.UID]appliedObject
	claimed  map[string]recentClaim // by namespace/name of the Lease
	devices  map[types.UID]deviceKeys
	forgotAt time.Time
	// fallback are the ranges that were worked out from the kubernetes Service.
	fallback fallbackRanges
	written  writtenTable            // of the front
	waiting  bool                    // for something that no event tells of
	doubts   map[departure]time.Time // since when a pod's word is in doubt
	quiet    map[model.ID]time.Time  // since when a gateway has had no ready pod
	process  string                  // of this process alone
	left     map[string]bool         // namespaces that are gone and left objects behind; said once
	metrics  remoteMetrics
}

// forgetAfter is how long what was done is believed without looking again.
const forgetAfter = 10 * time.Minute

// New makes an Operator.
func New(c Config) *Operator {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Event == nil {
		c.Event = func(runtime.Object, bool, string, string) {}
	}
	o := &Operator{Config: c, scheme: c.Writer.Scheme(), claimed: map[string]recentClaim{}, doubts: map[departure]time.Time{}, left: map[string]bool{}, process: processName()}
	o.forget()
	return o
}

func (o *Operator) forget() {
	o.applied, o.statuses = map[objectKey]appliedObject{}, map[types.UID]appliedObject{}
	o.devices = map[types.UID]deviceKeys{}
	o.forgotAt = o.Now()
}

// round is what the steps of one round share.
type round struct {
	*Operator
	seen     *snapshot
	found    model.ClusterRanges
	model    *model.Model
	problems map[model.Ref][]model.Problem
	kept     map[model.Ref]bool
	gateways map[model.ID]*gatewayState // accepted ones
	devices  map[model.ID]*deviceState  // of accepted gateways, accepted
	remotes  map[model.ID]*remoteState  // accepted ones that have hubs
	desired  map[objectKey]bool         // everything that is to exist
	// ungranted holds the namespaces (string) in which a grant of the operator's own did not come
	// into effect in time.
	ungranted sync.Map
}

// gatewayState is an accepted gateway and what came of it.
type gatewayState struct {
	*model.Gateway
	uid     types.UID
	address string // where the far sides dial; empty: not known
	port    uint16 // there; 0: not known
	link    string // the node link in use; empty: none
	// still is what is to be said of one that stands still; nil: it does not.
	still *metav1.Condition
}

// deviceState is an accepted device and what came of it.
type deviceState struct {
	*model.Device
	uid       types.UID
	gateway   *gatewayState
	addresses []string
	publicKey string
	secret    string         // name of the Secret with its configuration
	refused   *model.Problem // it has no address
	waiting   *model.Problem // something that it refers to is missing
	undecided bool           // a write failed: its status stays as it is
}

// Round looks at everything once and writes what is missing. It goes on after an error;
// the errors are of all steps. The round is to be repeated then.
func (o *Operator) Round(ctx context.Context) error {
	if o.Now().Sub(o.forgotAt) > forgetAfter {
		o.forget()
	}
	seen, err := o.gather(ctx)
	if err != nil {
		return err // with half of the picture, nothing is decided
	}
	if err := o.findOwner(ctx); err != nil {
		return err
	}
	r := &round{Operator: o, seen: seen, desired: map[objectKey]bool{}}
	if r.found, err = o.ranges(ctx, seen); err != nil {
		return err
	}
	r.parse()
	r.decideLinks(ctx)
	r.tellCilium()
	o.waiting = false
	if err := r.findRemotes(ctx); err != nil {
		return err
	}
	r.tellMetrics()
	var errs []error
	for _, step := range []func(context.Context) error{
		r.orphanedClaims, // addresses of devices that are gone
		r.claims,         // an address for each device
		r.grants,         // who may read which Secret: before anybody needs it
		r.workloads,      // what gateways consist of
		r.hubs,           // what the hubs of remote clusters consist of
		r.routes,         // the front's table
		r.deviceSecrets,  // key pairs and configurations
		r.standstill,     // gateways that cannot say it themselves
		r.status,         // what people see, and what gateways read
		r.departed,       // what pods said that are gone for good
		r.departedHubs,   // and what hubs said
		r.releasedClaims, // addresses that no status shows any more
		r.prune,          // what nobody asks for any more
	} {
		if err := step(ctx); err != nil {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.Join(errs...)
}

// findOwner looks for what everything that runs belongs to: the ClusterRole of gateways,
// which comes and goes with the installation.
func (o *Operator) findOwner(ctx context.Context) error {
	if o.Workload.ClusterRole == "" {
		return nil
	}
	var role rbacv1.ClusterRole
	err := o.Live.Get(ctx, types.NamespacedName{Name: o.Workload.ClusterRole}, &role)
	switch {
	case apierrors.IsNotFound(err):
		o.Workload.Owner = nil
	case err != nil:
		return fmt.Errorf("look for ClusterRole %s: %w", o.Workload.ClusterRole, err)
	default:
		o.Workload.Owner = &metav1.OwnerReference{
			APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRole", Name: role.Name, UID: role.UID,
		}
	}
	return nil
}

// parse decides what is in effect.
func (r *round) parse() {
	opts := model.ParseOptions{
		APIServers: r.seen.apiServers, Found: r.found,
		InEffect: model.InEffect(r.seen.objects), SecretsElsewhere: true,
	}
	m, problems, kept := r.good.Parse(r.seen.objects, opts)
	r.model, r.kept = m, kept
	r.problems = map[model.Ref][]model.Problem{}
	for _, p := range problems {
		ref := model.Ref{Kind: p.Kind, ID: p.Object}
		r.problems[ref] = append(r.problems[ref], p)
	}
	r.gateways, r.devices = map[model.ID]*gatewayState{}, map[model.ID]*deviceState{}
	for _, gw := range m.Gateways {
		o, ok := r.seen.gateways[gw.ID]
		if !ok {
			continue
		}
		g := &gatewayState{Gateway: gw, uid: o.UID}
		r.gateways[gw.ID] = g
		r.dialAddress(g, o)
		for _, d := range gw.Devices {
			if x, ok := r.seen.devices[d.ID]; ok {
				r.devices[d.ID] = &deviceState{Device: d, uid: x.UID, gateway: g}
			}
		}
	}
}
