package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// ciliumNamespace and ciliumConfig are where Cilium's own chart keeps its configuration;
// it may be installed elsewhere, and is then not recognised.
const (
	ciliumNamespace = "kube-system"
	ciliumConfig    = "cilium-config"
)

// examineCilium says what Cilium's settings mean for gateways; nothing without a Cilium.
func (c *connection) examineCilium(ctx context.Context, f *findings) {
	var config corev1.ConfigMap
	err := c.Get(ctx, client.ObjectKey{Namespace: ciliumNamespace, Name: ciliumConfig}, &config)
	switch {
	case apierrors.IsNotFound(err):
		return
	case err != nil:
		f.add(findingNote, "Cilium", "ConfigMap %s/%s cannot be read, so that Cilium's settings are not looked at: %v", ciliumNamespace, ciliumConfig, err)
		return
	}
	f.add(findingOK, "Cilium", "version %s", c.ciliumVersion(ctx))
	*f = append(*f, judgeCilium(config.Data, c.links(ctx))...)
}

// ciliumVersion is the tag of the agents' image.
func (c *connection) ciliumVersion(ctx context.Context) string {
	agents := &unstructured.Unstructured{}
	agents.SetGroupVersionKind(schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "DaemonSet"})
	if err := c.Get(ctx, client.ObjectKey{Namespace: ciliumNamespace, Name: "cilium"}, agents); err != nil {
		return fmt.Sprintf("unknown (%v)", err)
	}
	containers, _, _ := unstructured.NestedSlice(agents.Object, "spec", "template", "spec", "containers")
	for _, x := range containers {
		container, _ := x.(map[string]any)
		image, _ := container["image"].(string)
		if container["name"] != "cilium-agent" {
			continue
		}
		image, _, _ = strings.Cut(image, "@")
		if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
			return strings.TrimPrefix(image[i+1:], "v")
		}
	}
	return "unknown (the DaemonSet's image has no tag)"
}

// links are the node links of the gateways, by gateway; empty values stand for the default.
func (c *connection) links(ctx context.Context) map[string]string {
	list := &unstructured.UnstructuredList{}
	list.SetGroupVersionKind(schema.GroupVersionKind{Group: "culvert.dev", Version: "v1alpha1", Kind: "VPNGatewayList"})
	if err := c.List(ctx, list); err != nil {
		return nil // what answers for gateways says so
	}
	out := map[string]string{}
	for i := range list.Items {
		link, _, _ := unstructured.NestedString(list.Items[i].Object, "spec", "clusterTraffic", "nodeLink")
		out[list.Items[i].GetNamespace()+"/"+list.Items[i].GetName()] = link
	}
	return out
}

// judgeCilium says in a line each what works with a configuration of Cilium's, what does
// not, and what to change. links are the gateways' node links.
func judgeCilium(config, links map[string]string) findings {
	var f findings
	on := func(key string) bool { return config[key] == "true" || config[key] == "strict" }
	routing := config["routing-mode"]
	if routing == "" {
		routing = "tunnel"
	}
	if config["tunnel"] == "disabled" {
		routing = "native"
	}
	f.add(findingOK, "Cilium: routing-mode", "%s: nodeLink Encapsulated and services Translate need nothing of it", routing)
	switch {
	case !on("kube-proxy-replacement"):
		f.add(findingOK, "Cilium: kube-proxy-replacement", "false: kube-proxy translates services, Culvert those of sites and devices (Translate)")
	case on("bpf-lb-sock-hostns-only"):
		f.add(findingOK, "Cilium: kube-proxy-replacement", "true, sockets of hosts only: services Translate works; nothing to change")
	default:
		f.add(findingOK, "Cilium: kube-proxy-replacement", "true: services Translate works; Route would not, since Cilium translates where sockets are: keep Translate")
	}
	switch ipam := config["ipam"]; ipam {
	case "kubernetes", "":
		f.add(findingOK, "Cilium: ipam", "kubernetes: pods are in their nodes' spec.podCIDRs, as NodeEncryption Strict needs")
	default:
		f.add(findingNote, "Cilium: ipam", "%s: pods are not in their nodes' spec.podCIDRs: gateways work, NodeEncryption Strict waits; use Cilium's encryption, or ipam.mode=kubernetes in a new cluster", ipam)
	}
	if on("enable-wireguard") || on("enable-ipsec") {
		f.add(findingNote, "Cilium: encryption", "is on: do not create a NodeEncryption beside it, never both")
	}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		if links[name] != "CiliumEndpoint" {
			continue
		}
		f.add(findingNote, "VPNGateway "+name, "nodeLink CiliumEndpoint: source verification must be lifted for its pod's endpoint, again after each restart of Cilium's agent before 1.20, and ipBlock policies do not see sites: Encapsulated needs neither")
		if routing == "tunnel" && !on("enable-endpoint-routes") {
			f.add(findingNote, "Cilium: enable-endpoint-routes", "false: with nodeLink CiliumEndpoint the agent's routes are on-link ones to the pod's interface; nothing to change")
		}
		if on("enable-cilium-endpoint-slice") {
			f.add(findingNote, "Cilium: enable-cilium-endpoint-slice", "true: the ranges of %s travel to other nodes by Cilium's operator, which was not tried: prefer Encapsulated", name)
		}
	}
	return f
}
