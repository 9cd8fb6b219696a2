// Package kube is the way to an API server: which one, as whom, and the types that Culvert
// exchanges with it.
//
// It knows nothing of what the objects mean. A client of this package asks the server for
// no list of its resources: the few kinds in use are listed here.
package kube

import (
	"errors"
	"fmt"
	"os"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// ErrNoCluster means that nothing says where an API server is.
var ErrNoCluster = errors.New("no Kubernetes cluster is configured: give --kubeconfig FILE, set KUBECONFIG, or run in a pod with a service account")

// Options choose an API server. The zero value: the cluster whose pod this is, else what
// KUBECONFIG names, else ~/.kube/config, as kubectl does.
type Options struct {
	Kubeconfig string // file; empty: as above
	Context    string // of the file; empty: its current one
}

// Requests per second and at once that a client of ours may make: above client-go's 5 and
// 10, since a gateway reports on thousands of devices.
const (
	queriesPerSecond = 100
	burst            = 200
)

// Config finds the API server and the namespace that the configuration names ("default"
// when it names none). The error is ErrNoCluster when there is no configuration.
func (o Options) Config() (*rest.Config, string, error) {
	config, namespace, err := o.load()
	if err != nil {
		return nil, "", err
	}
	config.UserAgent = "culvert"
	config.QPS, config.Burst = queriesPerSecond, burst
	config.WarningHandler = rest.NoWarnings{}
	return config, namespace, nil
}

func (o Options) load() (*rest.Config, string, error) {
	if o.Kubeconfig == "" && o.Context == "" && os.Getenv(clientcmd.RecommendedConfigPathEnvVar) == "" {
		config, err := rest.InClusterConfig()
		if err == nil {
			ns, _ := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
			return config, orDefault(string(ns)), nil
		}
		if !errors.Is(err, rest.ErrNotInCluster) {
			return nil, "", fmt.Errorf("service account of this pod: %w", err)
		}
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.Kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: o.Context})
	config, err := loader.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, "", ErrNoCluster
	}
	if err != nil {
		return nil, "", fmt.Errorf("kubeconfig: %w", err)
	}
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, "", fmt.Errorf("kubeconfig: %w", err)
	}
	return config, orDefault(namespace), nil
}

func orDefault(namespace string) string {
	if namespace == "" {
		return metav1.NamespaceDefault
	}
	return namespace
}

// NewScheme holds the types that a client of this package knows.
func NewScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, discoveryv1.AddToScheme, coordinationv1.AddToScheme, appsv1.AddToScheme, eventsv1.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// kinds are those that a client can work on, with their scope.
var kinds = []struct {
	version    schema.GroupVersion
	kind       string
	plural     string
	namespaced bool
}{
	{v1alpha1.GroupVersion, "VPNGateway", "vpngateways", true},
	{v1alpha1.GroupVersion, "Site", "sites", true},
	{v1alpha1.GroupVersion, "Device", "devices", true},
	{v1alpha1.GroupVersion, "RemoteCluster", "remoteclusters", true},
	{v1alpha1.GroupVersion, "NodeEncryption", "nodeencryptions", false},
	{v1alpha1.GroupVersion, "NodeTunnel", "nodetunnels", false},
	{appsv1.SchemeGroupVersion, "StatefulSet", "statefulsets", true},
	{appsv1.SchemeGroupVersion, "DaemonSet", "daemonsets", true}, // Cilium's, for the doctor
	{corev1.SchemeGroupVersion, "Service", "services", true},
	{corev1.SchemeGroupVersion, "Secret", "secrets", true},
	{corev1.SchemeGroupVersion, "ConfigMap", "configmaps", true},
	{eventsv1.SchemeGroupVersion, "Event", "events", true},
	{corev1.SchemeGroupVersion, "Pod", "pods", true},
	{corev1.SchemeGroupVersion, "Node", "nodes", false},
	{corev1.SchemeGroupVersion, "Namespace", "namespaces", false},
	{discoveryv1.SchemeGroupVersion, "EndpointSlice", "endpointslices", true},
	{coordinationv1.SchemeGroupVersion, "Lease", "leases", true},
}

func mapper() meta.RESTMapper {
	m := meta.NewDefaultRESTMapper(nil)
	for _, k := range kinds {
		scope := meta.RESTScopeRoot
		if k.namespaced {
			scope = meta.RESTScopeNamespace
		}
		m.AddSpecific(k.version.WithKind(k.kind), k.version.WithResource(k.plural), k.version.WithResource(strings.ToLower(k.kind)), scope)
	}
	return m
}

// NewClient makes a client; nothing is sent yet.
func NewClient(config *rest.Config) (client.WithWatch, error) {
	scheme, err := NewScheme()
	if err != nil {
		return nil, err
	}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme, Mapper: mapper()})
	if err != nil {
		return nil, fmt.Errorf("client for %s: %w", config.Host, err)
	}
	return c, nil
}
