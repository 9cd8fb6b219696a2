package operator

import (
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// With the operator's own rights: other people's Secrets cannot be read, also not beside
// Devices whose configurations it keeps, and no Role can be made that would let it.
func TestOperatorReadsNoOthersSecrets(t *testing.T) {
	ns := inNamespace(t, "rights")
	startOperator(t, "--alone")
	create(t, gateway(ns), device(ns, "phone"), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bank", Namespace: ns}, Data: map[string][]byte{"pin": []byte("1")}})
	gatewayRuns(t, ns)
	as, err := newClient(shared.asOperator)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	var s corev1.Secret
	eventually(t, 30*time.Second, func() error {
		return as.Get(ctx, client.ObjectKey{Namespace: ns, Name: "phone-wireguard"}, &s)
	})
	role := func(rules ...rbacv1.PolicyRule) *rbacv1.Role {
		r := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "culvert-more", Namespace: ns, Labels: map[string]string{"app.kubernetes.io/managed-by": "culvert-operator"}}}
		r.Rules = rules
		return r
	}
	for what, try := range map[string]func() error{
		"read another Secret": func() error { return as.Get(ctx, client.ObjectKey{Namespace: ns, Name: "bank"}, &s) },
		"list Secrets":        func() error { return as.List(ctx, &corev1.SecretList{}, client.InNamespace(ns)) },
		"list all Secrets":    func() error { return as.List(ctx, &corev1.SecretList{}) },
		"create a Secret": func() error {
			return as.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "x", Namespace: ns}})
		},
		"grant all Secrets": func() error {
			return as.Create(ctx, role(rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get"}}))
		},
		"grant Pods": func() error {
			return as.Create(ctx, role(rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, ResourceNames: []string{"x"}, Verbs: []string{"get"}}))
		},
		"bind the administrator's ClusterRole": func() error {
			return as.Create(ctx, &rbacv1.ClusterRoleBinding{
				ObjectMeta: metav1.ObjectMeta{Name: "culvert-more", Labels: map[string]string{"app.kubernetes.io/managed-by": "culvert-operator"}},
				RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
				Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: namespace, Name: "culvert-operator"}},
			})
		},
	} {
		err := try()
		var status *apierrors.StatusError
		if !errors.As(err, &status) || !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) || strings.Contains(err.Error(), "not found") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
