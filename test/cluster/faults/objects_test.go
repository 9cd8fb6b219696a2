package faults_test

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

func newKey() string {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return base64.StdEncoding.EncodeToString(k.PublicKey().Bytes())
}

// newSite dials in with WireGuard.
func newSite(name, cidr string) *v1alpha1.Site {
	return &v1alpha1.Site{ObjectMeta: named(name), Spec: v1alpha1.SiteSpec{
		GatewayRef: v1alpha1.GatewayReference{Name: "edge"}, CIDRs: []v1alpha1.RoutedCIDR{v1alpha1.RoutedCIDR(cidr)},
		WireGuard: &v1alpha1.SiteWireGuard{PublicKey: v1alpha1.Key(newKey())},
	}}
}

// ranges: what overlaps another's range, or is reserved, is refused with both named; routes
// stay, and nobody loses a packet.
func (s *scene) ranges() {
	newcomers := map[string]struct{ cidr, named string }{
		"equal": {"10.10.0.0/16", "faults/berlin"}, "subset": {"10.10.7.0/24", "faults/berlin"}, "superset": {"10.8.0.0/13", "faults/berlin"},
		"equal6": {"fd00:20::/48", "faults/berlin"}, "subset6": {"fd00:20::5/128", "faults/berlin"},
		"devices": {"10.99.0.0/16", "faults/edge"}, "device": {s.phone.Address + "/32", "faults/edge"},
		"pods": {"10.244.0.0/16", "faults/edge"}, "pod": {"10.244.1.2/32", "faults/edge"}, "pods6": {"fd00:244:1::/64", "faults/edge"},
		"services": {"10.96.0.0/16", "faults/edge"}, "service": {"10.96.0.1/32", "faults/edge"},
		"node": {"172.30.0.11/32", "faults/edge"}, "apiserver": {"172.30.0.10/32", ""},
		"all": {"0.0.0.0/0", ""}, "all6": {"::/0", ""}, "half": {"0.0.0.0/1", ""}, "half6": {"8000::/1", ""},
		"loopback": {"127.0.0.0/8", ""}, "loopback6": {"::1/128", ""}, "linklocal": {"169.254.169.254/32", ""}, "linklocal6": {"fe80::/10", ""},
		"multicast": {"224.0.0.0/4", ""}, "multicast6": {"ff00::/8", ""},
	}
	before := s.routes()
	p := s.watch()
	time.Sleep(300 * time.Millisecond)
	refused := map[string]string{}
	ctx := s.t.Context()
	for name, n := range newcomers {
		if err := s.client.Create(ctx, newSite("new-"+name, n.cidr)); apierrors.IsInvalid(err) {
			refused[name] = err.Error()
		} else if err != nil {
			s.t.Fatal(err)
		}
	}
	s.eventually(30*time.Second, "all newcomers are refused", func(ctx context.Context) error {
		var sites v1alpha1.SiteList
		if err := s.client.List(ctx, &sites, client.InNamespace(namespace)); err != nil {
			return err
		}
		for i := range sites.Items {
			name, isNew := strings.CutPrefix(sites.Items[i].Name, "new-")
			status, text := accepted(sites.Items[i].Status.Conditions)
			switch {
			case isNew && status == metav1.ConditionFalse:
				refused[name] = text
			case !isNew && status != metav1.ConditionTrue:
				return fmt.Errorf("%s is refused: %s", sites.Items[i].Name, text)
			}
		}
		if len(refused) != len(newcomers) {
			return fmt.Errorf("%d of %d are refused", len(refused), len(newcomers))
		}
		return nil
	})
	for name, text := range refused {
		n := newcomers[name]
		if !strings.Contains(text, "spec.cidrs[0]") || !strings.Contains(text, n.named) || n.named != "" && !strings.Contains(text, n.cidr) {
			s.t.Errorf("%s: %q does not name spec.cidrs[0], %s and %q", name, text, n.cidr, n.named)
		}
	}
	time.Sleep(time.Second)
	if after := s.routes(); after != before {
		s.t.Errorf("routes:\n%s\nwere:\n%s", after, before)
	}
	p.Unharmed()
	s.clear()
}

