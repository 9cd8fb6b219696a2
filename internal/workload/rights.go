package workload

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-vpn/culvert/internal/model"
)

const rbacVersion = "rbac.authorization.k8s.io/v1"

func serviceAccount(meta metav1.ObjectMeta) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{
		TypeMeta: typeMeta("v1", "ServiceAccount"), ObjectMeta: meta, AutomountServiceAccountToken: new(false),
	}
}

// ownRights let the pods keep what must outlive them: their key, where their peers were last
// seen, which of them works, and that the Service leads there. "create" by name works with
// server-side apply only.
func ownRights(gw *model.Gateway, meta metav1.ObjectMeta) []Object {
	rule := func(group, resource string, names ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{
			APIGroups: []string{group}, Resources: []string{resource}, ResourceNames: names, Verbs: []string{"get", "create", "patch"},
		}
	}
	endpoints := rule("discovery.k8s.io", "endpointslices", SliceName(gw.Name, discoveryv1.AddressTypeIPv4), SliceName(gw.Name, discoveryv1.AddressTypeIPv6))
	endpoints.Verbs = []string{"create", "patch"}
	role := &rbacv1.Role{
		TypeMeta: typeMeta(rbacVersion, "Role"), ObjectMeta: meta,
		Rules: []rbacv1.PolicyRule{
			rule("", "secrets", KeySecret(gw.Name)),
			rule("", "configmaps", EndpointsConfigMap(gw.Name)),
			rule("coordination.k8s.io", "leases", GatewayName(gw.Name)),
			endpoints,
		},
	}
	return []Object{role, roleBinding(meta, subject(gw.ID))}
}

// roleBinding binds the Role of its own name.
func roleBinding(meta metav1.ObjectMeta, s rbacv1.Subject) *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{
		TypeMeta: typeMeta(rbacVersion, "RoleBinding"), ObjectMeta: meta,
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
		Subjects: []rbacv1.Subject{s},
	}
}

// clusterRights let the pods see the objects of the whole cluster and report on them.
func clusterRights(gw *model.Gateway, o Options) *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{
		TypeMeta: typeMeta(rbacVersion, "ClusterRoleBinding"),
		ObjectMeta: metav1.ObjectMeta{
			Name: global("culvert-gateway-", gw.ID), Labels: Labels(gw.ID, ComponentGateway), OwnerReferences: o.owners(),
		},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: o.ClusterRole},
		Subjects: []rbacv1.Subject{subject(gw.ID)},
	}
}

func subject(id model.ID) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: id.Namespace, Name: GatewayName(id.Name)}
}

// Grant lets a gateway's pods read the named Secrets of one namespace, and no others. No
// names: no objects.
func (o Options) Grant(gateway model.ID, namespace string, secrets []string) []Object {
	if len(secrets) == 0 {
		return nil
	}
	meta := metav1.ObjectMeta{Name: global("culvert-secrets-", gateway), Namespace: namespace, Labels: Labels(gateway, ComponentGrant), OwnerReferences: o.owners()}
	return grant(meta, subject(gateway), secretRule(secrets, "get"))
}

// OperatorGrant lets the operator's service account keep the Secrets with devices'
// configurations of one namespace, and read the pre-shared keys that go into them. No names:
// no objects.
func (o Options) OperatorGrant(operator model.ID, namespace string, configurations, presharedKeys []string) []Object {
	var rules []rbacv1.PolicyRule
	if len(configurations) > 0 {
		rules = append(rules, secretRule(configurations, "get", "create", "patch", "delete"))
	}
	if len(presharedKeys) > 0 {
		rules = append(rules, secretRule(presharedKeys, "get"))
	}
	if len(rules) == 0 {
		return nil
	}
	labels := map[string]string{LabelName: Name, LabelComponent: ComponentGrant, LabelManagedBy: Operator}
	meta := metav1.ObjectMeta{Name: "culvert-operator-devices", Namespace: namespace, Labels: labels, OwnerReferences: o.owners()}
	s := rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: operator.Namespace, Name: operator.Name}
	return grant(meta, s, rules...)
}

func secretRule(names []string, verbs ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"secrets"},
		ResourceNames: slices.Compact(slices.Sorted(slices.Values(names))), Verbs: verbs,
	}
}

func grant(meta metav1.ObjectMeta, s rbacv1.Subject, rules ...rbacv1.PolicyRule) []Object {
	role := &rbacv1.Role{TypeMeta: typeMeta(rbacVersion, "Role"), ObjectMeta: meta, Rules: rules}
	return []Object{role, roleBinding(meta, s)}
}
