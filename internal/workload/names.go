package workload

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net/netip"
	"strings"

	"github.com/culvert-vpn/culvert/internal/model"
)

// Labels and annotations of what the operator makes.
const (
	LabelName      = "app.kubernetes.io/name"
	LabelComponent = "app.kubernetes.io/component"
	LabelInstance  = "app.kubernetes.io/instance"
	LabelManagedBy = "app.kubernetes.io/managed-by"
	// LabelGateway and LabelGatewayNamespace name the VPNGateway that an object belongs to,
	// shortened like object names when they do not fit.
	LabelGateway          = "culvert.dev/gateway"
	LabelGatewayNamespace = "culvert.dev/gateway-namespace"

	// AnnotationDevice says on an address claim whose it is: namespace/name/uid.
	AnnotationDevice = "culvert.dev/device"
	// AnnotationAddress is the address of an address claim.
	AnnotationAddress = "culvert.dev/address"
	// AnnotationGateway is the VPNGateway of an address claim: namespace/name.
	AnnotationGateway = "culvert.dev/gateway"

	// Name is the value of LabelName, Operator that of LabelManagedBy.
	Name     = "culvert"
	Operator = "culvert-operator"
)

// Components, the values of LabelComponent.
const (
	ComponentGateway = "gateway" // what a gateway consists of
	ComponentGrant   = "grant"   // Roles to read single Secrets
	ComponentAddress = "address" // claims of device addresses
	ComponentDevice  = "device"  // devices' configurations
)

// Longest names: a StatefulSet's goes into a label together with a hash of eleven
// characters, a Secret's may be a whole DNS subdomain.
const (
	longestWorkload  = 63 - 11
	longestSubdomain = 253
	longestLabel     = 63
)

// GatewayName names the objects of a VPNGateway in its own namespace, its StatefulSet
// and Service among them: "culvert-NAME", shortened when NAME is long or has dots.
func GatewayName(gateway string) string {
	return shorten("culvert-", strings.ReplaceAll(gateway, ".", "-"), "", gateway, longestWorkload)
}

// KeySecret names the Secret with a gateway's WireGuard key.
func KeySecret(gateway string) string { return GatewayName(gateway) + "-key" }

// EndpointsConfigMap names the ConfigMap with the endpoints that a gateway's peers were
// last seen at.
func EndpointsConfigMap(gateway string) string { return GatewayName(gateway) + "-endpoints" }

// DeviceSecret names the Secret with a device's key pair and configuration.
func DeviceSecret(device string) string {
	return shorten("", device, "-wireguard", device, longestSubdomain)
}

// ClaimName names the claim of an address. IPv6 addresses are written out in full, so
// that the claims of two gateways can never meet.
func ClaimName(gateway string, a netip.Addr) string {
	text := strings.NewReplacer(".", "-", ":", "-").Replace(a.StringExpanded())
	return GatewayName(gateway) + "-" + text
}

// global names an object of a gateway where those of gateways of other namespaces are,
// too: the identity's hash is always part of it.
func global(prefix string, id model.ID) string {
	return prefix + shortened(strings.ReplaceAll(id.Name, ".", "-"), id.String(), longestWorkload-len(prefix))
}

// shorten is prefix, name and suffix, with a hash of the identity in the middle when the
// name was changed or the whole is too long.
func shorten(prefix, name, suffix, identity string, longest int) string {
	if name == identity && len(prefix)+len(name)+len(suffix) <= longest {
		return prefix + name + suffix
	}
	return prefix + shortened(name, identity, longest-len(prefix)-len(suffix)) + suffix
}

// shortened is as much of a name as fits, and eight hexadecimal digits of the identity's
// hash.
func shortened(name, identity string, longest int) string {
	sum := sha256.Sum256([]byte(identity))
	hash := hex.EncodeToString(sum[:4])
	if most := longest - len(hash) - 1; len(name) > most {
		name = strings.TrimRight(name[:most], "-.")
	}
	return name + "-" + hash
}

// labelValue is a name as a label's value.
func labelValue(name string) string { return shorten("", name, "", name, longestLabel) }

// Labels are on everything that belongs to a gateway.
func Labels(id model.ID, component string) map[string]string {
	return map[string]string{
		LabelName:             Name,
		LabelComponent:        component,
		LabelInstance:         labelValue(id.Name),
		LabelManagedBy:        Operator,
		LabelGateway:          labelValue(id.Name),
		LabelGatewayNamespace: id.Namespace,
	}
}

// selector picks the pods of a gateway; it can never change.
func selector(id model.ID) map[string]string {
	return map[string]string{LabelName: Name, LabelComponent: ComponentGateway, LabelGateway: labelValue(id.Name)}
}

func merged(under, over map[string]string) map[string]string {
	out := maps.Clone(under)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, over)
	return out
}
