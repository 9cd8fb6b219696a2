package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/source"
)

type deviceAdd struct {
	publicKey string
	addresses []string
	access    []string
	expires   string
}

func newDeviceAdd(d *deviceFlags) *cobra.Command {
	var a deviceAdd
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a device: a key, an address, a manifest",
		Long: `Writes the manifest device-NAME.yaml, or makes the Device in a cluster. Without --public-key a key pair is made and its
private half kept in the state directory, for 'culvert device config'. Without --address
the first free address of each of the gateway's device ranges is taken.`,
		Example: `  culvert device add phone
  culvert device add laptop --public-key 'zV2…=' --access Pods,Services,Sites
  culvert device add guest --expires 24h`,
		Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if c, err := d.inCluster(cmd); c != nil || err != nil {
				if err != nil {
					return err
				}
				return a.inCluster(cmd, c, d, args[0])
			}
			w, err := d.open(cmd)
			if err != nil {
				return err
			}
			id := model.ID{Namespace: d.namespace, Name: args[0]}
			path, addrs, err := a.add(w, d, id)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "device %s: %s, in %s\nnext: culvert device config %s --manifests %s --state %s --qr\n",
				id, addrs, path, id.Name, d.manifests, d.state)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&a.publicKey, "public-key", "", "the device's public key, when its key pair was made on the device")
	f.StringSliceVar(&a.addresses, "address", nil, "the device's address, one per family at most")
	f.StringSliceVar(&a.access, "access", nil, "what the device may open: Pods, Services, Nodes, Sites (default Pods,Services)")
	f.StringVar(&a.expires, "expires", "", "when it is locked out: a duration from now (24h) or a time (2027-01-31T00:00:00Z)")
	return cmd
}

var objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// add writes the manifest; it refuses what the gateway would refuse.
func (a *deviceAdd) add(w *deviceWork, d *deviceFlags, id model.ID) (path, addrs string, err error) {
	if !objectName.MatchString(id.Name) {
		return "", "", usagef("NAME %q: use lower-case letters, digits, '-' and '.'", id.Name)
	}
	if _, err := w.find(id); err == nil {
		return "", "", fmt.Errorf("device %s exists already: remove it first, or take another name", id)
	}
	object, err := a.object(id, w.gw.ID, w.facts.Now)
	if err != nil {
		return "", "", err
	}
	object.Spec.PublicKey = v1alpha1.Key(a.publicKey)
	if a.publicKey == "" {
		_, pub, err := w.store.DeviceKey(id)
		if err != nil {
			return "", "", err
		}
		object.Spec.PublicKey = v1alpha1.Key(pub.String())
	}
	path = filepath.Join(d.manifests, "device-"+id.Name+".yaml")
	if err := w.complete(d, &object); err != nil {
		if a.publicKey == "" {
			err = errors.Join(err, w.store.RemoveDeviceKey(id))
		}
		return "", "", err
	}
	var list []string
	for _, x := range object.Spec.Addresses {
		list = append(list, string(x))
	}
	return path, strings.Join(list, ", "), writeManifest(path, object)
}

// object is the Device that the flags ask for, without a key.
func (a *deviceAdd) object(id, gateway model.ID, now time.Time) (v1alpha1.Device, error) {
	o := v1alpha1.Device{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "Device"},
		ObjectMeta: metav1.ObjectMeta{Name: id.Name, Namespace: id.Namespace},
	}
	o.Spec.GatewayRef.Name = gateway.Name
	if gateway.Namespace != id.Namespace {
		o.Spec.GatewayRef.Namespace = gateway.Namespace
	}
	for _, t := range a.access {
		o.Spec.Access.To = append(o.Spec.Access.To, v1alpha1.AccessTarget(t))
	}
	for _, x := range a.addresses {
		o.Spec.Addresses = append(o.Spec.Addresses, v1alpha1.IP(x))
	}
	var err error
	o.Spec.ExpirationTime, err = expiration(a.expires, now)
	return o, err
}

// complete checks the device beside all the others, and gives it its addresses.
func (w *deviceWork) complete(d *deviceFlags, object *v1alpha1.Device) error {
	data, err := yaml.Marshal(object)
	if err != nil {
		return err
	}
	objects, _, err := source.Load([]string{d.manifests, "-"}, strings.NewReader(string(data)))
	if err != nil {
		return err
	}
	id := model.ID{Namespace: object.Namespace, Name: object.Name}
	m := model.Parse(objects, model.ParseOptions{})
	for _, p := range m.Problems {
		if p.Kind == "Device" && p.Object == id {
			p.Origin = ""
			return errors.New(problemLine(p))
		}
	}
	gw, err := gateway.Choose(m.Gateways, d.gateway)
	if err != nil {
		return err
	}
	book, _, problems := plan.Addresses(gw, w.book)
	for _, p := range problems {
		if p.Object == id {
			return errors.New(problemLine(p))
		}
	}
	object.Spec.Addresses = nil
	for _, a := range book[id] {
		object.Spec.Addresses = append(object.Spec.Addresses, v1alpha1.IP(a.String()))
	}
	return nil
}

// expiration reads a duration from now or a time; empty: nil, never.
func expiration(s string, now time.Time) (*metav1.Time, error) {
	if s == "" {
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		d, derr := time.ParseDuration(s)
		if derr != nil || d <= 0 {
			return nil, usagef("--expires %q: give a duration such as 24h, or a time such as 2027-01-31T00:00:00Z", s)
		}
		t = now.Add(d)
	}
	if !t.After(now) {
		return nil, usagef("--expires %q is over already", s)
	}
	m := metav1.NewTime(t.UTC().Truncate(time.Second))
	return &m, nil
}

// writeManifest writes a new file, completely or not at all.
func writeManifest(path string, object v1alpha1.Device) error {
	data, err := yaml.Marshal(struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        map[string]string   `json:"metadata"`
		Spec            v1alpha1.DeviceSpec `json:"spec"`
	}{object.TypeMeta, map[string]string{"name": object.Name, "namespace": object.Namespace}, object.Spec})
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s exists already", path)
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.WriteFile(tmp, data, 0o644); err != nil { //nolint:gosec // holds no secret: others may validate it
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	return nil
}
