package operator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// deviceKeys is what is known of a device's Secret; the private key stays there.
type deviceKeys struct {
	public netstate.Key
	// made is the configuration that the Secret was last seen with, without its keys.
	made [sha256.Size]byte
}

var deviceLock sync.Mutex

const fieldPresharedKey = "spec.presharedKeySecretRef"

// A grant is in effect a moment after it was written.
const (
	grantAttempts = 20
	grantPause    = 100 * time.Millisecond
)

// deviceSecrets makes key pairs and keeps configurations current.
func (r *round) deviceSecrets(ctx context.Context) error {
	var work []*deviceState
	for _, id := range sortedIDs(r.devices) {
		if d := r.devices[id]; r.needsSecret(d) {
			work = append(work, d)
		} else {
			d.publicKey = d.PublicKey.String()
		}
	}
	return each(ctx, work, func(ctx context.Context, d *deviceState) error {
		var err error
		if d.PublicKey.IsZero() {
			err = r.keepSecret(ctx, d)
		} else {
			d.publicKey = d.PublicKey.String()
			err = r.dropSecret(ctx, d)
		}
		if err != nil {
			d.undecided = true
			return fmt.Errorf("configuration of device %s: %w", d.ID, err)
		}
		return nil
	})
}

// granted calls do until the operator's grant in a namespace is in effect. Where it was not in time
// for one, the others of the round do not wait for it: in a namespace that is being deleted, with
// its Roles gone, it never comes, and a thousand devices there would hold up everybody else's.
func (r *round) granted(ctx context.Context, namespace string, do func() error) error {
	for attempt := 0; ; attempt++ {
		err := do()
		if !apierrors.IsForbidden(err) {
			return err
		}
		if _, hopeless := r.ungranted.Load(namespace); hopeless || attempt == grantAttempts {
			r.ungranted.Store(namespace, true)
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(grantPause):
		}
	}
}

func (r *round) readSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	var s corev1.Secret
	err := r.granted(ctx, namespace, func() error {
		return r.Live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: name}, &s)
	})
	return &s, err
}

// keepSecret makes the Secret of a device, or brings its configuration up to date.
func (r *round) keepSecret(ctx context.Context, d *deviceState) error {
	config, err := r.configuration(ctx, d)
	if err != nil || d.waiting != nil && d.waiting.Field == fieldPresharedKey {
		return err
	}
	fingerprint := config.fingerprint()
	deviceLock.Lock()
	known, ok := r.Operator.devices[d.uid]
	deviceLock.Unlock()
	d.secret = workload.DeviceSecret(d.Name)
	if ok && known.made == fingerprint {
		d.publicKey = known.public.String()
		return nil
	}
	s, err := r.readSecret(ctx, d.Namespace, d.secret)
	switch {
	case apierrors.IsNotFound(err):
		known.public, err = r.makeSecret(ctx, d, config)
	case err == nil:
		known.public, err = r.updateSecret(ctx, d, config, s)
	}
	if err != nil {
		return err
	}
	if known.public.IsZero() { // what is there is not ours; it has been said
		d.secret = ""
		return nil
	}
	d.publicKey = known.public.String()
	known.made = fingerprint
	deviceLock.Lock()
	defer deviceLock.Unlock()
	r.Operator.devices[d.uid] = known
	return nil
}

// deviceConfig makes configurations of one device that differ in its private key only.
type deviceConfig struct {
	gateway   *model.Gateway
	device    model.Device
	facts     plan.Facts
	presented bool // all that it takes is known
}

// text is the configuration, or nothing when it is not known yet.
func (c *deviceConfig) text(private secret.Bytes) secret.Bytes {
	if !c.presented {
		return secret.Bytes{}
	}
	b, err := plan.DeviceConfig(c.gateway, &c.device, private, c.facts)
	if err != nil {
		return secret.Bytes{}
	}
	return b
}

func (c *deviceConfig) fingerprint() [sha256.Size]byte {
	return sha256.Sum256(c.text(secret.Bytes{}).Reveal())
}

