package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/secret"
	"github.com/culvert-vpn/culvert/internal/source"
	"github.com/culvert-vpn/culvert/internal/store"
)

// deviceFlags are what all device commands share: where the manifests and the keys are.
type deviceFlags struct {
	manifests string
	state     string
	namespace string
	gateway   string
	cluster   clusterFlags
}

func newDevice() *cobra.Command {
	var d deviceFlags
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Add, list, configure and remove devices",
		Long: `Works on a directory of manifests and the state directory of its gateway. A running gateway
follows at once; none needs to run.

Without --manifests, when that directory is not there, it works on the Devices of a
configured cluster: the operator allocates addresses and makes keys.`,
		Example: `  culvert device add phone --manifests /etc/culvert
  culvert device config phone --manifests /etc/culvert --qr
  culvert device list --manifests /etc/culvert
  culvert device rm phone --manifests /etc/culvert
  culvert device add phone --kubeconfig ~/.kube/config --namespace vpn`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f := cmd.PersistentFlags()
	f.StringVar(&d.manifests, "manifests", "/etc/culvert", "directory with the gateway's manifests")
	f.StringVar(&d.state, "state", defaultState, "state directory of the gateway")
	f.StringVarP(&d.namespace, "namespace", "n", "default", "namespace of the device (in a cluster: default that of the kubeconfig)")
	d.cluster.flags(cmd)
	f.StringVar(&d.gateway, "gateway", "", "which VPNGateway, when the manifests hold several: NAME or NAMESPACE/NAME")
	cmd.AddCommand(newDeviceAdd(&d), newDeviceList(&d), newDeviceConfig(&d), newDeviceRemove(&d))
	return cmd
}

// site of the work: the parsed manifests and the state directory.
type deviceWork struct {
	gw    *model.Gateway
	model *model.Model
	store *store.Store
	facts plan.Facts
	book  map[string][]netip.Addr
}

func (d *deviceFlags) open(cmd *cobra.Command) (*deviceWork, error) {
	objects, problems, err := source.Load([]string{d.manifests}, nil)
	if err != nil {
		return nil, err
	}
	m := model.Parse(objects, model.ParseOptions{})
	for _, p := range append(problems, m.Problems...) {
		fmt.Fprintln(cmd.ErrOrStderr(), problemLine(p))
	}
	gw, err := gateway.Choose(m.Gateways, d.gateway)
	if err != nil {
		return nil, err
	}
	w := &deviceWork{gw: gw, model: m}
	if w.store, err = store.Open(d.state); err != nil {
		return nil, err
	}
	known, err := w.store.Objects()
	if err != nil {
		return nil, err
	}
	w.book = known.Addresses
	w.facts = plan.Facts{Now: time.Now()}
	w.facts.Addresses, _, _ = plan.Addresses(gw, known.Addresses)
	return w, nil
}

func (w *deviceWork) find(id model.ID) (*model.Device, error) {
	for _, d := range w.gw.Devices {
		if d.ID == id {
			return d, nil
		}
	}
	return nil, fmt.Errorf("gateway %s has no device %s: see 'culvert device list', or add it with 'culvert device add %s'", w.gw.ID, id, id.Name)
}

type deviceItem struct {
	Name      string       `json:"name"`
	Addresses []netip.Addr `json:"addresses"`
	PublicKey string       `json:"publicKey"`
	Access    string       `json:"access"`
	State     string       `json:"state"`
	Expires   *time.Time   `json:"expires,omitempty"`
}

func newDeviceList(d *deviceFlags) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the devices of the manifests",
		Long:  "Lists the devices of the manifests with their addresses. Who is connected: 'culvert status'.",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if c, err := d.inCluster(cmd); c != nil || err != nil {
				if err != nil {
					return err
				}
				return c.listDevices(cmd, &out)
			}
			w, err := d.open(cmd)
			if err != nil {
				return err
			}
			items := []deviceItem{}
			for _, dev := range w.gw.Devices {
				items = append(items, w.item(dev))
			}
			return out.print(cmd.OutOrStdout(), items, func(o io.Writer) error { return printDevices(o, items) })
		},
	}
	out.flag(cmd)
	return cmd
}

func (w *deviceWork) item(dev *model.Device) deviceItem {
	it := deviceItem{
		Name: dev.ID.String(), Addresses: w.facts.Addresses[dev.ID],
		PublicKey: dev.PublicKey.String(), Access: dev.Access.String(), State: "active",
	}
	if !dev.Expires.IsZero() {
		it.Expires = &dev.Expires
		if !dev.Expires.After(w.facts.Now) {
			it.State = "expired"
		}
	}
	if dev.Suspended {
		it.State = "suspended"
	}
	return it
}

