package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// RemoteCluster is a cluster that only dials out, and that its control plane, in the
// object's namespace, reaches through that connection.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=remoteclusters,singular=remotecluster,shortName=rcl,categories=culvert
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Connected",type=string,JSONPath=`.status.conditions[?(@.type=="Connected")].status`
// +kubebuilder:printcolumn:name="Server name",type=string,priority=1,JSONPath=`.status.serverName`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type RemoteCluster struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	//
	// +required
	Spec RemoteClusterSpec `json:"spec"`

	// Status is what was found and done.
	//
	// +optional
	Status RemoteClusterStatus `json:"status,omitempty"`
}

// RemoteClusterList is a list of RemoteClusters.
//
// +kubebuilder:object:root=true
type RemoteClusterList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []RemoteCluster `json:"items"`
}

// RemoteClusterSpec is what is wanted of a remote cluster.
type RemoteClusterSpec struct {
	// Targets are what may be dialled in the remote cluster. The remote side has a policy of
	// its own: a connection needs both.
	//
	// +required
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	Targets []RemoteTarget `json:"targets"`

	// Exports are addresses that the remote cluster can dial, and where they lead on this
	// side: the other direction.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=32
	Exports []RemoteExport `json:"exports,omitempty"`

	// Hub is this side's end of the connection.
	//
	// +optional
	// +kubebuilder:default={}
	Hub Hub `json:"hub,omitzero"`

	// Front is the public entrance that the remote side dials.
	//
	// +optional
	Front Front `json:"front,omitzero"`
}

// RemoteTarget is a set of destinations: any of cidrs and names, on any of ports.
//
// +kubebuilder:validation:XValidation:rule="has(self.cidrs) && self.cidrs.size() > 0 || has(self.names) && self.names.size() > 0",message="at least one of cidrs and names must be set"
type RemoteTarget struct {
	// CIDRs in the remote cluster. They may overlap ranges on this side.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	CIDRs []CIDR `json:"cidrs,omitempty"`

	// Names are DNS names, resolved in the remote cluster; "*.example.com" stands for every
	// name below example.com.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	Names []TargetName `json:"names,omitempty"`

	// Ports are TCP ports.
	//
	// +required
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	Ports []TargetPort `json:"ports"`
}

// TargetName is a DNS name, or "*." and a DNS name.
//
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=253
// +kubebuilder:validation:Pattern=`^([*][.])?([a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?[.])*[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$`
// +kubebuilder:validation:XValidation:rule="!self.matches('(^|[.])([0-9]+|0[xX][0-9a-fA-F]*)$')",message="must be a DNS name, or '*.' and a DNS name; addresses go into cidrs"
type TargetName string

// TargetPort is a port or a range of ports.
//
// +kubebuilder:validation:XValidation:rule="!has(self.endPort) || self.endPort >= self.port",message="endPort must not be less than port"
type TargetPort struct {
	// Port, or the first one of a range.
	//
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`

	// EndPort is the last one of a range. Absent: port alone.
	//
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	EndPort *int32 `json:"endPort,omitempty"`
}

// RemoteExport is an address in the remote cluster that leads to this side.
type RemoteExport struct {
	// Name of the export.
	//
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Name string `json:"name"`

	// Listen is where the remote side listens: an IP address and a port, such as
	// "127.0.0.1:8443", "0.0.0.0:8443" or "[::]:8443".
	//
	// +required
	Listen HostPort `json:"listen"`

	// Target is what connections lead to, dialled on this side.
	//
	// +required
	Target HostPort `json:"target"`
}

// Hub is this side's end of the connection.
type Hub struct {
	// Replicas is the number of hubs; each holds connections of its own.
	//
	// +optional
	// +kubebuilder:default=2
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=8
	Replicas *int32 `json:"replicas,omitempty"`
}

// Front is the public entrance that the remote side dials.
type Front struct {
	// Address of the front, with its port. Absent: the installation's.
	//
	// +optional
	Address HostPort `json:"address,omitempty"`

	// ServerName is the DNS domain below which the hubs' server names are made from the
	// object's UID. Absent: the installation's.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=200
	// +kubebuilder:validation:XValidation:rule="self.matches('^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?[.])*[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$') && !self.matches('(^|[.])[0-9]+$')",message="must be a DNS name in lower case"
	ServerName string `json:"serverName,omitempty"`
}

// RemoteClusterStatus is what was found and done.
type RemoteClusterStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Accepted, Ready (the hubs run), Connected (a spoke is there).
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Address is where the remote side dials.
	//
	// +optional
	Address string `json:"address,omitempty"`

	// ServerName is what the remote side asks the front for, to reach the first hub.
	//
	// +optional
	ServerName string `json:"serverName,omitempty"`

	// Authority is the SHA-256 of the certificate that everybody who has joined trusts; its
	// key is in a Secret. When the Secret is lost, hubs do not make another one.
	//
	// +optional
	Authority string `json:"authority,omitempty"`

	// Hubs shows each hub; a hub writes its own entry only.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=8
	Hubs []HubStatus `json:"hubs,omitempty"`
}

// HubStatus shows one hub.
type HubStatus struct {
	// Name of the hub.
	Name string `json:"name"`

	// CertificateExpirationTime is when the hub's certificate ends.
	//
	// +optional
	CertificateExpirationTime *metav1.Time `json:"certificateExpirationTime,omitempty"`

	// Spokes that are connected.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	Spokes []SpokeStatus `json:"spokes,omitempty"`
}

// SpokeStatus shows one connected spoke.
type SpokeStatus struct {
	// Name of the spoke.
	Name string `json:"name"`

	// From is the address that it connects from.
	//
	// +optional
	From string `json:"from,omitempty"`

	// ConnectedTime is since when it is connected.
	//
	// +optional
	ConnectedTime *metav1.Time `json:"connectedTime,omitempty"`

	// CertificateExpirationTime is when its certificate ends.
	//
	// +optional
	CertificateExpirationTime *metav1.Time `json:"certificateExpirationTime,omitempty"`
}