// configuration gathers what a device's configuration is made of. What is missing is noted
// as d.waiting.
func (r *round) configuration(ctx context.Context, d *deviceState) (*deviceConfig, error) {
	c := &deviceConfig{device: *d.Device}
	gateway := *d.gateway.Gateway
	gateway.Address, gateway.WireGuardPort = d.gateway.address, d.gateway.port
	c.gateway = &gateway
	o := r.seen.gateways[d.gateway.ID]
	for _, text := range d.addresses {
		if a, err := netip.ParseAddr(text); err == nil {
			c.facts.Addresses = map[model.ID][]netip.Addr{d.ID: append(c.facts.Addresses[d.ID], a)}
		}
	}
	for _, x := range o.Status.Replicas {
		if mtu := int(x.MTU); mtu > 0 && (gateway.MTU == 0 || mtu < gateway.MTU) {
			gateway.MTU = mtu
		}
	}
	key, err := netstate.ParseKey(o.Status.PublicKey)
	if o.Status.PublicKey != "" && err == nil {
		c.facts.PublicKey = key
	}
	problem := func(reason, format string, args ...any) {
		d.waiting = &model.Problem{
			Kind: model.KindDevice, Object: d.ID, Field: "spec.gatewayRef", Reason: reason,
			Message: fmt.Sprintf(format, args...) + fmt.Sprintf("; until then Secret %s has keys but no %s", workload.DeviceSecret(d.Name), workload.SecretConfig),
		}
	}
	switch {
	case len(d.addresses) == 0:
	case c.facts.PublicKey.IsZero():
		problem(reasonGatewayNotReady, "VPNGateway %s has not said its public key yet: look whether its pods run", d.gateway.ID)
	case gateway.Address == "" || gateway.WireGuardPort == 0:
		problem(reasonGatewayAddressUnknown, "VPNGateway %s has no address that devices can dial: wait for its load balancer, or set its spec.expose.address", d.gateway.ID)
	default:
		c.presented = true
	}
	if ref := r.seen.devices[d.ID].Spec.PresharedKeySecretRef; ref != nil {
		return c, r.presharedKey(ctx, d, c, ref.Name, ref.Key)
	}
	return c, nil
}

func (r *round) presharedKey(ctx context.Context, d *deviceState, c *deviceConfig, name, key string) error {
	s, err := r.readSecret(ctx, d.Namespace, name)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	refuse := func(reason, format string, args ...any) {
		d.waiting = &model.Problem{Kind: model.KindDevice, Object: d.ID, Field: fieldPresharedKey, Reason: reason, Message: fmt.Sprintf(format, args...)}
	}
	value, there := s.Data[key] // of what is not there, nothing
	if !there {
		refuse(model.ReasonSecretNotFound, "there is no Secret %s/%s with key %q: create it", d.Namespace, name, key)
		return nil
	}
	if k, bad := netstate.ParseKey(string(bytes.TrimSpace(value))); bad == nil && !k.IsZero() {
		c.device.PresharedKey = secret.New(k[:])
	} else {
		refuse(model.ReasonInvalidSecret, "key %q of Secret %s/%s is no WireGuard pre-shared key (32 bytes in base64): put there what 'wg genpsk' prints", key, d.Namespace, name)
	}
	return nil
}

// makeSecret makes a key pair. Of two operators that do so at once, one is refused: their
// field managers differ and none of them uses force.
func (r *round) makeSecret(ctx context.Context, d *deviceState, c *deviceConfig) (netstate.Key, error) {
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return netstate.Key{}, fmt.Errorf("make key: %w", err)
	}
	keys := workload.Keys{Private: secret.New(private[:]), Public: netstate.Key(private.PublicKey())}
	c.device.PublicKey = keys.Public
	keys.Config = c.text(keys.Private)
	u, err := applyConfiguration(keys.Secret(workload.Holder{ID: d.ID, UID: d.uid}))
	if err != nil {
		return netstate.Key{}, errors.New("its Secret cannot be written down")
	}
	err = r.granted(ctx, d.Namespace, func() error {
		return r.Writer.Apply(ctx, client.ApplyConfigurationFromUnstructured(u.DeepCopy()), client.FieldOwner(Manager+"-"+r.process))
	})
	return keys.Public, err
}