func printDevices(o io.Writer, items []deviceItem) error {
	t := tabwriter.NewWriter(o, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tSTATE\tADDRESSES\tACCESS\tPUBLIC KEY\tEXPIRES")
	for _, it := range items {
		var addrs []string
		for _, a := range it.Addresses {
			addrs = append(addrs, a.String())
		}
		expires := "never"
		if it.Expires != nil {
			expires = it.Expires.UTC().Format(time.RFC3339)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", it.Name, it.State, orDash(strings.Join(addrs, ",")), it.Access, it.PublicKey, expires)
	}
	return t.Flush()
}

func newDeviceConfig(d *deviceFlags) *cobra.Command {
	var qr bool
	var file, socket string
	cmd := &cobra.Command{
		Use:   "config NAME",
		Short: "Print a device's wg-quick configuration, as text or QR code",
		Long: `Prints the configuration for the device's WireGuard app: text for wg-quick and the desktop
apps, a QR code for phones. It holds the device's private key when that was made here:
treat it like a password.`,
		Example: `  culvert device config phone --qr
  culvert device config laptop --file laptop.conf`,
		Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if qr && file != "" {
				return usagef("--qr and --file: choose one")
			}
			config, err := d.config(cmd, args[0], socket)
			if err != nil {
				return err
			}
			switch {
			case file != "":
				return writeSecret(file, config)
			case qr:
				return printQR(cmd.OutOrStdout(), config)
			}
			_, err = cmd.OutOrStdout().Write(config.Reveal())
			return err
		},
	}
	cmd.Flags().BoolVar(&qr, "qr", false, "print a QR code for the WireGuard app of a phone")
	cmd.Flags().StringVar(&file, "file", "", "write to this new file (mode 0600) instead of standard output")
	cmd.Flags().StringVar(&socket, "socket", "", "Unix socket of the gateway (default: run/culvert.sock in --state)")
	return cmd
}

// config is a device's configuration, of the manifests or of the cluster.
func (d *deviceFlags) config(cmd *cobra.Command, name, socket string) (secret.Bytes, error) {
	c, err := d.inCluster(cmd)
	if err != nil {
		return secret.Bytes{}, err
	}
	if c != nil {
		return c.deviceConfig(cmd.Context(), name)
	}
	w, err := d.open(cmd)
	if err != nil {
		return secret.Bytes{}, err
	}
	r := running{state: d.state, socket: socket}
	return w.config(cmd.Context(), model.ID{Namespace: d.namespace, Name: name}, &r)
}

func (w *deviceWork) config(ctx context.Context, id model.ID, r *running) (secret.Bytes, error) {
	dev, err := w.find(id)
	if err != nil {
		return secret.Bytes{}, err
	}
	if w.facts.PublicKey, err = w.store.GatewayPublicKey(); err != nil {
		return secret.Bytes{}, err
	}
	if w.facts.PublicKey.IsZero() {
		return secret.Bytes{}, errors.New("the gateway has no key yet: start it once, or make one with 'culvert keygen'")
	}
	// A running gateway knows the MTU of its underlay.
	if facts, _, err := r.facts(ctx); err == nil {
		w.facts.UnderlayMTU = facts.UnderlayMTU
	}
	private, pub, err := w.store.FindDeviceKey(id)
	if err != nil {
		return secret.Bytes{}, err
	}
	if dev.PublicKey.IsZero() && pub.IsZero() {
		return secret.Bytes{}, fmt.Errorf("device %s has no key yet: start the gateway once, it makes one", id)
	}
	if !dev.PublicKey.IsZero() && dev.PublicKey != pub {
		private = secret.Bytes{} // another key pair, made elsewhere
	}
	return plan.DeviceConfig(w.gw, dev, private, w.facts)
}

// writeSecret writes a new file that only its owner may read.
func writeSecret(path string, data secret.Bytes) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	_, err = f.Write(data.Reveal())
	return errors.Join(err, f.Close())
}

func newDeviceRemove(d *deviceFlags) *cobra.Command {
	return &cobra.Command{
		Use:     "rm NAME",
		Aliases: []string{"remove", "delete"},
		Short:   "Remove a device: its manifest and its key",
		Long: `Removes the manifest device-NAME.yaml and the device's key. A running gateway cuts the
device off at once, and its address is free again. A device that stands in another file
is left to you, and named.`,
		Args: exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if c, err := d.inCluster(cmd); c != nil || err != nil {
				if err != nil {
					return err
				}
				return c.removeDevice(cmd, args[0])
			}
			return d.remove(cmd, model.ID{Namespace: d.namespace, Name: args[0]})
		},
	}
}

func (d *deviceFlags) remove(cmd *cobra.Command, id model.ID) error {
	path := filepath.Join(d.manifests, "device-"+id.Name+".yaml")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no %s: if the device stands in another file of %s, remove it there", path, d.manifests)
	}
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	decoded, _ := source.Decode(data, path)
	if len(decoded) != 1 || decoded[0].Ref() != (model.Ref{Kind: "Device", ID: id}) {
		return fmt.Errorf("%s does not hold device %s alone: edit it by hand", path, id)
	}
	s, err := store.Open(d.state)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove manifest: %w", err)
	}
	if err := s.RemoveDeviceKey(id); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "device %s removed\n", id)
	return err
}
