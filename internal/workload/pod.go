package workload

import (
	"encoding/json"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
)

// Containers of a gateway pod. The IKE daemon has one of its own, so that it keeps its SAs
// when culvert is restarted.
const (
	ContainerCulvert = "culvert"
	ContainerIPsec   = "ipsec"
)

const (
	httpPort = 9586 // /healthz, /readyz, /metrics

	stateDirectory = "/var/lib/culvert"
	ipsecDirectory = "/run/culvert/ipsec"
	tokenDirectory = "/var/run/secrets/kubernetes.io/serviceaccount" //nolint:gosec // a directory

	// All groups may ping, as containerd 2 has it for every pod.
	pingGroups = "0 2147483647"

	// A gateway's peers wait while its pod ends: nothing is drained, so it takes no time.
	terminationSeconds = 5
	tokenSeconds       = 3607 // what Kubernetes itself asks for
)

// statefulSet runs the pods: a name each, never two of one name.
func statefulSet(gw *model.Gateway, meta metav1.ObjectMeta, o Options) (*appsv1.StatefulSet, error) {
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: meta.Labels, Annotations: podAnnotations(gw)}, Spec: podSpec(gw, o)}
	if len(o.Pod) > 0 {
		var err error
		if template, err = overlay(template, o.Pod); err != nil {
			return nil, err
		}
		template.Labels = merged(template.Labels, meta.Labels)
	}
	return &appsv1.StatefulSet{
		TypeMeta: typeMeta("apps/v1", "StatefulSet"), ObjectMeta: meta,
		Spec: appsv1.StatefulSetSpec{
			Replicas:            new(int32(gw.Replicas)),
			Selector:            &metav1.LabelSelector{MatchLabels: selector(gw.ID)},
			ServiceName:         meta.Name,
			PodManagementPolicy: appsv1.ParallelPodManagement,
			UpdateStrategy:      appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType},
			Template:            template,
		},
	}, nil
}

// overlay lays a strategic merge patch over a pod template.
func overlay(template corev1.PodTemplateSpec, patch []byte) (corev1.PodTemplateSpec, error) {
	base, err := json.Marshal(template)
	if err != nil {
		return template, fmt.Errorf("pod template: %w", err)
	}
	both, err := strategicpatch.StrategicMergePatch(base, patch, template)
	if err != nil {
		return template, fmt.Errorf("pod template: the operator's --gateway-pod or --hub-pod file does not fit: %w", err)
	}
	var out corev1.PodTemplateSpec
	if err := json.Unmarshal(both, &out); err != nil {
		return template, fmt.Errorf("pod template: the operator's --gateway-pod or --hub-pod file does not fit: %w", err)
	}
	return out, nil
}

func podSpec(gw *model.Gateway, o Options) corev1.PodSpec {
	return corev1.PodSpec{
		ServiceAccountName:            GatewayName(gw.Name),
		AutomountServiceAccountToken:  new(false), // the IKE daemon has no business with the API server
		EnableServiceLinks:            new(false),
		TerminationGracePeriodSeconds: new(int64(terminationSeconds)),
		SecurityContext: &corev1.PodSecurityContext{
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			// Probes through tunnels are pings; Kubernetes counts this sysctl as safe.
			Sysctls: []corev1.Sysctl{{Name: "net.ipv4.ping_group_range", Value: pingGroups}},
		},
		Containers: []corev1.Container{culvertContainer(gw, o), ipsecContainer(gw, o)},
		Volumes:    volumes(),
		Affinity: &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
			PreferredDuringSchedulingIgnoredDuringExecution: []corev1.WeightedPodAffinityTerm{{
				Weight: 100,
				PodAffinityTerm: corev1.PodAffinityTerm{
					TopologyKey:   corev1.LabelHostname,
					LabelSelector: &metav1.LabelSelector{MatchLabels: selector(gw.ID)},
				},
			}},
		}},
	}
}

