package operator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// Options are what "culvert operator" is told.
type Options struct {
	Rest      *rest.Config
	Namespace string // of the leader's Lease
	// NoLeaderElection runs at once, for tests and for a terminal.
	NoLeaderElection bool
	Workload         workload.Options
	Tunnel           Tunnel   // what becomes of RemoteClusters
	ServiceAccount   model.ID // the operator's own, see Config
	Cilium           bool     // tell Cilium of gateways with nodeLink: CiliumEndpoint
	HTTP             string   // address of health and metrics; empty: none
	PProf            bool
	Logger           *slog.Logger
}

// LeaderLease is the name of the Lease that one of several operators holds.
const LeaderLease = "culvert-operator"

// Times of the leader's Lease. A leader that dies without giving it up is followed within
// the first of them.
const (
	leaseDuration = 15 * time.Second
	leaseRenewal  = 10 * time.Second
	leaseRetry    = 2 * time.Second
)

// Pace of the rounds.
const (
	gatherPause = 50 * time.Millisecond // events that come together are answered together
	retryFirst  = 100 * time.Millisecond
	retryLast   = 30 * time.Second
	lookAgain   = time.Minute     // without any event
	lookSoon    = 3 * time.Second // while something is awaited that no event tells of
)

// Requests per second and at once: a thousand devices that come at once take three each.
const (
	queriesPerSecond = 500
	queryBurst       = 1000
)

// NewScheme holds the types that the operator reads and writes.
func NewScheme() (*runtime.Scheme, error) {
	s, err := kube.NewScheme()
	if err != nil {
		return nil, err
	}
	for _, add := range []func(*runtime.Scheme) error{
		appsv1.AddToScheme, policyv1.AddToScheme, rbacv1.AddToScheme, networkingv1.AddToScheme,
	} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Run works until ctx ends, or until leadership is lost, which is an error.
func Run(ctx context.Context, o Options) error {
	quiet := logr.FromSlogHandler(warnings{o.Logger.Handler()})
	ctrl.SetLogger(quiet)
	klog.SetLogger(quiet)
	m, err := newManager(o)
	if err != nil {
		return err
	}
	health, registry := process.NewHealth(), process.NewRegistry()
	l := &loop{health: newRoundHealth(registry), log: o.Logger}
	health.AddReady("rounds", l.health.ready)
	if err := l.add(m, o); err != nil {
		return err
	}
	registry.MustRegister(l.operator.Metrics())
	g := process.NewGroup(ctx)
	if o.HTTP != "" {
		if err := process.ServeTCP(g, o.HTTP, process.Mux(health, registry, o.PProf)); err != nil {
			g.Stop()
			return errors.Join(err, g.Wait())
		}
	}
	g.Go("operator", func(ctx context.Context) error {
		o.Logger.Info("waiting to lead", "lease", o.Namespace+"/"+LeaderLease)
		return m.Start(ctx)
	})
	return g.Wait()
}

// warnings keeps the libraries' chatter out of the log.
type warnings struct{ slog.Handler }

func (h warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && h.Handler.Enabled(ctx, l)
}

func (h warnings) WithAttrs(a []slog.Attr) slog.Handler { return warnings{h.Handler.WithAttrs(a)} }
func (h warnings) WithGroup(g string) slog.Handler      { return warnings{h.Handler.WithGroup(g)} }

func newManager(o Options) (manager.Manager, error) {
	scheme, err := NewScheme()
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(o.Rest)
	config.QPS, config.Burst = queriesPerSecond, queryBurst
	duration, renewal, retry := leaseDuration, leaseRenewal, leaseRetry
	m, err := manager.New(config, manager.Options{
		Scheme: scheme, Logger: logr.FromSlogHandler(warnings{o.Logger.Handler()}),
		Cache:                   cacheOptions(o.Logger),
		Metrics:                 server.Options{BindAddress: "0"},
		HealthProbeBindAddress:  "0",
		LeaderElection:          !o.NoLeaderElection,
		LeaderElectionID:        LeaderLease,
		LeaderElectionNamespace: o.Namespace,
		// The process ends with its leadership, so that the next one need not wait.
		LeaderElectionReleaseOnCancel: true,
		LeaseDuration:                 &duration, RenewDeadline: &renewal, RetryPeriod: &retry,
	})
	if err != nil {
		return nil, fmt.Errorf("operator: %w", err)
	}
	return m, nil
}

// cacheOptions keep only what is needed: of what the operator made, what carries its
// label; of the API server's own endpoints, those; of nodes, ranges and addresses.
func cacheOptions(log *slog.Logger) cache.Options {
	made := cache.ByObject{Label: labels.SelectorFromSet(labels.Set(ours))}
	claims := cache.ByObject{Label: labels.SelectorFromSet(labels.Set{
		workload.LabelManagedBy: workload.Operator, workload.LabelComponent: workload.ComponentAddress,
	})}
	return cache.Options{
		NewInformer:      (&outage{log: log}).newInformer,
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&appsv1.StatefulSet{}: {Label: made.Label, Transform: slimSet}, &corev1.ServiceAccount{}: made, &corev1.Service{}: made, &policyv1.PodDisruptionBudget{}: made,
			&rbacv1.Role{}: made, &rbacv1.RoleBinding{}: made, &rbacv1.ClusterRoleBinding{}: made,
			&coordinationv1.Lease{}: claims,
			&corev1.Node{}:          {Transform: slimNode},
			&discoveryv1.EndpointSlice{}: {Namespaces: map[string]cache.Config{metav1.NamespaceDefault: {
				LabelSelector: labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: "kubernetes"}),
			}}},
		},
	}
}

