package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
)

// Paths of what kube-proxy lists and watches.
const (
	servicesPath = "/api/v1/services"
	slicesPath   = "/apis/discovery.k8s.io/v1/endpointslices"
	nodesPath    = "/api/v1/nodes"
	cidrsPath    = "/apis/networking.k8s.io/v1/servicecidrs"
)

// listKinds are the kinds and versions of the lists of these paths.
var listKinds = map[string][2]string{
	servicesPath: {"ServiceList", "v1"}, slicesPath: {"EndpointSliceList", "discovery.k8s.io/v1"},
	nodesPath: {"NodeList", "v1"}, cidrsPath: {"ServiceCIDRList", "networking.k8s.io/v1"},
}

// lists is as much of an API server as kube-proxy needs: it lists and watches what the bench
// puts into it. A real one would take processor time from what is measured beside it.
type lists struct {
	mu      sync.Mutex
	version int
	items   map[string][]any
	watches map[string][]chan any
}

func newLists() *lists {
	return &lists{version: 1, items: map[string][]any{servicesPath: {}, slicesPath: {}, nodesPath: {}, cidrsPath: {}}, watches: map[string][]chan any{}}
}

// change tells those that watch about an object's new version.
func (l *lists) change(path string, object any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.version++
	for _, w := range l.watches[path] {
		w <- map[string]any{"type": "MODIFIED", "object": object}
	}
}

// ServeHTTP implements http.Handler.
func (l *lists) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	query := r.URL.Query()
	switch items, known := l.items[r.URL.Path]; {
	case r.Method == http.MethodPost: // an event
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(`{"kind":"Event","apiVersion":"events.k8s.io/v1","metadata":{"name":"event"}}`))
	case known && query.Get("sendInitialEvents") != "": // who asks for that then lists
		w.WriteHeader(http.StatusBadRequest)
		_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400}`))
	case known && query.Get("watch") != "":
		l.watch(w, r)
	case known:
		l.mu.Lock()
		version := fmt.Sprint(l.version)
		l.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": listKinds[r.URL.Path][0], "apiVersion": listKinds[r.URL.Path][1], "metadata": map[string]any{"resourceVersion": version}, "items": items})
	default:
		http.NotFound(w, r)
	}
}

func (l *lists) watch(w http.ResponseWriter, r *http.Request) {
	events := make(chan any, 100)
	l.mu.Lock()
	l.watches[r.URL.Path] = append(l.watches[r.URL.Path], events)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.watches[r.URL.Path] = slices.DeleteFunc(l.watches[r.URL.Path], func(c chan any) bool { return c == events })
	}()
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e := <-events:
			if json.NewEncoder(w).Encode(e) != nil || flush.Flush() != nil {
				return
			}
		}
	}
}

// proxied has the node behind the gateway run a real kube-proxy, in mode nftables, with so
// many services.
func (s *serving) proxied(services int) {
	s.t.Helper()
	programs, err := cluster.Programs(context.Background(), os.Stderr)
	if err != nil {
		s.t.Fatal(err)
	}
	l := newLists()
	l.items[nodesPath] = []any{&corev1.Node{
		TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "node", ResourceVersion: "1"},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeIP}}},
	}}
	version := 1
	add := func(name, address, pod string) {
		l.items[servicesPath] = append(l.items[servicesPath], clusterService(name, address))
		l.items[slicesPath] = append(l.items[slicesPath], endpointSlice(name, pod, version))
	}
	add("web", servicesIP, targetIP)
	for i := range services - 1 {
		add(fmt.Sprintf("other-%d", i), otherService(i), targetIP)
	}
	s.change = func(pod string) {
		version++
		l.change(slicesPath, endpointSlice("web", pod, version))
	}
	api := s.node.Listen("127.0.0.1:8001")
	server := &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(api) }()
	s.t.Cleanup(func() { _ = server.Close() })
	conf := s.write("kube-proxy.kubeconfig", "apiVersion: v1\nkind: Config\nclusters: [{name: bench, cluster: {server: \"http://127.0.0.1:8001\"}}]\ncontexts: [{name: bench, context: {cluster: bench, user: \"\"}}]\ncurrent-context: bench\n")
	s.program(s.node, filepath.Join(programs, "kube-proxy"), "--kubeconfig="+conf, "--hostname-override=node", "--proxy-mode=nftables", "--cluster-cidr=10.50.0.0/16",
		"--metrics-bind-address=127.0.0.1:10249", "--healthz-bind-address=127.0.0.1:10256",
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s") // not writable in a namespace
}

// otherService is the address of the ith service that is there to be looked through.
func otherService(i int) string { return fmt.Sprintf("10.97.%d.%d", i/250, i%250+1) }

// clusterService is a Service with port 80.
func clusterService(name, address string) *corev1.Service {
	return &corev1.Service{
		TypeMeta: metav1.TypeMeta{Kind: "Service", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", ResourceVersion: "1"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: address, ClusterIPs: []string{address}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "web", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(7000)}},
		},
	}
}

// endpointSlice leads a service to one pod.
func endpointSlice(name, pod string, version int) *discoveryv1.EndpointSlice {
	port, ready, web, tcp := int32(7000), true, "web", corev1.ProtocolTCP
	return &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"},
		ObjectMeta: metav1.ObjectMeta{
			Name: name + "-1", Namespace: "default", ResourceVersion: fmt.Sprint(version), Labels: map[string]string{discoveryv1.LabelServiceName: name},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &web, Protocol: &tcp, Port: &port}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{pod}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
	}
}
