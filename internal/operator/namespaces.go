package operator

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

var namespaceKind = schema.GroupVersionKind{Version: "v1", Kind: "Namespace"}

// leaving answers whether nothing can be made in a namespace any more, so that what is in it counts
// as deleted: it is being deleted, or it is gone and left objects behind. The latter comes of
// Kubernetes itself: its namespace controller takes objects whose kind the API server does not know
// for a moment, as after a restart, for there being none.
func (o *Operator) leaving(ctx context.Context) (func(namespace string) (bool, error), error) {
	var l metav1.PartialObjectMetadataList
	l.SetGroupVersionKind(namespaceKind.GroupVersion().WithKind(namespaceKind.Kind + "List"))
	if err := o.list(ctx, &l); err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for i := range l.Items {
		known[l.Items[i].Name] = !l.Items[i].DeletionTimestamp.IsZero()
	}
	return func(namespace string) (bool, error) {
		if is, ok := known[namespace]; ok {
			return is, nil
		}
		var live corev1.Namespace // the cache may be behind
		err := o.Live.Get(ctx, types.NamespacedName{Name: namespace}, &live)
		switch {
		case apierrors.IsNotFound(err):
			if !o.left[namespace] {
				o.left[namespace] = true
				o.Logger.Warn("a namespace is gone and has left objects of Culvert behind, which nothing is done for: create it and delete it again",
					"namespace", namespace)
			}
			known[namespace] = true
		case err != nil:
			return false, fmt.Errorf("look for namespace %s: %w", namespace, err)
		default:
			known[namespace] = !live.DeletionTimestamp.IsZero()
		}
		return known[namespace], nil
	}, nil
}