// clear deletes all Sites but berlin, and all Devices but the phone.
func (s *scene) clear() {
	s.t.Helper()
	var sites v1alpha1.SiteList
	var devices v1alpha1.DeviceList
	ctx := s.t.Context()
	if err := errors.Join(s.client.List(ctx, &sites, client.InNamespace(namespace)), s.client.List(ctx, &devices, client.InNamespace(namespace))); err != nil {
		s.t.Fatal(err)
	}
	for i := range sites.Items {
		if o := &sites.Items[i]; o.Name != "berlin" {
			s.remove(o)
		}
	}
	for i := range devices.Items {
		if o := &devices.Items[i]; o.Name != "phone" {
			s.remove(o)
		}
	}
}

func (s *scene) remove(o client.Object) {
	s.t.Helper()
	s.eventually(20*time.Second, "deletion of "+o.GetName(), func(ctx context.Context) error { // an API server that has just started may cut it off
		return client.IgnoreNotFound(s.client.Delete(ctx, o))
	})
}

func newDevice(name, gateway string) *v1alpha1.Device {
	return &v1alpha1.Device{ObjectMeta: named(name), Spec: v1alpha1.DeviceSpec{GatewayRef: v1alpha1.GatewayReference{Name: gateway}}}
}

// pool: as many devices as there are addresses get one each; the others are told, and get the
// first that becomes free.
func (s *scene) pool() {
	ctx := s.t.Context()
	tiny := &v1alpha1.VPNGateway{ObjectMeta: named("tiny"), Spec: v1alpha1.VPNGatewaySpec{
		DeviceCIDRs: []v1alpha1.RoutedCIDR{"10.98.0.0/29"}, Expose: v1alpha1.Expose{Type: v1alpha1.ExposeNone},
	}}
	if err := s.client.Create(ctx, tiny); err != nil {
		s.t.Fatal(err)
	}
	const n, addresses = 12, 5 // 8, but for the network, the gateway and the broadcast address
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := s.client.Create(ctx, newDevice(fmt.Sprintf("tiny-%d", i), "tiny")); err != nil {
				s.t.Error(err)
			}
		})
	}
	wg.Wait()
	look := func(ctx context.Context, others int) error {
		var list v1alpha1.DeviceList
		if err := s.client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
			return err
		}
		owners, told := map[string]string{}, 0
		for i := range list.Items {
			d := &list.Items[i]
			for _, a := range d.Status.Addresses {
				if o, taken := owners[a]; taken {
					s.t.Fatalf("%s is given to %s and %s", a, o, d.Name)
				}
				owners[a] = d.Name
			}
			for _, c := range d.Status.Conditions {
				if len(d.Status.Addresses) == 0 && c.Status == metav1.ConditionFalse && strings.Contains(c.Message, "10.98.0.0/29") {
					told++
					break
				}
			}
		}
		if len(owners) != addresses+1 || told != others { // and the phone's
			return fmt.Errorf("%d addresses are given, want %d; %d devices know that there is none, want %d", len(owners), addresses+1, told, others)
		}
		return nil
	}
	s.eventually(30*time.Second, "the pool is exhausted", func(ctx context.Context) error { return look(ctx, n-addresses) })
	var list v1alpha1.DeviceList
	if err := s.client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		s.t.Fatal(err)
	}
	for i := range list.Items {
		if d := &list.Items[i]; d.Spec.GatewayRef.Name == "tiny" && len(d.Status.Addresses) > 0 {
			s.remove(d)
			break
		}
	}
	s.eventually(30*time.Second, "another device has the free address", func(ctx context.Context) error { return look(ctx, n-addresses-1) })
	s.remove(tiny)
	s.clear()
}