// updateSecret brings the configuration in a Secret up to date. The zero key: the Secret
// is somebody else's.
func (r *round) updateSecret(ctx context.Context, d *deviceState, c *deviceConfig, s *corev1.Secret) (netstate.Key, error) {
	if r.foreign(d, s) {
		return netstate.Key{}, nil
	}
	if owner := ownerUID(s); owner != "" && owner != d.uid { // of a device of this name that is gone
		if err := r.Writer.Delete(ctx, s, client.Preconditions{UID: &s.UID}); client.IgnoreNotFound(err) != nil {
			return netstate.Key{}, err
		}
		return r.makeSecret(ctx, d, c)
	}
	private, ok := privateKey(s)
	if !ok {
		d.waiting = &model.Problem{
			Kind: model.KindDevice, Object: d.ID, Reason: model.ReasonInvalidSecret,
			Message: fmt.Sprintf("key %q of Secret %s/%s is no WireGuard private key: restore it from a backup, or delete the Secret to have a new one made", workload.SecretPrivateKey, s.Namespace, s.Name),
		}
		return netstate.Key{}, nil
	}
	keys := workload.Keys{Private: secret.New(private[:]), Public: netstate.Key(private.PublicKey())}
	c.device.PublicKey = keys.Public
	keys.Config = c.text(keys.Private)
	want := keys.Secret(workload.Holder{ID: d.ID, UID: d.uid})
	if keys.Config.IsZero() {
		want.Data[workload.SecretConfig] = s.Data[workload.SecretConfig] // an old one is better than none
	}
	same := bytes.Equal(want.Data[workload.SecretConfig], s.Data[workload.SecretConfig]) &&
		bytes.Equal(want.Data[workload.SecretPublicKey], s.Data[workload.SecretPublicKey]) && ownerUID(s) == d.uid
	if same {
		return keys.Public, nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": s.UID, "resourceVersion": s.ResourceVersion, "ownerReferences": want.OwnerReferences},
		"data":     map[string]any{workload.SecretConfig: want.Data[workload.SecretConfig], workload.SecretPublicKey: want.Data[workload.SecretPublicKey]},
	})
	if err != nil {
		return netstate.Key{}, errors.New("its Secret cannot be written down")
	}
	target := &corev1.Secret{ObjectMeta: s.ObjectMeta}
	err = r.granted(ctx, d.Namespace, func() error {
		return r.Writer.Patch(ctx, target, client.RawPatch(types.MergePatchType, patch), client.FieldOwner(Manager))
	})
	return keys.Public, err
}

// privateKey reads a device's private key; ok is false when there is none.
func privateKey(s *corev1.Secret) (key wgtypes.Key, ok bool) {
	material, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(s.Data[workload.SecretPrivateKey])))
	if err != nil {
		return key, false
	}
	key, err = wgtypes.NewKey(material)
	return key, err == nil
}

// foreign reports, and says, that a Secret of the name that a device's should have was not
// made here. One that was and lost its owner, as from a backup, is taken back.
func (r *round) foreign(d *deviceState, s *corev1.Secret) bool {
	if s.Labels[workload.LabelManagedBy] == workload.Operator && s.Labels[workload.LabelComponent] == workload.ComponentDevice {
		return false
	}
	d.waiting = &model.Problem{
		Kind: model.KindDevice, Object: d.ID, Field: "metadata.name", Reason: reasonSecretTaken,
		Message: fmt.Sprintf("Secret %s/%s, where the device's configuration is to go, is not Culvert's: rename one of them, or give the device a spec.publicKey", s.Namespace, s.Name),
	}
	return true
}

func ownerUID(s *corev1.Secret) types.UID {
	for _, o := range s.OwnerReferences {
		if o.Kind == model.KindDevice {
			return o.UID
		}
	}
	return ""
}

// dropSecret removes the Secret of a device that has a key of its own now.
func (r *round) dropSecret(ctx context.Context, d *deviceState) error {
	s, err := r.readSecret(ctx, d.Namespace, workload.DeviceSecret(d.Name))
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.Labels[workload.LabelManagedBy] != workload.Operator || ownerUID(s) != d.uid {
		return nil
	}
	return client.IgnoreNotFound(r.Writer.Delete(ctx, s, client.Preconditions{UID: &s.UID}))
}
