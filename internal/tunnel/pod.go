package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/podapi"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// HubPod says how a hub works in a pod: the object comes from the API server, the state is
// in a Secret, and the object's status tells who is connected.
type HubPod struct {
	API       *podapi.Client
	Namespace string // of the RemoteCluster, and of the pod
	Name      string
	Secret    string // with the state
	Pod       string // its name; the number at its end is the replica's
}

// manager is the field manager of what one hub writes.
func (p *HubPod) manager() string { return "culvert-hub/" + p.Pod }

// beginInPod waits until the API server has the object and the operator has said where
// spokes dial.
func (h *hubLoop) beginInPod(ctx context.Context) (*model.RemoteCluster, error) {
	p := h.opts.Cluster
	replica, err := strconv.Atoi(p.Pod[strings.LastIndexByte(p.Pod, '-')+1:])
	if err != nil {
		return nil, fmt.Errorf("pod %s: its name does not end with the number of a replica", p.Pod)
	}
	o := &apiObject{pod: p}
	h.opts.Replica, h.opts.Name, h.source = replica, p.Namespace+"/"+p.Name, o
	h.state = SecretState(&podSecret{pod: p, owner: o.owner}, o.authority)
	said := ""
	for {
		c, err := h.look(ctx, o)
		if err == nil {
			return c, nil
		}
		if err.Error() != said {
			said = err.Error()
			h.opts.Logger.Warn("cannot begin yet", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func (h *hubLoop) look(ctx context.Context, o *apiObject) (*model.RemoteCluster, error) {
	if err := o.read(ctx); err != nil {
		return nil, err
	}
	c, err := o.Find()
	if err == nil && c.FrontHost == "" {
		err = fmt.Errorf("RemoteCluster %s: nobody has said yet where spokes dial: see its condition Ready", c.ID)
	}
	return c, err
}

// apiObject is the RemoteCluster of an API server.
type apiObject struct {
	pod *HubPod

	mu     sync.Mutex
	object *v1alpha1.RemoteCluster // nil: gone
}

func (a *apiObject) path() string { return podapi.RemoteCluster(a.pod.Namespace, a.pod.Name) }

func (a *apiObject) read(ctx context.Context) error {
	var raw json.RawMessage
	if err := a.pod.API.Get(ctx, a.path(), &raw); err != nil {
		return err
	}
	return a.set(raw)
}

func (a *apiObject) set(raw json.RawMessage) error {
	var o *v1alpha1.RemoteCluster
	if raw != nil {
		o = &v1alpha1.RemoteCluster{}
		if err := json.Unmarshal(raw, o); err != nil {
			return fmt.Errorf("RemoteCluster %s/%s: %w", a.pod.Namespace, a.pod.Name, err)
		}
	}
	a.mu.Lock()
	a.object = o
	a.mu.Unlock()
	return nil
}

func (a *apiObject) get() *v1alpha1.RemoteCluster {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.object
}

// Find implements objects.
func (a *apiObject) Find() (*model.RemoteCluster, error) {
	o := a.get()
	if o == nil {
		return nil, fmt.Errorf("RemoteCluster %s/%s is gone", a.pod.Namespace, a.pod.Name)
	}
	return ParseRemoteCluster(o)
}

// Watch implements objects.
func (a *apiObject) Watch(ctx context.Context) (<-chan struct{}, error) {
	changed := make(chan struct{}, 1)
	go a.pod.API.Watch(ctx, a.path(), func(raw json.RawMessage) {
		if a.set(raw) != nil {
			return
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}, func(error) {}) // /readyz and the log of the hub speak of spokes; it goes on without the API server
	return changed, nil
}

// owner is what the state belongs to.
func (a *apiObject) owner() (uid string) {
	if o := a.get(); o != nil {
		uid = string(o.UID)
	}
	return uid
}

// authority is the one that hubs have used before.
func (a *apiObject) authority() (known string) {
	if o := a.get(); o != nil {
		known = o.Status.Authority
	}
	return known
}

// ParseRemoteCluster checks an object of an API server; what the operator has decided is
// filled in.
func ParseRemoteCluster(o *v1alpha1.RemoteCluster) (*model.RemoteCluster, error) {
	o = o.DeepCopy()
	o.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: model.KindRemoteCluster}
	var list model.Objects
	list.Add(model.Decoded{Object: o})
	m := model.Parse(list, model.ParseOptions{})
	for _, p := range m.Problems {
		return nil, fmt.Errorf("%s %s: %s: %s", p.Kind, p.Object, p.Field, p.Message)
	}
	c := m.RemoteClusters[0]
	if c.FrontHost == "" {
		c.FrontHost = o.Status.Address
	}
	if _, domain, ok := strings.Cut(o.Status.ServerName, "."); ok && c.FrontName == "" {
		c.FrontName = domain
	}
	return c, nil
}

// podSecret is a Secret as a hub's pod reaches it.
type podSecret struct {
	pod   *HubPod
	owner func() string // UID of the RemoteCluster
}

func (s *podSecret) String() string { return "Secret " + s.pod.Namespace + "/" + s.pod.Secret }

// secretObject is what is needed of a Secret; the rest of it is kept as it is.
type secretObject struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Data map[string][]byte `json:"data"`
}

// Read implements Secret.
func (s *podSecret) Read(ctx context.Context) (map[string][]byte, string, error) {
	var o secretObject
	err := s.pod.API.Get(ctx, podapi.Secret(s.pod.Namespace, s.pod.Secret), &o)
	if errors.Is(err, podapi.ErrNotFound) {
		return nil, "", nil
	}
	if o.Data == nil {
		o.Data = map[string][]byte{}
	}
	return o.Data, o.Metadata.ResourceVersion, err
}

// Write implements Secret.
func (s *podSecret) Write(ctx context.Context, data map[string][]byte, version string) error {
	path := podapi.Secret(s.pod.Namespace, s.pod.Secret)
	var err error
	if version == "" {
		// The right to make objects goes by name with server-side apply only. Of two hubs that do
		// so at once the second one is told.
		err = s.pod.API.Apply(ctx, path, s.pod.manager(), false, map[string]any{
			"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "data": data,
			"metadata": map[string]any{
				"name": s.pod.Secret, "namespace": s.pod.Namespace,
				"labels": map[string]string{"app.kubernetes.io/name": "culvert", "app.kubernetes.io/component": "authority"},
				"ownerReferences": []metav1.OwnerReference{{
					APIVersion: v1alpha1.GroupVersion.String(), Kind: model.KindRemoteCluster, Name: s.pod.Name, UID: types.UID(s.owner()),
				}},
			},
		}, nil)
	} else {
		err = replaceSecret(ctx, s.pod.API, path, data, version)
	}
	if errors.Is(err, podapi.ErrConflict) {
		return ErrConflict
	}
	return err
}

// replaceSecret replaces the data of a Secret, and leaves everything else of it.
func replaceSecret(ctx context.Context, api *podapi.Client, path string, data map[string][]byte, version string) error {
	var whole map[string]any
	if err := api.Get(ctx, path, &whole); err != nil {
		return err
	}
	meta, _ := whole["metadata"].(map[string]any)
	if meta == nil || meta["resourceVersion"] != version {
		return podapi.ErrConflict
	}
	whole["data"] = data
	return api.Replace(ctx, path, whole, nil)
}

// report keeps the hub's entry in the status of the RemoteCluster, until ctx ends.
func (h *hubLoop) report(ctx context.Context) {
	p := h.opts.Cluster
	path := podapi.RemoteCluster(p.Namespace, p.Name)
	var told map[string]any
	said := ""
	for {
		status := h.entry()
		if !reflect.DeepEqual(status, told) {
			err := p.API.Apply(ctx, path+"/status", p.manager(), true, map[string]any{
				"apiVersion": v1alpha1.GroupVersion.String(), "kind": model.KindRemoteCluster,
				"metadata": map[string]any{"name": p.Name, "namespace": p.Namespace}, "status": status,
			}, nil)
			switch {
			case err == nil:
				told, said = status, ""
			case ctx.Err() == nil && err.Error() != said:
				said = err.Error()
				h.opts.Logger.Error("cannot report in the status of the RemoteCluster", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// mostSpokes is how many the status of a hub shows.
const mostSpokes = 64

// entry is what a hub says of itself in the status.
func (h *hubLoop) entry() map[string]any {
	credentials := h.holder.Get()
	spokes := []any{}
	names := map[string]bool{}
	for _, s := range h.hub.Peers() {
		name := spokeName(s)
		if s.Role != pki.Spoke || names[name] || len(spokes) == mostSpokes {
			continue
		}
		names[name] = true
		spokes = append(spokes, map[string]any{
			"name": name, "from": s.From,
			"connectedTime":             s.Since.UTC().Format(time.RFC3339),
			"certificateExpirationTime": s.Expires.UTC().Format(time.RFC3339),
		})
	}
	return map[string]any{
		"authority": AuthorityOf(credentials.Authorities[0]),
		"hubs": []any{map[string]any{
			"name": h.opts.Cluster.Pod, "spokes": spokes,
			"certificateExpirationTime": credentials.Certificate.Leaf.NotAfter.UTC().Format(time.RFC3339),
		}},
	}
}

// spokeName is the certificate's name, and the instance's when there may be several.
func spokeName(p hub.Peer) string {
	if p.Instance == "" || p.Instance == p.Name {
		return p.Name
	}
	return p.Name + "/" + wire.Line(p.Instance)
}

// PodKeeper keeps a membership in a Secret of the pod's own namespace. The Secret is there
// already; the pod may read and replace it.
type PodKeeper struct {
	API    *podapi.Client
	Secret string
}

// membershipName is the key in the Secret's data.
const membershipName = "membership.json"

// Load implements Keeper.
func (k PodKeeper) Load(ctx context.Context) (*Membership, error) {
	var o secretObject
	if err := k.API.Get(ctx, podapi.Secret(k.API.Namespace(), k.Secret), &o); err != nil {
		return nil, fmt.Errorf("Secret %s/%s: %w", k.API.Namespace(), k.Secret, err)
	}
	b := o.Data[membershipName]
	if len(b) == 0 {
		return nil, nil //nolint:nilnil // as the interface says
	}
	var m Membership
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("Secret %s/%s: %s is damaged: restore it, or remove it and join again", k.API.Namespace(), k.Secret, membershipName)
	}
	return &m, nil
}

// Save implements Keeper.
func (k PodKeeper) Save(ctx context.Context, m *Membership) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	path := podapi.Secret(k.API.Namespace(), k.Secret)
	for {
		var o secretObject
		if err = k.API.Get(ctx, path, &o); err != nil {
			break
		}
		data := maps.Clone(o.Data)
		if data == nil {
			data = map[string][]byte{}
		}
		data[membershipName] = b
		if err = replaceSecret(ctx, k.API, path, data, o.Metadata.ResourceVersion); !errors.Is(err, podapi.ErrConflict) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("Secret %s/%s: %w", k.API.Namespace(), k.Secret, err)
	}
	return nil
}
