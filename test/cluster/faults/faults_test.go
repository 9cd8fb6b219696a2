// Package faults_test does to a gateway in a real cluster what it must survive: refused ranges,
// exhausted pools, broken and hostile objects, servers that are away, a gateway that is dead.
package faults_test

import (
	"context"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const (
	namespace = "faults"
	psk       = "planted-pre-shared-key-7f3a9c"
)

// objects are what is in effect before anything goes wrong.
const objects = `
apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: edge, namespace: faults}
spec:
  deviceCIDRs: [10.99.0.0/20]
  expose: {type: NodePort, address: 198.18.0.11}
---
apiVersion: v1
kind: Secret
metadata: {name: berlin, namespace: faults}
stringData: {psk: "` + psk + `"}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: berlin, namespace: faults}
spec:
  gatewayRef: {name: edge}
  cidrs: [10.10.0.0/16, "fd00:20::/48"]
  ipsec: {localID: vpn.example.com, remoteID: berlin.example.com, auth: {presharedKeySecretRef: {name: berlin, key: psk}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: faults}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: server, image: "` + cluster.TestImage + `", imagePullPolicy: Never, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}}
`

// scene is a cluster with a gateway, a site, and a device that is connected.
type scene struct {
	*clustertest.Cluster
	t      *testing.T
	client client.Client
	phone  *clustertest.Device
	web    string // address:port of an echo
	start  time.Time
}

// TestFaults: each step works on what the one before left. The numbers are those of the list of
// faults that Culvert must survive.
func TestFaults(t *testing.T) {
	c := clustertest.Start(t, cluster.Options{})
	s := &scene{Cluster: c, t: t, start: time.Now()}
	s.connect()
	c.Install()
	c.Namespace(namespace)
	c.Apply(objects)
	c.Wait(namespace, "web")
	s.web = c.Kubectl("-n", namespace, "get", "pod", "web", "-o", "jsonpath={.status.podIP}") + ":8081"
	s.ready("vpngateway/edge", "site/berlin")
	c.Culvert("device", "add", "phone", "--namespace", namespace)
	s.ready("device/phone")
	s.phone = c.Device("phone", "198.18.8.2", "192.168.88", c.Culvert("device", "config", "phone", "--namespace", namespace))
	clustertest.Watch(t, s.phone.Host.Host, s.phone.Address, s.web, 100*time.Millisecond).AwaitAny(30 * time.Second)
	for _, step := range []struct {
		name string
		do   func(*scene)
	}{
		{"12 and 13: ranges of others", (*scene).ranges},
		{"14: the pool is exhausted", (*scene).pool},
		{"14: many devices at once", (*scene).many},
		{"15: broken objects", (*scene).broken},
		{"25: hostile text", (*scene).hostile},
		{"23: operator and API server away", (*scene).away},
		{"24: the operator dies again and again", (*scene).killed},
		{"26: secrets do not show", (*scene).secrets},
		{"a gateway that hangs", (*scene).hangs},
		{"27: deletion with a dead gateway", (*scene).deleted},
		{"rights", (*scene).rights},
	} {
		t.Run(step.name, func(t *testing.T) {
			sub := *s
			sub.Cluster, sub.t = s.In(t), t
			step.do(&sub)
		})
	}
}

// connect makes the administrator's client.
func (s *scene) connect() {
	s.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig())
	if err != nil {
		s.t.Fatal(err)
	}
	config.QPS, config.Burst = 500, 500
	if s.client, err = kube.NewClient(config); err != nil {
		s.t.Fatal(err)
	}
}

func (s *scene) ready(objects ...string) {
	s.t.Helper()
	for _, o := range objects {
		if out, err := s.TryKubectl("-n", namespace, "wait", o, "--for=condition=Ready", "--timeout=90s"); err != nil {
			say, _ := s.TryKubectl("-n", namespace, "get", o, "-o", "jsonpath={.status}")
			pods, _ := s.TryKubectl("-n", namespace, "get", "pods,events", "-o", "wide")
			s.t.Fatalf("%v: %s\n%s\n%s", err, out, say, pods)
		}
	}
}

// watch looks at the phone's traffic.
func (s *scene) watch() *clustertest.Probe {
	return clustertest.Watch(s.t, s.phone.Host.Host, s.phone.Address, s.web, 20*time.Millisecond)
}

// routes are all routes and rules of the nodes that are not made for single pods.
func (s *scene) routes() string {
	s.t.Helper()
	all := ""
	for _, n := range s.Nodes {
		for _, args := range [][]string{
			{"-4", "route", "show", "table", "19610"}, {"-6", "route", "show", "table", "19610"}, {"-4", "rule", "show"}, {"-6", "rule", "show"},
		} {
			out, err := n.Output(s.t.Context(), "ip", args...)
			if err != nil && !strings.Contains(err.Error(), "FIB table does not exist") {
				s.t.Fatal(err)
			}
			all += n.Name + ": " + strings.Join(args, " ") + "\n" + out
		}
	}
	return all
}

func named(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name}
}

// accepted is what condition Accepted of an object says: its status, reason and message.
func accepted(list []metav1.Condition) (status metav1.ConditionStatus, text string) {
	for _, c := range list {
		if c.Type == v1alpha1.ConditionAccepted {
			return c.Status, c.Reason + ": " + c.Message
		}
	}
	return "", ""
}

// eventually waits for something, and fails the test when it does not come.
func (s *scene) eventually(limit time.Duration, what string, f func(ctx context.Context) error) {
	s.t.Helper()
	labtest.Eventually(s.t, limit, what, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		return f(ctx)
	})
}

// restarts are those of all containers of Culvert's.
func (s *scene) restarts() string {
	s.t.Helper()
	format := `jsonpath={range .items[*]}{.metadata.name}{" "}{.status.containerStatuses[*].restartCount}{"\n"}{end}`
	return s.Kubectl("-n", clustertest.System, "get", "pods", "-o", format) +
		s.Kubectl("-n", namespace, "get", "pods", "-l", "culvert.dev/gateway=edge", "-o", format)
}

// gateway runs a program in a container of the gateway's pod.
func (s *scene) gateway(container string, command ...string) string {
	s.t.Helper()
	out, err := s.TryKubectl(append([]string{"-n", namespace, "exec", "culvert-edge-0", "-c", container, "--"}, command...)...)
	if err != nil {
		s.t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
	return out
}
