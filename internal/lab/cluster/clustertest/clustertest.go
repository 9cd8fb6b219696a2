// Package clustertest gives tests a real Kubernetes cluster that is removed at their end.
package clustertest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// Cluster is a cluster.Cluster whose errors end the test.
type Cluster struct {
	*cluster.Cluster
	t testing.TB
	// ends: the cluster ends with t, so that what is in it need not be removed before.
	ends bool
}

// Start starts a cluster for one test, with a name of its own, and removes it at the
// test's end; KEEP=1 in the environment leaves it up. With CULVERT_CLUSTER=NAME in the
// environment the test uses that running cluster instead, whatever its options, and leaves
// it up: a test must then remove what it made there.
//
// On a machine that cannot run a cluster the test is skipped with the reason; with
// CI=true it fails.
func Start(t testing.TB, o cluster.Options) *Cluster {
	t.Helper()
	labtest.Require(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	if name := os.Getenv("CULVERT_CLUSTER"); name != "" {
		c, err := cluster.Attach(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		return &Cluster{Cluster: c, t: t}
	}
	if err := cluster.Check(); err != nil {
		labtest.Skip(t, err.Error())
	}
	if o.Name == "" {
		o.Name = fmt.Sprintf("t%d", os.Getpid())
	}
	o.Keep = os.Getenv("KEEP") != ""
	if o.Out == nil {
		o.Out = &lines{t: t}
	}
	c, err := cluster.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if o.Keep {
			t.Logf("cluster %s is left up: make cluster-down NAME=%[1]s", o.Name)
			return
		}
		if err := c.Stop(); err != nil {
			t.Errorf("remove the cluster: %v", err)
		}
	})
	return &Cluster{Cluster: c, t: t, ends: !o.Keep}
}

// In returns the same cluster for a subtest: errors end it, and what is made for it goes
// with it.
func (c *Cluster) In(t testing.TB) *Cluster { return &Cluster{Cluster: c.Cluster, t: t} }

// Last is In for a subtest after which nobody uses the cluster: what is made for it goes with that.
func (c *Cluster) Last(t testing.TB) *Cluster {
	return &Cluster{Cluster: c.Cluster, t: t, ends: c.ends}
}

// lines logs what is written, line by line.
type lines struct {
	t    testing.TB
	mu   sync.Mutex
	rest []byte
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, b...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		l.t.Log(string(line))
		l.rest = rest
	}
}

// Kubectl runs kubectl (two minutes at most) and returns what it printed.
func (c *Cluster) Kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.TryKubectl(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// TryKubectl is Kubectl for what may fail.
func (c *Cluster) TryKubectl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	return c.Cluster.Kubectl(ctx, args...)
}

// Apply applies manifests given as YAML.
func (c *Cluster) Apply(manifests string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := c.Cluster.Apply(ctx, manifests); err != nil {
		c.t.Fatal(err)
	}
}

// Namespace makes a Kubernetes namespace that is deleted at the test's end, or goes with the
// cluster. One that an
// earlier test left to be deleted is waited for.
func (c *Cluster) Namespace(name string) {
	c.t.Helper()
	if out := c.Kubectl("get", "namespace", name, "--ignore-not-found", "-o", "jsonpath={.metadata.deletionTimestamp}"); out != "" {
		c.Kubectl("wait", "--for=delete", "namespace/"+name, "--timeout=100s")
	}
	c.Apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n")
	if c.ends {
		return
	}
	c.t.Cleanup(func() {
		if out, err := c.TryKubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found"); err != nil {
			c.t.Errorf("%v: %s", err, out)
		}
	})
}

// Load puts an image archive into every node's containerd.
func (c *Cluster) Load(archive string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := c.Cluster.Load(ctx, archive); err != nil {
		c.t.Fatal(err)
	}
}

// OutsideHost makes a machine outside, see cluster.Cluster.OutsideHost; it is removed at
// the test's end.
func (c *Cluster) OutsideHost(name string, addrs ...string) *lab.Host {
	c.t.Helper()
	h, err := c.Cluster.OutsideHost(name, addrs...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := h.Remove(); err != nil {
			c.t.Errorf("remove %s: %v", name, err)
		}
	})
	return h
}

// Balance gives a Service a load balancer outside until the test's end, see
// cluster.Cluster.Balance.
func (c *Cluster) Balance(namespace, service string, o cluster.BalanceOptions) *cluster.Balancer {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b, err := c.Cluster.Balance(ctx, namespace, service, o)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			c.t.Errorf("load balancer of %s/%s: %v", namespace, service, err)
		}
	})
	return b
}

// Wait waits until pods of a namespace are Ready: wait's arguments after "--for
// condition=Ready", say "pod/client" or "-l", "app=x". What it waited for in vain is
// described.
func (c *Cluster) Wait(namespace string, args ...string) {
	c.t.Helper()
	if _, err := c.TryKubectl(append([]string{"-n", namespace, "wait", "pod", "--for=condition=Ready", "--timeout=100s"}, args...)...); err != nil {
		pods, _ := c.TryKubectl("-n", namespace, "get", "pods,events", "-o", "wide")
		c.t.Fatalf("%v\n%s", err, pods)
	}
}

// Try is the time that one probe may take.
const Try = 10 * time.Second

// Exec runs a program in a pod (10 s at most) and returns what it printed and the error.
func (c *Cluster) Exec(namespace, pod string, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Try)
	defer cancel()
	return c.Cluster.Kubectl(ctx, append([]string{"-n", namespace, "exec", pod, "--"}, command...)...)
}
