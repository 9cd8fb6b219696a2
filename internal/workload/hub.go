package workload

import (
	"fmt"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// LabelRemoteCluster names the RemoteCluster that an object of its namespace belongs to,
// shortened like object names when it does not fit.
const LabelRemoteCluster = "culvert.dev/remote-cluster"

// ComponentHub is what the hubs of a RemoteCluster consist of.
const ComponentHub = "hub"

// Ports of a hub.
const (
	HubSpokePort  = 8443
	HubClientPort = 8132
	hubHTTPPort   = 9587
)

// hubDrainSeconds is how long a hub that stops lets streams end, and a little more.
const hubDrainSeconds = 70

// HubName names the objects of a RemoteCluster: "culvert-hub-NAME", shortened when NAME is
// long or has dots. The Service of that name leads clients to the hubs that have a spoke.
func HubName(remote string) string {
	return shorten("culvert-hub-", strings.ReplaceAll(remote, ".", "-"), "", remote, longestWorkload)
}

// HubPod names the pod of a replica, and the Service that leads clients to it alone.
func HubPod(remote string, replica int) string { return HubName(remote) + "-" + strconv.Itoa(replica) }

// HubSpokeService names the Service that leads spokes to a replica, also when it is not
// ready.
func HubSpokeService(remote string, replica int) string { return HubPod(remote, replica) + "-spokes" }

// HubSecret names the Secret with a RemoteCluster's authority, tokens and revocations.
func HubSecret(remote string) string { return HubName(remote) + "-authority" }

// HubLabels are on everything that belongs to the hubs of a RemoteCluster.
func HubLabels(id model.ID) map[string]string {
	return map[string]string{
		LabelName: Name, LabelComponent: ComponentHub, LabelInstance: labelValue(id.Name), LabelManagedBy: Operator,
		LabelRemoteCluster: labelValue(id.Name),
	}
}

func hubSelector(id model.ID) map[string]string {
	return map[string]string{LabelName: Name, LabelComponent: ComponentHub, LabelRemoteCluster: labelValue(id.Name)}
}

// Hubs is what the hubs of a RemoteCluster consist of, in the order in which it is to be
// made, all in its own namespace.
func Hubs(c *model.RemoteCluster, o Options) ([]Object, error) {
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: c.Namespace, Labels: HubLabels(c.ID), OwnerReferences: o.owners()}
	}
	name := HubName(c.Name)
	set, err := hubSet(c, meta(name), o)
	if err != nil {
		return nil, err
	}
	account := rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: c.Namespace, Name: name}
	out := []Object{serviceAccount(meta(name))}
	out = append(out, grant(meta(name), account, hubRules(c)...)...)
	out = append(out, hubService(meta(name), hubSelector(c.ID), PortClients, HubClientPort))
	for i := range c.Replicas {
		one := map[string]string{"statefulset.kubernetes.io/pod-name": HubPod(c.Name, i)}
		spokes := hubService(meta(HubSpokeService(c.Name, i)), one, PortSpokes, HubSpokePort)
		// A hub is not ready before a spoke has come.
		spokes.Spec.PublishNotReadyAddresses = true
		out = append(out, spokes, hubService(meta(HubPod(c.Name, i)), one, PortClients, HubClientPort))
	}
	return append(out, hubBudget(c, meta(name)), set), nil
}

// Names of a hub's ports.
const (
	PortSpokes  = "spokes"
	PortClients = "clients"
)

// hubRules let a hub keep its authority, follow its own object and report in its status.
func hubRules(c *model.RemoteCluster) []rbacv1.PolicyRule {
	named := func(resource, name string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{resource}, ResourceNames: []string{name}, Verbs: verbs}
	}
	return []rbacv1.PolicyRule{
		secretRule([]string{HubSecret(c.Name)}, "get", "create", "patch", "update"),
		named("remoteclusters", c.Name, "get", "watch"),
		named("remoteclusters/status", c.Name, "patch"),
	}
}

func hubService(meta metav1.ObjectMeta, selector map[string]string, port string, number int32) *corev1.Service {
	s := &corev1.Service{TypeMeta: typeMeta("v1", "Service"), ObjectMeta: meta}
	s.Spec.Type = corev1.ServiceTypeClusterIP
	s.Spec.Selector = selector
	s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
	s.Spec.Ports = []corev1.ServicePort{{Name: port, Protocol: corev1.ProtocolTCP, Port: number, TargetPort: intstr.FromString(port)}}
	return s
}

// hubBudget lets a drain take one hub at a time.
func hubBudget(c *model.RemoteCluster, meta metav1.ObjectMeta) *policyv1.PodDisruptionBudget {
	return &policyv1.PodDisruptionBudget{
		TypeMeta: typeMeta("policy/v1", "PodDisruptionBudget"), ObjectMeta: meta,
		Spec: policyv1.PodDisruptionBudgetSpec{
			MaxUnavailable:             new(intstr.FromInt32(1)),
			Selector:                   &metav1.LabelSelector{MatchLabels: hubSelector(c.ID)},
			UnhealthyPodEvictionPolicy: new(policyv1.AlwaysAllow),
		},
	}
}

