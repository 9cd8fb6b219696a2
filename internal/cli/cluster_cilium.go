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

	"github.com/culvert-vpn/culvert/internal/cilium"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// examineCilium says what Cilium's settings mean for gateways and for the encryption between
// nodes; nothing without a Cilium. One that is installed in another namespace is not recognised.
func (c *connection) examineCilium(ctx context.Context, f *findings) {
	var config corev1.ConfigMap
	err := c.Get(ctx, client.ObjectKey{Namespace: cilium.ConfigNamespace, Name: cilium.ConfigName}, &config)
	switch {
	case apierrors.IsNotFound(err):
		return
	case err != nil:
		f.add(findingNote, "Cilium", "ConfigMap %s/%s cannot be read, so that Cilium's settings are not looked at: %v", cilium.ConfigNamespace, cilium.ConfigName, err)
		return
	}
	version := c.ciliumVersion(ctx)
	f.add(findingOK, "Cilium", "version %s", version)
	*f = append(*f, judgeCilium(config.Data, version, c.links(ctx), c.encrypts(ctx))...)
}

// ciliumVersion is the tag of the agents' image.
func (c *connection) ciliumVersion(ctx context.Context) string {
	agents := &unstructured.Unstructured{}
	agents.SetGroupVersionKind(schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "DaemonSet"})
	if err := c.Get(ctx, client.ObjectKey{Namespace: cilium.ConfigNamespace, Name: "cilium"}, agents); err != nil {
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

// encrypts tells whether there is a NodeEncryption.
func (c *connection) encrypts(ctx context.Context) bool {
	e, err := c.encryption(ctx)
	return err == nil && e != nil
}

// encryption says whether a NodeEncryption works with these settings, or would.
func (f *findings) encryption(config cilium.Settings, there bool) {
	switch why := config.RefusesEncryption(); {
	case why != "" && there:
		f.add(findingFail, "Cilium: NodeEncryption", "is refused: %s", why)
	case why != "":
		f.add(findingNote, "Cilium: NodeEncryption", "would be refused: %s", why)
	case config.OverlayPort() != 0:
		f.add(findingOK, "Cilium: NodeEncryption", "works in both scopes; what is encrypted are the packets of Cilium's tunnel (UDP %d)", config.OverlayPort())
	default:
		f.add(findingOK, "Cilium: NodeEncryption", "works in both scopes")
	}
}

// triedOrOlder tells whether a version of Cilium is the one that was tried, an older one, or not known.
func triedOrOlder(version string) bool {
	var major, minor int
	n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor)
	return n < 2 || major < 1 || major == 1 && minor <= 15
}

// hasDevice tells whether Cilium's list of devices, in which a trailing "+" stands for any rest of a
// name, has a link; an empty list has none without an address.
func hasDevice(devices, link string) bool {
	return slices.ContainsFunc(strings.FieldsFunc(devices, func(r rune) bool { return r == ' ' || r == ',' }), func(d string) bool {
		prefix, open := strings.CutSuffix(d, "+")
		return d == link || open && strings.HasPrefix(link, prefix)
	})
}

// judgeCilium says in a line each what works with a configuration of Cilium's, what does
// not, and what to change. links are the gateways' node links; encrypts tells whether there is a
// NodeEncryption.
func judgeCilium(config cilium.Settings, version string, links map[string]string, encrypts bool) findings {
	var f findings
	on := config.On
	routing := "tunnel"
	if config.Native() {
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
		f.add(findingOK, "Cilium: ipam", "kubernetes: pods are in their nodes' spec.podCIDRs, as a NodeEncryption needs")
	default:
		f.add(findingNote, "Cilium: ipam", "%s: pods are not in their nodes' spec.podCIDRs: gateways work, a NodeEncryption is refused", ipam)
	}
	f.encryption(config, encrypts)
	masquerades := on("enable-bpf-masquerade") && hasDevice(config["devices"], netstate.NodeLinkName)
	if on("enable-bpf-masquerade") && !masquerades {
		f.add(findingOK, "Cilium: enable-bpf-masquerade", "true: Cilium masquerades at its devices, and cvtnodes, which has no address, is none of them")
	}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		if (links[name] == "" || links[name] == "Encapsulated") && masquerades {
			f.add(findingFail, "VPNGateway "+name, "devices=%s has Cilium masquerade in eBPF (bpf.masquerade) at cvtnodes: what pods say to sites and devices has the node's address; leave devices empty, or name the nodes' uplinks only (devices=eth0)", config["devices"])
		}
		if links[name] != "CiliumEndpoint" {
			if why := config.SkipsRoutes(); why != "" && triedOrOlder(version) {
				f.add(findingFail, "VPNGateway "+name, "%s", why)
			} else if why != "" {
				f.add(findingNote, "VPNGateway "+name, "was not tried with this Cilium; with 1.15 nothing gets there: %s", why)
			}
			continue
		}
		if why := config.RefusesEndpoints(); why != "" {
			f.add(findingFail, "VPNGateway "+name, "nodeLink CiliumEndpoint is refused: %s", why)
			continue
		}
		f.add(findingOK, "VPNGateway "+name, "nodeLink CiliumEndpoint: the agent on the gateway's node has Cilium %s pass what the gateway's pod sends with the addresses of sites; ipBlock policies do not see sites", version)
		if on("enable-cilium-endpoint-slice") {
			f.add(findingNote, "Cilium: enable-cilium-endpoint-slice", "true: the ranges of %s travel to other nodes by Cilium's operator, which was not tried: prefer Encapsulated", name)
		}
	}
	return f
}
