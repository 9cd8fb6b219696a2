package encryption

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// How soon service must be back after the cause of a fault is gone, in seconds: the goal, and
// what neighbours on the machine do not turn red.
const (
	goalRepair  = 10
	guardRepair = 20
)

// flow is one way that traffic takes, watched without pause.
type flow struct {
	from   *lab.Host
	source string
	to     string
}

// flows are from a pod and a host of a node to a pod of another one in both families, from a
// pod of another node to the first one, and from the site, if there is one.
func (w *world) flows(t *testing.T, n *cluster.Node) []flow {
	t.Helper()
	i := 0
	for w.Nodes[i] != n {
		i++
	}
	o := w.Nodes[(i+1)%len(w.Nodes)]
	here, there := w.ips("web-"+n.Name), w.ips("web-"+o.Name)
	pod := w.podHost(t, "web-"+n.Name)
	list := []flow{
		{pod, here[0], there[0]}, {pod, here[1], there[1]},
		{n.Host, n.IPs()[0].String(), there[0]},
		{w.podHost(t, "web-"+o.Name), there[0], here[0]},
	}
	if w.siteHost != nil {
		far := there
		if o == w.Nodes[0] { // the gateway's: nothing is encrypted
			far = here
		}
		list = append(list, flow{w.siteHost, siteIP, far[0]})
	}
	return list
}

// podHost is a pod's network namespace, under a name that goes with the test.
func (w *world) podHost(t *testing.T, pod string) *lab.Host {
	t.Helper()
	uid := w.Kubectl("-n", namespace, "get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
	pid := ""
	files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "/pod"+uid+"/") {
			pid = strings.Split(f, "/")[2]
		}
	}
	if pid == "" {
		t.Fatalf("no process of pod %s", pod)
	}
	name := strings.TrimSuffix(w.Nodes[0].Namespace, w.Nodes[0].Name) + "pod-" + pid
	if out, err := exec.Command("ip", "netns", "attach", name, pid).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "delete", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return &lab.Host{Name: pod, Namespace: name}
}

// outage is what several flows have felt.
type outage struct {
	t      *testing.T
	probes []*clustertest.Probe
	event  time.Time
}

// watch begins to send on all flows; they must work.
func (w *world) watch(t *testing.T, flows []flow) *outage {
	t.Helper()
	x := &outage{t: t}
	for _, f := range flows {
		to := netip.AddrPortFrom(netip.MustParseAddr(f.to), 8081).String()
		x.probes = append(x.probes, clustertest.Watch(t, f.from, f.source, to, 50*time.Millisecond))
	}
	for _, p := range x.probes {
		p.AwaitSteady(500*time.Millisecond, 20*time.Second)
	}
	x.event = time.Now()
	return x
}

// over waits until all flows work again, and holds them to the goal, from when the cause was
// gone.
func (x *outage) over(what string) {
	x.t.Helper()
	var worst time.Duration
	for _, p := range x.probes {
		worst = max(worst, p.Recovered(x.event, time.Minute))
	}
	x.held(what+": service was back after", worst)
}

// longest ends the flows, and holds the longest pause in any to the goal.
func (x *outage) longest(what string) {
	x.t.Helper()
	var worst time.Duration
	for _, p := range x.probes {
		sent, lost, gap := p.Outcome()
		if lost == sent {
			x.t.Fatalf("%s: nothing of %d packets came back", what, sent)
		}
		worst = max(worst, gap)
	}
	x.held(what+": the longest pause was", worst)
}

func (x *outage) held(what string, took time.Duration) {
	x.t.Helper()
	limit := time.Duration(labtest.Goal(goalRepair, guardRepair)) * time.Second
	x.t.Logf("%s %s", what, took.Round(10*time.Millisecond))
	if took > limit {
		x.t.Errorf("%s %s, want %s at most", what, took.Round(10*time.Millisecond), limit)
	}
}

// killed kills all agents at once: no plain packet is delivered meanwhile.
func (w *world) killed(t *testing.T, x *injector) {
	before := x.delivered()
	o := w.watch(t, w.flows(t, w.Nodes[0]))
	for _, n := range w.Nodes {
		kill(t, n)
	}
	if now := x.inject(); now != before {
		t.Errorf("agents killed: %v of the injector's packets were delivered, %v before", now, before)
	}
	o.over("agents killed")
	w.silence(t, "agents killed")
}

// forgotten deletes what the others know of a node: they lose their peer, until its agent
// says again who it is.
func (w *world) forgotten(t *testing.T) {
	n := w.Nodes[1]
	uid := func() string {
		out, _ := w.TryKubectl("get", "nodetunnel", n.Name, "-o", "jsonpath={.metadata.uid}")
		return out
	}
	before := uid()
	o := w.watch(t, w.flows(t, w.Nodes[0]))
	w.Kubectl("delete", "nodetunnel", n.Name)
	o.over("peer deleted")
	labtest.Eventually(t, 10*time.Second, "there is another NodeTunnel", func() error {
		if now := uid(); now == before || now == "" {
			return fmt.Errorf("UID %q", now)
		}
		return nil
	})
	w.silence(t, "peer deleted")
}

// moved gives the last node other addresses, and takes that back.
func (w *world) moved(t *testing.T) {
	n, o := w.Nodes[len(w.Nodes)-1], w.Nodes[0]
	here, there := w.ips("web-"+n.Name), w.ips("web-"+o.Name)
	pod, other := w.podHost(t, "web-"+n.Name), w.podHost(t, "web-"+o.Name)
	flows := []flow{{pod, here[0], there[0]}, {pod, here[1], there[1]}, {other, there[0], here[0]}, {o.Host, o.IPs()[0].String(), here[0]}}
	moved := false
	t.Cleanup(func() {
		if moved {
			_ = n.Move(context.Background())
		}
	})
	for _, what := range []string{"address changed", "address changed back"} {
		x := w.watch(t, flows)
		start := time.Now()
		if err := n.Move(context.Background()); err != nil {
			t.Fatal(err)
		}
		moved = !moved
		x.event = time.Now()
		t.Logf("%s: the Node says so after %s", what, x.event.Sub(start).Round(100*time.Millisecond))
		for _, m := range w.Nodes { // what they say to the new addresses, as long as they are a node's
			w.listenFor(t, m)
		}
		x.over(what)
		if moved {
			w.works(t, w.requests())
		}
		w.silence(t, what)
	}
}