// slimNode leaves of a Node what is looked at.
func slimNode(o any) (any, error) {
	n, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	slim := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion, Labels: n.Labels}}
	slim.Spec.PodCIDR, slim.Spec.PodCIDRs = n.Spec.PodCIDR, n.Spec.PodCIDRs
	slim.Status.Addresses = n.Status.Addresses
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			slim.Status.Conditions = []corev1.NodeCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return slim, nil
}

// slimSet leaves of a StatefulSet what is looked at.
func slimSet(o any) (any, error) {
	s, ok := o.(*appsv1.StatefulSet)
	if !ok {
		return o, nil
	}
	slim := &appsv1.StatefulSet{ObjectMeta: s.ObjectMeta}
	slim.ManagedFields = nil
	slim.Status.ReadyReplicas = s.Status.ReadyReplicas
	return slim, nil
}

// loop runs a round after every event, and events that come together once.
type loop struct {
	operator *Operator
	health   *roundHealth
	log      *slog.Logger
	said     bool // that the first round is done
	failed   int  // rounds in a row that were not completed
}

// everything is the one thing that is reconciled.
type everything struct{}

func (l *loop) add(m manager.Manager, o Options) error {
	serviceCIDRs, err := hasKind(m.GetRESTMapper(), networkingv1.SchemeGroupVersion.WithKind("ServiceCIDR").GroupKind(), "v1")
	if err != nil {
		return err
	}
	recorder := m.GetEventRecorder(Manager)
	behind, err := addCilium(m, o)
	if err != nil {
		return err
	}
	l.operator = New(Config{
		Behind: behind,
		Cached: m.GetCache(), Live: m.GetAPIReader(), Writer: m.GetClient(), ServiceCIDRs: serviceCIDRs,
		Workload: o.Workload, Tunnel: o.Tunnel, ServiceAccount: o.ServiceAccount, Logger: o.Logger,
		Event: func(obj runtime.Object, warning bool, reason, message string) {
			kind := corev1.EventTypeNormal
			if warning {
				kind = corev1.EventTypeWarning
			}
			recorder.Eventf(obj, nil, kind, reason, "Judge", "%s", message)
		},
	})
	c, err := controller.NewTyped("culvert", m, controller.TypedOptions[everything]{
		Reconciler: l, MaxConcurrentReconciles: 1,
	})
	if err != nil {
		return fmt.Errorf("operator: %w", err)
	}
	watched := []client.Object{
		&v1alpha1.VPNGateway{}, &v1alpha1.Site{}, &v1alpha1.Device{}, &v1alpha1.RemoteCluster{}, &appsv1.StatefulSet{}, &corev1.Node{}, &corev1.Service{}, &discoveryv1.EndpointSlice{},
	}
	for _, kind := range append(ownedKinds, leaseKind, namespaceKind) {
		p := &metav1.PartialObjectMetadata{}
		p.SetGroupVersionKind(kind)
		watched = append(watched, p)
	}
	if serviceCIDRs {
		watched = append(watched, &networkingv1.ServiceCIDR{})
	}
	for _, w := range watched {
		if err := c.Watch(source.TypedKind(m.GetCache(), w, wakeUp())); err != nil {
			return fmt.Errorf("operator: watch %T: %w", w, err)
		}
	}
	return nil
}

