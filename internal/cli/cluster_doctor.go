package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/workload"
)

// examine looks at a cluster.
func (c *connection) examine(ctx context.Context) findings {
	var f findings
	s, err := c.status(ctx, "")
	if err != nil {
		f.add(findingFail, "API server", "%v", err)
		return f
	}
	f.add(findingOK, "API server", "%s answers, and knows Culvert's kinds", c.host)
	c.examineParts(ctx, &f)
	c.examineCilium(ctx, &f)
	if len(s.Gateways) == 0 {
		f.add(findingNote, "gateways", "there is none: write a VPNGateway")
	}
	for _, g := range s.Gateways {
		name := "VPNGateway " + g.Name
		switch {
		case len(g.Problems) > 0:
			f.problems(name, g.Problems)
		case g.Ready != string(metav1.ConditionTrue):
			f.add(findingFail, name, "no pod of it has reported yet: kubectl -n %s get pods -l %s=%s", strings.Split(g.Name, "/")[0], workload.LabelComponent, workload.ComponentGateway)
		case g.Address == "":
			f.add(findingNote, name, "is ready; it has no address for far sides to dial: see spec.expose")
		default:
			f.add(findingOK, name, "is ready at %s", g.Address)
		}
	}
	for _, kind := range []struct {
		kind string
		list []objectStatus
	}{{"Site", s.Sites}, {"Device", s.Devices}} {
		well := 0
		for _, x := range kind.list {
			name := kind.kind + " " + x.Name
			switch {
			case len(x.Problems) > 0:
				f.problems(name, x.Problems)
			case x.Ready != string(metav1.ConditionTrue):
				f.add(findingFail, name, "nobody has decided on it: does its gateway %s exist, and the operator run?", x.Gateway)
			case kind.kind == "Site" && x.Connected != string(metav1.ConditionTrue):
				f.add(findingNote, name, "is not connected: %s", x.Message)
			default:
				well++
			}
		}
		if well > 0 {
			f.add(findingOK, strings.ToLower(kind.kind)+"s", "%d of %d are well", well, len(kind.list))
		}
	}
	return f
}

func (f *findings) problems(name string, list []conditionTexts) {
	for _, p := range list {
		f.add(findingFail, name, "%s: %s: %s", p.Type, p.Reason, p.Message)
	}
}

// examineParts looks for operator and agents.
func (c *connection) examineParts(ctx context.Context, f *findings) {
	var pods corev1.PodList
	var nodes corev1.NodeList
	if err := c.List(ctx, &pods, client.MatchingLabels{workload.LabelName: workload.Name}); err != nil {
		f.add(findingNote, "pods", "cannot be listed, so that operator and agents are not looked at: %v", err)
		return
	}
	if err := c.List(ctx, &nodes); err != nil {
		f.add(findingNote, "nodes", "cannot be listed: %v", err)
	}
	operators, agents := 0, map[string]bool{}
	for i := range pods.Items {
		p := &pods.Items[i]
		ready := podReady(p)
		switch p.Labels[workload.LabelComponent] {
		case "operator":
			if ready {
				operators++
			}
		case "agent":
			agents[p.Spec.NodeName] = agents[p.Spec.NodeName] || ready
		}
		if why := podTrouble(p); why != "" && !ready {
			f.add(findingFail, "pod "+p.Namespace+"/"+p.Name, "%s", why)
		}
	}
	if operators == 0 {
		f.add(findingFail, "operator", "none is ready: nothing new is decided or made; what runs goes on. See kubectl get pods -A -l %s=operator", workload.LabelComponent)
	} else {
		f.add(findingOK, "operator", "%d ready", operators)
	}
	var without []string
	for i := range nodes.Items {
		if !agents[nodes.Items[i].Name] {
			without = append(without, nodes.Items[i].Name)
		}
	}
	switch {
	case len(agents) == 0:
		f.add(findingNote, "agents", "there are none: gateways must masquerade (clusterTraffic.source: Masquerade), and their sysctls be set otherwise")
	case len(without) > 0:
		f.add(findingFail, "agents", "none is ready on %s: pods there do not reach sites and devices", strings.Join(without, ", "))
	default:
		f.add(findingOK, "agents", "ready on all %d nodes", len(nodes.Items))
	}
}

func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// podTrouble says why a pod is not ready, when it is not just starting.
func podTrouble(p *corev1.Pod) string {
	for _, s := range p.Status.ContainerStatuses {
		switch {
		case s.State.Waiting != nil && s.State.Waiting.Reason != "ContainerCreating" && s.State.Waiting.Reason != "PodInitializing":
			return fmt.Sprintf("container %s: %s: %s", s.Name, s.State.Waiting.Reason, s.State.Waiting.Message)
		case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
			return fmt.Sprintf("container %s ended with exit code %d: kubectl -n %s logs %s -c %[1]s --previous", s.Name, s.State.Terminated.ExitCode, p.Namespace, p.Name)
		}
	}
	if since := time.Since(p.CreationTimestamp.Time); since > time.Minute {
		return fmt.Sprintf("is not ready after %s: kubectl -n %s describe pod %s", since.Round(time.Second), p.Namespace, p.Name)
	}
	return ""
}
