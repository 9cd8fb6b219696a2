package cilium

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// The configuration of the agent that decides what is masqueraded, Cilium's own or the
// stand-alone one: https://docs.cilium.io, "Masquerading", and
// https://github.com/kubernetes-sigs/ip-masq-agent.
const (
	masqNamespace = "kube-system"
	masqName      = "ip-masq-agent"
	masqKey       = "config"
	masqField     = "nonMasqueradeCIDRs"
)

// Annotations on the ConfigMap: the ranges that we have added, and that the list itself is
// ours, since there was none.
const (
	addedAnnotation = "culvert.dev/added-non-masquerade-cidrs"
	listAnnotation  = "culvert.dev/added-non-masquerade-list"
)

// implied are the ranges that an agent does not masquerade when its configuration has no
// list. A list of our own must not take them away.
var implied = []string{
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24",
	"192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
}

// setMasquerade makes our part of the list what is wanted. A ConfigMap that is not there is
// not made: whoever masquerades in another way has no use for it.
func (c *Cilium) setMasquerade(ctx context.Context, o *unstructured.Unstructured) error {
	next, ranges := o.DeepCopy(), c.kept()
	changed, err := merge(next, ranges)
	if err != nil {
		return fmt.Errorf("ConfigMap %s/%s: %w", masqNamespace, masqName, err)
	}
	if !changed {
		return nil
	}
	_, err = c.client.Resource(configMaps).Namespace(masqNamespace).Update(ctx, next, metav1.UpdateOptions{FieldManager: "culvert-operator"})
	switch {
	case err == nil:
		c.log.Info("told the masquerading agent which ranges to leave alone", "configmap", masqNamespace+"/"+masqName, "ranges", len(ranges))
		return nil
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		return nil // the watch brings what it is now
	}
	return fmt.Errorf("ConfigMap %s/%s: %w", masqNamespace, masqName, err)
}

// merge brings our ranges into the configuration, and those that are not wanted any more
// out of it. What somebody else has listed stays, also when it is wanted by us.
func merge(o *unstructured.Unstructured, ranges []netip.Prefix) (changed bool, err error) {
	text, _, err := unstructured.NestedString(o.Object, "data", masqKey)
	if err != nil {
		return false, fmt.Errorf("data.%s: %w", masqKey, err)
	}
	config := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &config); err != nil {
		return false, fmt.Errorf("data.%s is no YAML: correct it: %w", masqKey, err)
	}
	notes := o.GetAnnotations()
	if notes == nil {
		notes = map[string]string{}
	}
	before := notes[addedAnnotation]
	theirs, err := others(config, split(before))
	if err != nil {
		return false, err
	}
	// Without a list, ours begins with what is implied; once somebody adds to it, it is theirs.
	ownList := len(theirs) == 0 || notes[listAnnotation] != "" && sameSet(theirs, implied)
	if ownList {
		theirs = implied
	}
	list, added := slices.Clone(theirs), []string{}
	for _, r := range ranges {
		if s := r.String(); !slices.Contains(theirs, s) {
			list, added = append(list, s), append(added, s)
		}
	}
	delete(notes, listAnnotation)
	switch {
	case len(added) == 0 && ownList && before == "": // never ours
	case len(added) == 0 && ownList:
		delete(config, masqField)
	default:
		config[masqField] = list
		if ownList {
			notes[listAnnotation] = "true"
		}
	}
	notes[addedAnnotation] = strings.Join(added, ",")
	if len(added) == 0 {
		delete(notes, addedAnnotation)
	}
	return write(o, config, notes, text)
}

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// others are the ranges of the list that we have not added.
func others(config map[string]any, ours []string) ([]string, error) {
	list, ok := config[masqField].([]any)
	if !ok && config[masqField] != nil {
		return nil, fmt.Errorf("data.%s: %s is no list: correct it", masqKey, masqField)
	}
	out := []string{}
	for _, x := range list {
		s, ok := x.(string)
		if !ok {
			return nil, fmt.Errorf("data.%s: %s holds %v, which is no range: correct it", masqKey, masqField, x)
		}
		if !slices.Contains(ours, s) {
			out = append(out, s)
		}
	}
	return out, nil
}

// write puts the configuration back in the notation that it had, if it has changed.
func write(o *unstructured.Unstructured, config map[string]any, notes map[string]string, text string) (changed bool, err error) {
	was := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &was); err != nil {
		return false, err
	}
	if sameJSON(was, config) && sameJSON(o.GetAnnotations(), notes) {
		return false, nil
	}
	var b []byte
	switch {
	case len(config) == 0:
	case strings.HasPrefix(strings.TrimSpace(text), "{"):
		b, err = json.Marshal(config)
	default:
		b, err = yaml.Marshal(config)
	}
	if err != nil {
		return false, err
	}
	if !sameJSON(was, config) {
		if err := unstructured.SetNestedField(o.Object, string(b), "data", masqKey); err != nil {
			return false, err
		}
	}
	o.SetAnnotations(notes)
	return true, nil
}

// sameJSON compares values as they would be written; nil equals what is empty.
func sameJSON(a, b any) bool {
	x, errA := json.Marshal(a)
	y, errB := json.Marshal(b)
	empty := func(s []byte) string { return strings.Replace(string(s), "null", "{}", 1) }
	return errA == nil && errB == nil && empty(x) == empty(y)
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}