// wakeUp answers any event with one round, a moment later.
func wakeUp() handler.TypedEventHandler[client.Object, everything] {
	type queue = workqueue.TypedRateLimitingInterface[everything]
	return handler.TypedFuncs[client.Object, everything]{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q queue) { q.AddAfter(everything{}, gatherPause) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			if e.ObjectOld.GetResourceVersion() != e.ObjectNew.GetResourceVersion() {
				q.AddAfter(everything{}, gatherPause)
			}
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q queue) { q.AddAfter(everything{}, gatherPause) },
	}
}

// Reconcile runs a round.
func (l *loop) Reconcile(ctx context.Context, _ everything) (reconcile.Result, error) {
	start := time.Now()
	err := l.operator.Round(ctx)
	l.health.done(time.Since(start), err)
	if errors.Is(err, context.Canceled) {
		return reconcile.Result{}, err // the process ends
	}
	if err != nil {
		pause := min(retryFirst<<l.failed, retryLast)
		if l.operator.waiting { // for something else than what failed
			pause = min(pause, lookSoon)
		}
		l.failed = min(l.failed+1, 16)
		l.log.Warn("a round was not completed; it is tried again", "after", pause.String(), "error", oneLine(err))
		return reconcile.Result{RequeueAfter: pause}, nil
	}
	l.failed = 0
	if !l.said {
		l.said = true
		l.log.Info("leading; everything is as it should be", "took", time.Since(start).Round(time.Millisecond).String())
	}
	if l.operator.waiting {
		return reconcile.Result{RequeueAfter: lookSoon}, nil
	}
	return reconcile.Result{RequeueAfter: lookAgain}, nil
}

func hasKind(m meta.RESTMapper, kind schema.GroupKind, version string) (bool, error) {
	_, err := m.RESTMapping(kind, version)
	switch {
	case err == nil:
		return true, nil
	case meta.IsNoMatchError(err):
		return false, nil
	}
	return false, fmt.Errorf("ask the API server for its kinds: %w", err)
}

// roundHealth is what is known of the rounds from outside.
type roundHealth struct {
	rounds  *prometheus.CounterVec
	seconds prometheus.Histogram
	failing atomic.Pointer[failure] // nil: the last round was completed, or there was none
}

// failure is that of the last round, and since when none was completed.
type failure struct {
	since time.Time
	text  string
}

// patience is how long rounds may fail before the operator is not ready: conflicts with
// other writers are part of the day.
const patience = 30 * time.Second

func newRoundHealth(r *prometheus.Registry) *roundHealth {
	h := &roundHealth{
		rounds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_operator_rounds_total", Help: "Rounds of the operator, by result: ok or error.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "culvert_operator_round_seconds", Help: "How long a round of the operator took.",
			Buckets: []float64{.005, .02, .1, .5, 2, 10, 60},
		}),
	}
	r.MustRegister(h.rounds, h.seconds)
	return h
}

func (h *roundHealth) done(took time.Duration, err error) {
	h.seconds.Observe(took.Seconds())
	result, now := "ok", (*failure)(nil)
	if err != nil {
		result, now = "error", &failure{time.Now(), oneLine(err)}
		if was := h.failing.Load(); was != nil {
			now.since = was.since
		}
	}
	h.rounds.WithLabelValues(result).Inc()
	h.failing.Store(now)
}

// ready is nil before the first round, too: an operator that waits to lead is ready.
func (h *roundHealth) ready() error {
	if f := h.failing.Load(); f != nil && time.Since(f.since) > patience {
		return fmt.Errorf("no round was completed for %s: %s", time.Since(f.since).Round(time.Second), f.text)
	}
	return nil
}
