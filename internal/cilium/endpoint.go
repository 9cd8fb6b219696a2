package cilium

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// setEndpoint makes the ranges in a pod's CiliumEndpoint those that are wanted.
func (c *Cilium) setEndpoint(ctx context.Context, k name, o *unstructured.Unstructured) error {
	have, found, err := unstructured.NestedSlice(o.Object, "status", "networking", "addressing")
	if err != nil {
		return fmt.Errorf("CiliumEndpoint %s/%s: status.networking.addressing is no list: is it a Cilium of 1.10 or later?", k.namespace, k.name)
	}
	if !found {
		return nil // Cilium has not filled it in yet, and will
	}
	want := addressing(have, c.wanted()[k])
	if reflect.DeepEqual(have, want) {
		return nil
	}
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/metadata/resourceVersion", "value": o.GetResourceVersion()},
		{"op": "replace", "path": "/status/networking/addressing", "value": want},
	})
	if err != nil {
		return err
	}
	_, err = c.client.Resource(endpoints).Namespace(k.namespace).Patch(ctx, k.name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: "culvert-operator"})
	switch {
	case err == nil:
		c.log.Info("told Cilium the ranges behind a gateway pod", "pod", k.namespace+"/"+k.name, "ranges", len(want)-len(own(have)))
		return nil
	case apierrors.IsNotFound(err), apierrors.IsConflict(err), apierrors.IsInvalid(err):
		return nil // it has changed since: the watch brings what it is now
	}
	return fmt.Errorf("CiliumEndpoint %s/%s: %w", k.namespace, k.name, err)
}

// addressing is the list with the pod's own addresses first, then the ranges, each in halves: a
// policy that names exactly a range makes Cilium give what it knows of that prefix another
// identity, without a way to the pod; what lies in a longer prefix goes by that one.
func addressing(have []any, ranges []netip.Prefix) []any {
	out := own(have)
	var parts []netip.Prefix
	for _, r := range ranges {
		parts = append(parts, halves(r)...)
	}
	for _, r := range parts {
		field := "ipv6"
		if r.Addr().Is4() {
			field = "ipv4"
		}
		out = append(out, map[string]any{field: r.String()})
	}
	return out
}

// halves are the two of a range; the range itself when it is one address.
func halves(r netip.Prefix) []netip.Prefix {
	if r.IsSingleIP() {
		return []netip.Prefix{r}
	}
	bytes, bit := r.Masked().Addr().AsSlice(), r.Bits()
	bytes[bit/8] |= 0x80 >> (bit % 8)
	upper, _ := netip.AddrFromSlice(bytes)
	return []netip.Prefix{netip.PrefixFrom(r.Masked().Addr(), bit+1), netip.PrefixFrom(upper, bit+1)}
}

// own are the entries that Cilium has written.
func own(have []any) []any {
	out := []any{}
	for _, x := range have {
		pair, _ := x.(map[string]any)
		ours := false
		for _, field := range []string{"ipv4", "ipv6"} {
			s, _ := pair[field].(string)
			ours = ours || strings.Contains(s, "/")
		}
		if !ours {
			out = append(out, x)
		}
	}
	return out
}
