// Package v1alpha1 holds the objects of culvert.dev/v1alpha1: what a person writes, and
// what Culvert reports back.
//
// The package is data only. Rules that one object can break alone stand beside the types
// as CEL, so that the API server refuses it at once; internal/model knows those rules and
// the ones across objects, and is what every command runs. Requested values are in spec;
// allocated and discovered ones are in status. References reach into the object's own
// namespace, except gatewayRef, which the gateway's owner must allow.
//
// +kubebuilder:object:generate=true
// +groupName=culvert.dev
package v1alpha1
