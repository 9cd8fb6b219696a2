package store

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// PrivateKeyName is the key in the data of a gateway's Secret: the private key in base64,
// as "wg genkey" prints it.
const PrivateKeyName = "private-key"

const endpointsName = "endpoints.json.gz"

// Kube is what a gateway in a cluster keeps in the API: its key in a Secret, its peers'
// endpoints in a ConfigMap, both owned by the VPNGateway. What a standalone gateway keeps
// beside these, addresses and the order in which objects came, an API server knows itself.
//
//	culvert-NAME-key        made once, immutable, never replaced
//	culvert-NAME-endpoints  where peers were last seen
type Kube struct {
	client  client.Client
	gateway model.ID
	manager string // field manager
}

// NewKube is for one gateway; manager names who writes, "culvert-gateway/POD".
func NewKube(c client.Client, gateway model.ID, manager string) *Kube {
	return &Kube{client: c, gateway: gateway, manager: manager}
}

// GatewayKey reads the gateway's key, making it when there is none yet. The VPNGateway,
// whose uid is given, owns it.
//
// A Secret that is there and cannot be used is an error: a new key would lock out every
// peer.
func (k *Kube) GatewayKey(ctx context.Context, uid types.UID) (secret.Bytes, netstate.Key, error) {
	name := workload.KeySecret(k.gateway.Name)
	private, pub, err := k.readKey(ctx, name)
	if !apierrors.IsNotFound(err) {
		return private, pub, err
	}
	made, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("make key: %w", err)
	}
	err = k.apply(ctx, k.unique(), false, map[string]any{
		"apiVersion": "v1", "kind": "Secret", "metadata": k.meta(name, uid), "type": string(corev1.SecretTypeOpaque), "immutable": true,
		// Twice base64: once ours, once that of every Secret.
		"data": map[string]any{PrivateKeyName: []byte(base64.StdEncoding.EncodeToString(made[:]) + "\n")},
	}, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: k.gateway.Namespace, Name: name}})
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsInvalid(err) {
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("make Secret %s/%s for the gateway's key: %w", k.gateway.Namespace, name, err)
	}
	return k.readKey(ctx, name) // ours, or that of whoever was faster
}

// readKey returns an error that apierrors.IsNotFound knows when there is no Secret.
func (k *Kube) readKey(ctx context.Context, name string) (secret.Bytes, netstate.Key, error) {
	var s corev1.Secret
	if err := k.client.Get(ctx, client.ObjectKey{Namespace: k.gateway.Namespace, Name: name}, &s); err != nil {
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("read the gateway's key: %w", err)
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(s.Data[PrivateKeyName])))
	if err != nil || private == (wgtypes.Key{}) {
		// The parser's own words may hold the key.
		return secret.Bytes{}, netstate.Key{}, fmt.Errorf("the gateway's key: Secret %s/%s: key %q is no WireGuard private key in base64: restore the Secret from a backup, or delete it to have a new one made (peers must then be told)", k.gateway.Namespace, name, PrivateKeyName)
	}
	return secret.New(private[:]), netstate.Key(private.PublicKey()), nil
}

// Endpoints reads what SaveEndpoints wrote; an empty map when nothing was, or when it is
// damaged: it only speeds up a restart. The error is about the API server.
func (k *Kube) Endpoints(ctx context.Context) (map[netstate.Key]netip.AddrPort, error) {
	name := workload.EndpointsConfigMap(k.gateway.Name)
	var c corev1.ConfigMap
	err := k.client.Get(ctx, client.ObjectKey{Namespace: k.gateway.Namespace, Name: name}, &c)
	if apierrors.IsNotFound(err) {
		return map[netstate.Key]netip.AddrPort{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the peers' endpoints: %w", err)
	}
	return unpackEndpoints(c.BinaryData[endpointsName]), nil
}

// SaveEndpoints keeps where peers were last seen.
func (k *Kube) SaveEndpoints(ctx context.Context, uid types.UID, m map[netstate.Key]netip.AddrPort) error {
	name := workload.EndpointsConfigMap(k.gateway.Name)
	packed, err := packEndpoints(m)
	if err != nil {
		return err
	}
	err = k.apply(ctx, k.manager, true, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": k.meta(name, uid),
		"binaryData": map[string]any{endpointsName: packed},
	}, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: k.gateway.Namespace, Name: name}})
	if err != nil {
		return fmt.Errorf("keep the peers' endpoints in ConfigMap %s/%s: %w", k.gateway.Namespace, name, err)
	}
	return nil
}

func packEndpoints(m map[netstate.Key]netip.AddrPort) ([]byte, error) {
	list := make(map[string]netip.AddrPort, len(m))
	for key, v := range m {
		list[key.String()] = v
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := json.NewEncoder(z).Encode(list); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// mostEndpoints bounds what is unpacked, in bytes: 100,000 peers.
const mostEndpoints = 16 << 20

func unpackEndpoints(packed []byte) map[netstate.Key]netip.AddrPort {
	out := map[netstate.Key]netip.AddrPort{}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return out
	}
	var list map[string]netip.AddrPort
	if err := json.NewDecoder(io.LimitReader(z, mostEndpoints)).Decode(&list); err != nil {
		return out
	}
	for k, v := range list {
		if key, err := netstate.ParseKey(k); err == nil && v.IsValid() {
			out[key] = v
		}
	}
	return out
}

// meta is the metadata of an object that the VPNGateway owns.
func (k *Kube) meta(name string, uid types.UID) map[string]any {
	return map[string]any{
		"name": name, "namespace": k.gateway.Namespace,
		"labels": map[string]any{
			workload.LabelName: workload.Name, workload.LabelComponent: workload.ComponentGateway,
			workload.LabelManagedBy: "culvert-gateway", workload.LabelGateway: workload.Labels(k.gateway, workload.ComponentGateway)[workload.LabelGateway],
		},
		"ownerReferences": []any{map[string]any{
			"apiVersion": v1alpha1.GroupVersion.String(), "kind": "VPNGateway", "name": k.gateway.Name, "uid": string(uid),
		}},
	}
}

// unique is a field manager that nobody had before: what it applies without force never
// replaces anything, not even what an earlier process of the same pod has made.
func (k *Kube) unique() string {
	return k.manager + "/" + rand.Text()
}

// apply is a server-side apply: unlike a create it is authorized by the object's name, so
// that a gateway needs the right to make this one object only.
func (k *Kube) apply(ctx context.Context, manager string, force bool, object map[string]any, at client.Object) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	options := []client.PatchOption{client.FieldOwner(manager)}
	if force {
		options = append(options, client.ForceOwnership)
	}
	return k.client.Patch(ctx, at, client.RawPatch(types.ApplyPatchType, body), options...)
}
