package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of every type in this package.
var GroupVersion = schema.GroupVersion{Group: "culvert.dev", Version: "v1alpha1"}

var schemeBuilder = runtime.NewSchemeBuilder(addKnownTypes)

// AddToScheme registers the types of this package.
var AddToScheme = schemeBuilder.AddToScheme

func addKnownTypes(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&VPNGateway{}, &VPNGatewayList{},
		&Site{}, &SiteList{},
		&Device{}, &DeviceList{},
		&RemoteCluster{}, &RemoteClusterList{},
		&NodeEncryption{}, &NodeEncryptionList{},
		&NodeTunnel{}, &NodeTunnelList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// Resource is the group resource of a plural name, for error values.
func Resource(plural string) schema.GroupResource {
	return GroupVersion.WithResource(plural).GroupResource()
}