// many: devices that are made at once are all Ready within a minute, each with an address of its
// own: a thousand of them, where goals are asked for.
func (s *scene) many() {
	const limit = 60 * time.Second
	n := int(labtest.Goal(1000, 100))
	start := time.Now()
	var wg sync.WaitGroup
	for worker := range 10 {
		wg.Go(func() {
			for i := worker; i < n; i += 10 {
				if err := s.client.Create(s.t.Context(), newDevice(fmt.Sprintf("many-%d", i), "edge")); err != nil {
					s.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	made := time.Since(start)
	s.eventually(3*limit, "all are Ready", func(ctx context.Context) error {
		var list v1alpha1.DeviceList
		if err := s.client.List(ctx, &list, client.InNamespace(namespace)); err != nil {
			return err
		}
		owners, ready := map[string]string{}, 0
		for i := range list.Items {
			d := &list.Items[i]
			for _, a := range d.Status.Addresses {
				if o, taken := owners[a]; taken {
					s.t.Fatalf("%s is given to %s and %s", a, o, d.Name)
				}
				owners[a] = d.Name
			}
			if meta.IsStatusConditionTrue(d.Status.Conditions, v1alpha1.ConditionReady) {
				ready++
			}
		}
		if ready != n+1 || len(owners) != n+1 {
			return fmt.Errorf("%d of %d are Ready, %d addresses are given", ready, n+1, len(owners))
		}
		return nil
	})
	took := time.Since(start)
	memory := ""
	for _, node := range s.Nodes {
		out, err := node.Run(s.t.Context(), "sh", "-c", "for p in $(pgrep -f '^culvert operator'); do grep VmHWM /proc/$p/status; done")
		if err == nil {
			memory += strings.TrimSpace(out) + " "
		}
	}
	s.t.Logf("%d devices: made after %s, all Ready after %s; the operators' memory: %s", n, made.Round(10*time.Millisecond), took.Round(10*time.Millisecond), memory)
	if took > limit {
		s.t.Errorf("%d devices are Ready after %s, want %s", n, took, limit)
	}
	s.clear()
}

// seeds are objects with something in most fields.
func seeds() []map[string]any {
	site := func(name, cidr string, with map[string]any) map[string]any {
		spec := map[string]any{"gatewayRef": map[string]any{"name": "edge"}, "cidrs": []any{cidr}}
		for k, v := range with {
			spec[k] = v
		}
		return map[string]any{"apiVersion": "culvert.dev/v1alpha1", "kind": "Site", "metadata": map[string]any{"name": name, "namespace": namespace}, "spec": spec}
	}
	ref := map[string]any{"name": "berlin", "key": "psk"}
	return []map[string]any{
		site("w", "10.20.0.0/24", map[string]any{"wireguard": map[string]any{"publicKey": newKey(), "endpoint": "192.0.2.1:51820", "persistentKeepaliveSeconds": int64(25)}}),
		site("i", "10.20.1.0/24", map[string]any{"ipsec": map[string]any{
			"address": "192.0.2.7", "localID": "a.example.com", "remoteID": "b.example.com", "initiate": "Never", "childSAs": "PerPair",
			"proposals": map[string]any{"ike": []any{"aes256gcm16-prfsha384-x25519"}, "esp": []any{"aes256gcm16-x25519"}},
			"auth":      map[string]any{"presharedKeySecretRef": ref},
		}}),
		{
			"apiVersion": "culvert.dev/v1alpha1", "kind": "Device", "metadata": map[string]any{"name": "d", "namespace": namespace},
			"spec": map[string]any{
				"gatewayRef": map[string]any{"name": "edge"}, "publicKey": newKey(), "addresses": []any{"10.99.0.77"},
				"access": map[string]any{"to": []any{"Pods"}}, "expirationTime": "2036-01-01T00:00:00Z",
			},
		},
	}
}

// leaf is one string in an object.
type leaf struct {
	path string
	set  func(any)
	old  any
}

// leaves are all values of an object's spec, and its name.
func leaves(at string, v any, set func(any)) []leaf {
	var out []leaf
	switch x := v.(type) {
	case map[string]any:
		for k, child := range x {
			if at == "" && (k == "apiVersion" || k == "kind") || at == "metadata." && k == "namespace" {
				continue
			}
			out = append(out, leaves(at+k+".", child, func(v any) { x[k] = v })...)
		}
	case []any:
		for i, child := range x {
			out = append(out, leaves(fmt.Sprintf("%s%d.", at, i), child, func(v any) { x[i] = v })...)
		}
	default:
		out = append(out, leaf{strings.TrimSuffix(at, "."), set, v})
	}
	return out
}

// try creates an object. An error that is not about what is in the object fails the test.
func (s *scene) try(o map[string]any, name string) (refused error) {
	s.t.Helper()
	u := &unstructured.Unstructured{Object: o}
	if name != "" {
		u.SetName(name)
	}
	err := s.client.Create(s.t.Context(), u, client.FieldValidation("Strict"))
	if err != nil && !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err) && !apierrors.IsAlreadyExists(err) && !apierrors.IsRequestEntityTooLargeError(err) {
		s.t.Errorf("%v", err)
	}
	return err
}

func clone(o map[string]any) map[string]any {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(b); err != nil {
		panic(err)
	}
	return u.Object
}

// broken: objects with arbitrary values are refused, by the API server or by a condition that
// names the field, or mean something; nothing dies of them.
func (s *scene) broken() {
	n := 300
	if os.Getenv("CULVERT_GOALS") != "" {
		n = 10000
	}
	before := s.restarts()
	p := s.watch()
	random := mathrand.New(mathrand.NewPCG(1, 2))
	nasty := []any{"", "x", "-1", int64(-1), int64(1) << 40, true, nil, []any{}, map[string]any{}, "10.0.0.0/33", "::/200", "999.1.1.1", "a b", strings.Repeat("a", 3000), "\x00", "💥", "0x7f.1", "1e9", "fd00::/8"}
	byServer := 0
	for i := range n {
		list := seeds()
		o := clone(list[random.IntN(len(list))])
		for range 1 + random.IntN(3) {
			all := leaves("", o, nil)
			all[random.IntN(len(all))].set(nasty[random.IntN(len(nasty))])
		}
		name := ""
		if m, ok := o["metadata"].(map[string]any); ok && (m["name"] == "w" || m["name"] == "i" || m["name"] == "d") {
			name = fmt.Sprintf("broken-%d", i)
		}
		if s.try(o, name) != nil {
			byServer++
		}
	}
	byOperator, fine := 0, 0
	s.eventually(60*time.Second, "each is accepted or refused", func(ctx context.Context) error {
		byOperator, fine = 0, 0
		var sites v1alpha1.SiteList
		var devices v1alpha1.DeviceList
		if err := errors.Join(s.client.List(ctx, &sites, client.InNamespace(namespace)), s.client.List(ctx, &devices, client.InNamespace(namespace))); err != nil {
			return err
		}
		judge := func(name string, list []metav1.Condition) error {
			status, text := accepted(list)
			if refs := meta.FindStatusCondition(list, v1alpha1.ConditionResolvedRefs); status == metav1.ConditionUnknown && refs != nil {
				text = refs.Message // it waits for what it refers to
			}
			switch {
			case status == "":
				return fmt.Errorf("nothing is said of %s", name)
			case status == metav1.ConditionTrue:
				fine++
			case !strings.Contains(text, "spec.") || strings.Contains(text, "\n"):
				return fmt.Errorf("%s: %q does not name the field in one line", name, text)
			default:
				byOperator++
			}
			return nil
		}
		for i := range sites.Items {
			if err := judge(sites.Items[i].Name, sites.Items[i].Status.Conditions); err != nil {
				return err
			}
		}
		for i := range devices.Items {
			if err := judge(devices.Items[i].Name, devices.Items[i].Status.Conditions); err != nil {
				return err
			}
		}
		return nil
	})
	s.t.Logf("of %d objects the API server refused %d, the operator %d; %d are accepted", n, byServer, byOperator, fine)
	if byServer == 0 || byOperator == 0 {
		s.t.Error("nothing was refused by the one or the other")
	}
	if after := s.restarts(); after != before {
		s.t.Errorf("restarts:\n%s\nwere:\n%s", after, before)
	}
	p.Unharmed()
	s.clear()
}

// hostile: text that could end one directive and begin another does neither, in any string of
// any object, nor in a Secret.
func (s *scene) hostile() {
	state := func() string {
		tables := s.gateway("culvert", "nft", "list", "tables")
		conf := s.gateway("ipsec", "cat", "/run/culvert/ipsec/strongswan.conf")
		return tables + conf
	}
	before, restarts := state(), s.restarts()
	p := s.watch()
	payloads := []string{
		"evil\"; }\n}\ninclude /tmp/evil.conf\nconnections { evil { remote_addrs = 192.0.2.66 } }\n",
		"evil' } include /tmp/evil.conf {",
		"evil\" accept; }; add table inet evil; #",
		"$(nft add table inet evil)`nft add table inet evil`",
	}
	n, refused := 0, 0
	for _, seed := range seeds() {
		for _, l := range leaves("", clone(seed), nil) {
			for _, text := range payloads {
				o := clone(seed)
				for _, same := range leaves("", o, nil) {
					if same.path == l.path {
						same.set(text)
					}
				}
				name := fmt.Sprintf("hostile-%d", n)
				if l.path == "metadata.name" {
					name = ""
				}
				n++
				if s.try(o, name) != nil {
					refused++
				}
			}
		}
	}
	for i, text := range payloads {
		secret := map[string]any{
			"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": fmt.Sprintf("hostile-%d", i), "namespace": namespace},
			"stringData": map[string]any{"psk": text},
		}
		site := clone(seeds()[1])
		site["spec"].(map[string]any)["cidrs"] = []any{fmt.Sprintf("10.21.%d.0/24", i)}
		site["spec"].(map[string]any)["ipsec"].(map[string]any)["remoteID"] = fmt.Sprintf("hostile-%d.example.com", i)
		site["spec"].(map[string]any)["ipsec"].(map[string]any)["auth"] = map[string]any{"presharedKeySecretRef": map[string]any{"name": fmt.Sprintf("hostile-%d", i), "key": "psk"}}
		if err := errors.Join(s.try(secret, ""), s.try(site, fmt.Sprintf("hostile-secret-%d", i))); err != nil {
			s.t.Error(err)
		}
	}
	s.t.Logf("of %d objects the API server refused %d", n, refused)
	// The last ones are in effect, so all before are.
	s.eventually(30*time.Second, "the sites with hostile keys are connections", func(context.Context) error {
		out := s.gateway("ipsec", "swanctl", "--list-conns", "--uri", "unix:///run/culvert/ipsec/charon.vici")
		for line := range strings.Lines(out) { // an identity may well be such a text, but no more
			mine := strings.TrimSpace(line) == "" || strings.HasPrefix(line, " ") || strings.HasPrefix(line, "faults.") || strings.Contains(line, "plugin")
			if !mine || strings.Contains(line, "remote: 192.0.2.66") {
				s.t.Errorf("connection %s in\n%s", line, out)
				return nil
			}
		}
		for i := range payloads {
			if !strings.Contains(out, fmt.Sprintf("hostile-%d.example.com", i)) {
				return fmt.Errorf("hostile-%d.example.com is not there", i)
			}
		}
		return nil
	})
	if after := state(); after != before {
		s.t.Errorf("tables and configuration:\n%s\nwere:\n%s", after, before)
	}
	if after := s.restarts(); after != restarts {
		s.t.Errorf("restarts:\n%s\nwere:\n%s", after, restarts)
	}
	p.Unharmed()
	s.clear()
}
