package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Device is a single machine that joins through a gateway over WireGuard.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=devices,singular=device,shortName=vdev,categories=culvert
// +kubebuilder:printcolumn:name="Gateway",type=string,JSONPath=`.spec.gatewayRef.name`
// +kubebuilder:printcolumn:name="Addresses",type=string,JSONPath=`.status.addresses`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Connected",type=string,JSONPath=`.status.conditions[?(@.type=="Connected")].status`
// +kubebuilder:printcolumn:name="Suspended",type=boolean,priority=1,JSONPath=`.spec.suspend`
// +kubebuilder:printcolumn:name="Expires",type=string,priority=1,JSONPath=`.spec.expirationTime`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Device struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is what is wanted.
	//
	// +required
	Spec DeviceSpec `json:"spec"`

	// Status is what was found and done.
	//
	// +optional
	Status DeviceStatus `json:"status,omitempty"`
}

// DeviceList is a list of Devices.
//
// +kubebuilder:object:root=true
type DeviceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Device `json:"items"`
}

// DeviceSpec is what is wanted of a device.
type DeviceSpec struct {
	// GatewayRef is the gateway that the device joins through.
	//
	// +required
	GatewayRef GatewayReference `json:"gatewayRef"`

	// PublicKey of the device. Absent: a key pair is made, and the device's whole
	// configuration is kept in a Secret.
	//
	// +optional
	PublicKey Key `json:"publicKey,omitempty"`

	// Addresses are wishes, at most one IPv4 and one IPv6 address out of the gateway's
	// deviceCIDRs. For each family that the gateway has ranges of and that is not named
	// here, the first free address is allocated. The addresses in use are in status.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=2
	// +kubebuilder:validation:XValidation:rule="self.size() < 2 || !isIP(self[0]) || !isIP(self[1]) || ip(self[0]).family() != ip(self[1]).family()",message="at most one IPv4 and one IPv6 address can be asked for"
	Addresses []IP `json:"addresses,omitempty"`

	// PresharedKeySecretRef names a WireGuard pre-shared key: 32 bytes in base64, as
	// "wg genpsk" prints it. Absent: none.
	//
	// +optional
	PresharedKeySecretRef *SecretKeyReference `json:"presharedKeySecretRef,omitempty"`

	// PersistentKeepaliveSeconds is the interval at which the device sends something, to
	// keep a NAT on its own side open: it is put into the device's configuration; 0: off.
	//
	// +optional
	// +kubebuilder:default=25
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=65535
	PersistentKeepaliveSeconds *int32 `json:"persistentKeepaliveSeconds,omitempty"`

	// Access says what the device may open connections to.
	//
	// +optional
	// +kubebuilder:default={}
	Access Access `json:"access,omitzero"`

	// Suspend locks the device out; its address stays reserved.
	//
	// +optional
	Suspend bool `json:"suspend,omitempty"`

	// ExpirationTime is when the device is locked out by itself. Absent: never.
	//
	// +optional
	// +kubebuilder:validation:XValidation:rule="self == self",message="a time is needed, as 2036-01-01T00:00:00Z"
	ExpirationTime *metav1.Time `json:"expirationTime,omitempty"` // the rule refuses a list, too, which the check of the format lets pass
}

// DeviceStatus is what was found and done.
type DeviceStatus struct {
	// ObservedGeneration is the generation of the spec that this status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Conditions: Accepted, ResolvedRefs, Programmed, Ready, Connected.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// Addresses in use, IPv4 first.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=2
	Addresses []string `json:"addresses,omitempty"`

	// PublicKey in use: the spec's, or that of the key pair that was made.
	//
	// +optional
	PublicKey string `json:"publicKey,omitempty"`

	// ConfigurationSecret is the name of the Secret with the device's configuration, when
	// its key pair was made by Culvert.
	//
	// +optional
	ConfigurationSecret string `json:"configurationSecret,omitempty"`

	// Endpoint is where the device was last seen, as address:port.
	//
	// +optional
	Endpoint string `json:"endpoint,omitempty"`
}