func hubSet(c *model.RemoteCluster, meta metav1.ObjectMeta, o Options) (*appsv1.StatefulSet, error) {
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: meta.Labels}, Spec: hubPodSpec(c, meta.Name, o)}
	if len(o.HubPod) > 0 {
		var err error
		if template, err = overlay(template, o.HubPod); err != nil {
			return nil, fmt.Errorf("hub: %w", err)
		}
		template.Labels = merged(template.Labels, meta.Labels)
	}
	return &appsv1.StatefulSet{
		TypeMeta: typeMeta("apps/v1", "StatefulSet"), ObjectMeta: meta,
		Spec: appsv1.StatefulSetSpec{
			Replicas:            new(int32(c.Replicas)),
			Selector:            &metav1.LabelSelector{MatchLabels: hubSelector(c.ID)},
			ServiceName:         meta.Name,
			PodManagementPolicy: appsv1.ParallelPodManagement,
			UpdateStrategy:      appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType},
			// Until everybody is back at a new hub: they try every three seconds at least.
			MinReadySeconds: 4,
			Template:        template,
		},
	}, nil
}

func hubPodSpec(c *model.RemoteCluster, account string, o Options) corev1.PodSpec {
	const own = "{replica}" // the hub's number
	service := HubName(c.Name) + "-" + own + "." + c.Namespace + ".svc"
	probe := func(path string, failures int32) *corev1.Probe {
		return &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("http")}},
			PeriodSeconds: 2, TimeoutSeconds: 2, FailureThreshold: failures,
		}
	}
	return corev1.PodSpec{
		ServiceAccountName:            account,
		AutomountServiceAccountToken:  new(false),
		EnableServiceLinks:            new(false),
		TerminationGracePeriodSeconds: new(int64(hubDrainSeconds)),
		SecurityContext:               RestrictedPod(),
		Containers: []corev1.Container{{
			Name: ContainerCulvert, Image: o.Image, ImagePullPolicy: o.ImagePullPolicy,
			Command: []string{"culvert-tunnel"},
			Args: []string{
				"hub", "--remote-cluster=" + c.Name, "--state-secret=" + HubSecret(c.Name),
				fmt.Sprintf("--http=:%d", hubHTTPPort),
				fmt.Sprintf("--client-address=%s:%d", service, HubClientPort),
				"--server-name=" + service, "--server-name=" + HubName(c.Name) + "." + c.Namespace + ".svc",
				"--log-format=json",
			},
			Env: []corev1.EnvVar{fieldEnv("POD_NAME", "metadata.name")},
			Ports: []corev1.ContainerPort{
				{Name: PortSpokes, ContainerPort: HubSpokePort, Protocol: corev1.ProtocolTCP},
				{Name: PortClients, ContainerPort: HubClientPort, Protocol: corev1.ProtocolTCP},
				{Name: "http", ContainerPort: hubHTTPPort, Protocol: corev1.ProtocolTCP},
			},
			ReadinessProbe:  probe("/readyz", 2),
			LivenessProbe:   probe("/healthz", 15),
			VolumeMounts:    []corev1.VolumeMount{{Name: "token", MountPath: tokenDirectory, ReadOnly: true}},
			SecurityContext: Restricted(),
			Resources:       requests("20m", "32Mi"),
		}},
		Volumes: []corev1.Volume{tokenVolume()},
		Affinity: &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
			PreferredDuringSchedulingIgnoredDuringExecution: []corev1.WeightedPodAffinityTerm{{
				Weight: 100,
				PodAffinityTerm: corev1.PodAffinityTerm{
					TopologyKey:   corev1.LabelHostname,
					LabelSelector: &metav1.LabelSelector{MatchLabels: hubSelector(c.ID)},
				},
			}},
		}},
	}
}

// unprivileged is the user of everything that needs no privilege.
const unprivileged = 65532

// RestrictedPod and Restricted are the security context of a pod and of its containers at
// the Pod Security level "restricted".
func RestrictedPod() *corev1.PodSecurityContext {
	return &corev1.PodSecurityContext{
		RunAsNonRoot: new(true), RunAsUser: new(int64(unprivileged)), RunAsGroup: new(int64(unprivileged)), FSGroup: new(int64(unprivileged)),
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// Restricted is described at RestrictedPod.
func Restricted() *corev1.SecurityContext {
	return &corev1.SecurityContext{
		AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true),
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
}

// SpokeName names what "culvert join" prints for the remote cluster of a RemoteCluster, and
// EgressName what it prints for the clients on this side.
func SpokeName(remote string) string {
	return shorten("culvert-spoke-", strings.ReplaceAll(remote, ".", "-"), "", remote, longestWorkload)
}

// EgressName is described at SpokeName.
func EgressName(remote string) string {
	return shorten("culvert-egress-", strings.ReplaceAll(remote, ".", "-"), "", remote, longestWorkload)
}