func culvertContainer(gw *model.Gateway, o Options) corev1.Container {
	probe := func(path string, failures int32) *corev1.Probe {
		return &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("http")}},
			PeriodSeconds: 2, TimeoutSeconds: 2, FailureThreshold: failures,
		}
	}
	c := corev1.Container{
		Name: ContainerCulvert, Image: o.Image, ImagePullPolicy: o.ImagePullPolicy,
		Command: []string{"culvert"},
		Args: []string{
			"gateway", "--namespace", gw.Namespace, "--name", gw.Name,
			"--state", stateDirectory, "--http", fmt.Sprintf(":%d", httpPort), "--keep-on-stop",
		},
		Env: []corev1.EnvVar{
			fieldEnv("POD_NAME", "metadata.name"),
			fieldEnv("POD_NAMESPACE", "metadata.namespace"),
			fieldEnv("POD_IPS", "status.podIPs"),
			fieldEnv("HOST_IPS", "status.hostIPs"),
			fieldEnv("NODE_NAME", "spec.nodeName"),
		},
		Ports:          []corev1.ContainerPort{{Name: "http", ContainerPort: httpPort, Protocol: corev1.ProtocolTCP}},
		ReadinessProbe: probe("/readyz", 2),
		LivenessProbe:  probe("/healthz", 15),
		VolumeMounts: []corev1.VolumeMount{
			{Name: "state", MountPath: stateDirectory},
			{Name: "ipsec", MountPath: ipsecDirectory},
			{Name: "tmp", MountPath: "/tmp"},
			{Name: "tun", MountPath: "/dev/net/tun"},
			{Name: "token", MountPath: tokenDirectory, ReadOnly: true},
		},
		SecurityContext: netAdmin("NET_BIND_SERVICE"), // the relay answers UDP from the services' ports, DNS's among them
		Resources:       requests("50m", "64Mi"),
	}
	for _, p := range udpPorts(gw) {
		port := corev1.ContainerPort{Name: p.name, ContainerPort: p.port, Protocol: corev1.ProtocolUDP}
		if gw.Expose.Type == string(v1alpha1.ExposeHostPort) {
			port.HostPort = p.port
		}
		c.Ports = append(c.Ports, port)
	}
	return c
}

func ipsecContainer(_ *model.Gateway, o Options) corev1.Container {
	return corev1.Container{
		Name: ContainerIPsec, Image: o.Image, ImagePullPolicy: o.ImagePullPolicy,
		Command: []string{"culvert"},
		Args:    []string{"gateway", "ipsec-daemon", "--dir", ipsecDirectory},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "run", MountPath: "/run"},
			{Name: "ipsec", MountPath: ipsecDirectory},
			{Name: "ipsec-tmp", MountPath: "/tmp"},
			{Name: "tun", MountPath: "/dev/net/tun"},
		},
		SecurityContext: netAdmin("NET_BIND_SERVICE"), // strongSwan asks for it before it opens ports 500 and 4500
		Resources:       requests("50m", "32Mi"),
	}
}

func fieldEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}

func requests(cpu, memory string) corev1.ResourceRequirements {
	return corev1.ResourceRequirements{Requests: corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory),
	}}
}

// netAdmin is the one privilege that links, routes and rules need; a process that is not
// root would not get it into effect.
func netAdmin(more ...corev1.Capability) *corev1.SecurityContext {
	return &corev1.SecurityContext{
		RunAsUser:                new(int64(0)),
		RunAsNonRoot:             new(false),
		AllowPrivilegeEscalation: new(false),
		ReadOnlyRootFilesystem:   new(true),
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: append([]corev1.Capability{"NET_ADMIN"}, more...)},
	}
}

func volumes() []corev1.Volume {
	empty := func(name string, medium corev1.StorageMedium) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}}}
	}
	return []corev1.Volume{
		empty("state", corev1.StorageMediumMemory), // keys never reach a disk
		empty("ipsec", corev1.StorageMediumMemory),
		empty("run", ""), empty("tmp", ""), empty("ipsec-tmp", ""),
		{Name: "tun", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{
			Path: "/dev/net/tun", Type: new(corev1.HostPathCharDev),
		}}},
		tokenVolume(),
	}
}

// tokenVolume is what Kubernetes itself mounts, in the one container that needs it.
func tokenVolume() corev1.Volume {
	return corev1.Volume{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: new(int64(tokenSeconds))}},
		{ConfigMap: &corev1.ConfigMapProjection{
			LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"},
			Items:                []corev1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}},
		}},
		{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{
			Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.namespace"},
		}}}},
	}}}}
}

// disruptionBudget lets a drain take one pod at a time: also the only one, which is back
// elsewhere within seconds.
func disruptionBudget(gw *model.Gateway, meta metav1.ObjectMeta) *policyv1.PodDisruptionBudget {
	return &policyv1.PodDisruptionBudget{
		TypeMeta: typeMeta("policy/v1", "PodDisruptionBudget"), ObjectMeta: meta,
		Spec: policyv1.PodDisruptionBudgetSpec{
			MaxUnavailable:             new(intstr.FromInt32(1)),
			Selector:                   &metav1.LabelSelector{MatchLabels: selector(gw.ID)},
			UnhealthyPodEvictionPolicy: new(policyv1.AlwaysAllow),
		},
	}
}
