package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// NodeEncryptionName is the one name that a NodeEncryption can have.
const NodeEncryptionName = "cluster"

// NodeEncryption keeps the traffic between the cluster's own nodes encrypted. There is one
// object of this kind, named "cluster".
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=nodeencryptions,singular=nodeencryption,shortName=nenc,scope=Cluster,categories=culvert
// +kubebuilder:printcolumn:name="Scope",type=string,JSONPath=`.spec.scope`
// +kubebuilder:printcolumn:name="Enforcement",type=string,JSONPath=`.spec.enforcement`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Ready nodes",type=integer,JSONPath=`.status.readyNodes`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.totalNodes`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'cluster'",message="there is one NodeEncryption per cluster: its name must be cluster"
type NodeEncryption struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	//
	// +required
	Spec NodeEncryptionSpec `json:"spec"`

	// Status is what was found and done.
	//
	// +optional
	Status NodeEncryptionStatus `json:"status,omitempty"`
}

// NodeEncryptionList is a list of NodeEncryptions.
//
// +kubebuilder:object:root=true
type NodeEncryptionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NodeEncryption `json:"items"`
}

// EncryptionScope says which traffic between nodes is encrypted.
//
// +kubebuilder:validation:Enum=Pods;All
type EncryptionScope string

// Which traffic between nodes is encrypted.
const (
	ScopePods EncryptionScope = "Pods" // from and to pods
	ScopeAll  EncryptionScope = "All"  // the nodes' own traffic too
)

// Enforcement says what happens to traffic that cannot be encrypted.
//
// +kubebuilder:validation:Enum=Permissive;Strict
type Enforcement string

// What happens to traffic that cannot be encrypted.
const (
	EnforcementPermissive Enforcement = "Permissive" // it is sent as it is: for the time of the roll-out
	EnforcementStrict     Enforcement = "Strict"     // it is dropped
)

// NodeEncryptionSpec is what is wanted of the encryption between nodes.
type NodeEncryptionSpec struct {
	// Scope says which traffic is encrypted.
	//
	// +optional
	// +kubebuilder:default=Pods
	Scope EncryptionScope `json:"scope,omitempty"`

	// Enforcement says what happens to traffic that cannot be encrypted. There is no
	// default: Permissive leaves gaps, Strict cuts off nodes whose agent is not there yet.
	//
	// +required
	Enforcement Enforcement `json:"enforcement"`

	// Port is the UDP port on every node.
	//
	// +optional
	// +kubebuilder:default=51821
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port,omitempty"`

	// KeyLifetimeHours is the age at which a node changes its key; each does so up to a fifth
	// earlier, so that they do not all do it at once. 0: only when asked to, by the annotation
	// culvert.dev/rotate-key of its NodeTunnel.
	//
	// +optional
	// +kubebuilder:default=720
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=87600
	KeyLifetimeHours *int32 `json:"keyLifetimeHours,omitempty"`
}

// NodeEncryptionStatus is what was found and done.
type NodeEncryptionStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Accepted, Ready; Enforced once Strict is in effect on all nodes,
	// which from then on also nodes begin with that join.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Nodes is the number of nodes that take part.
	//
	// +optional
	Nodes int32 `json:"nodes,omitempty"`

	// ReadyNodes is the number of those that all others answer.
	//
	// +optional
	ReadyNodes int32 `json:"readyNodes,omitempty"`

	// TotalNodes is the number of the cluster's nodes.
	//
	// +optional
	TotalNodes int32 `json:"totalNodes,omitempty"`
}

// NodeTunnel is one node's part in the encryption between nodes. It is named after the
// node, and the node's agent alone writes it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=nodetunnels,singular=nodetunnel,shortName=ntun,scope=Cluster,categories=culvert
// +kubebuilder:printcolumn:name="Public key",type=string,JSONPath=`.spec.publicKey`
// +kubebuilder:printcolumn:name="Peers",type=integer,JSONPath=`.status.peers`
// +kubebuilder:printcolumn:name="Connected",type=integer,JSONPath=`.status.connectedPeers`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type NodeTunnel struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what the node offers.
	//
	// +required
	Spec NodeTunnelSpec `json:"spec"`

	// Status is what the node sees.
	//
	// +optional
	Status NodeTunnelStatus `json:"status,omitempty"`
}

// NodeTunnelList is a list of NodeTunnels.
//
// +kubebuilder:object:root=true
type NodeTunnelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NodeTunnel `json:"items"`
}

// NodeTunnelSpec is what a node offers.
type NodeTunnelSpec struct {
	// PublicKey of the node.
	//
	// +required
	PublicKey Key `json:"publicKey"`

	// NextPublicKey is a key that the node is about to change to: the others accept it from
	// now on.
	//
	// +optional
	NextPublicKey Key `json:"nextPublicKey,omitempty"`
}

// NodeTunnelStatus is what a node sees.
type NodeTunnelStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Ready; PodsHeld, while plain packets are dropped: whether pods wait for the guard
	// when the node boots.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Peers is the number of other nodes that this one has a tunnel to.
	//
	// +optional
	Peers int32 `json:"peers,omitempty"`

	// ConnectedPeers is the number of those that answer.
	//
	// +optional
	ConnectedPeers int32 `json:"connectedPeers,omitempty"`

	// SilentPeers names nodes that do not answer; at most 64 of them.
	//
	// +optional
	// +listType=map
	// +listMapKey=node
	// +kubebuilder:validation:MaxItems=64
	SilentPeers []SilentPeer `json:"silentPeers,omitempty"`

	// Exemptions are what this node lets pass in the clear, beside WireGuard itself, neighbour
	// discovery, MLD and DHCP.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=128
	Exemptions []string `json:"exemptions,omitempty"`

	// PlainPackets are the kinds of packets in the clear that were dropped, or in mode Permissive
	// seen, in the last ten minutes, with the first of each.
	//
	// +optional
	// +listType=map
	// +listMapKey=kind
	// +kubebuilder:validation:MaxItems=16
	PlainPackets []PlainPacket `json:"plainPackets,omitempty"`
}

// PlainPacket is the first of a kind of packets in the clear.
type PlainPacket struct {
	// Kind is as in the metric culvert_node_plain_packets_total, say "out_pods".
	Kind string `json:"kind"`

	// Source and Destination are its addresses.
	Source      string `json:"source"`
	Destination string `json:"destination"`

	// Protocol is IANA's number.
	Protocol int32 `json:"protocol"`

	// Dropped tells whether it was; otherwise it was let through.
	Dropped bool `json:"dropped"`

	// Time is when it was reported.
	Time metav1.Time `json:"time"`
}

// SilentPeer is a node that does not answer.
type SilentPeer struct {
	// Node is its name.
	Node string `json:"node"`

	// LastHandshakeTime is when it last did. Absent: never.
	//
	// +optional
	LastHandshakeTime *metav1.Time `json:"lastHandshakeTime,omitempty"`
}
