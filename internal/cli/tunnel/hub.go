package tunnel

import (
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/podapi"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// DefaultState is where the hub's side keeps its state.
const DefaultState = "/var/lib/culvert"

// NewHub is the command hub.
func NewHub() *cobra.Command {
	var opts tunnel.HubOptions
	var c common
	var from []string
	var pod hubPod
	cmd := &cobra.Command{
		Use:   "hub --manifests DIR",
		Short: "Accept the spokes of a remote cluster, and open connections through them",
		Long: `Runs one hub of the RemoteCluster that the manifests describe. Spokes dial in, prove by
their certificate that they belong to this RemoteCluster, and then connect to targets for
the hub's clients: 'culvert egress', or anything that speaks HTTP CONNECT over TLS with a
client certificate. What may be dialled is spec.targets; the spoke has a policy of its own.

The least that is needed:

  apiVersion: culvert.dev/v1alpha1
  kind: RemoteCluster
  metadata: {name: prod, namespace: default}
  spec:
    front: {address: "tunnel.example.com:8443"}
    targets:
    - cidrs: [10.0.0.0/8]
      ports: [{port: 443}, {port: 10250}]

Authorities, tokens and the list of revoked certificates are kept in --state; hubs of one
RemoteCluster on one host share it, each with its --replica. Stopping it (SIGTERM) lets open
connections end for up to 60 s while new ones go to the other hubs.

In a pod, with --remote-cluster, the object comes from the API server, --state-secret takes
the place of --state, and the number at the end of the pod's name that of --replica; the
object's status then shows who is connected. The operator starts hubs so.`,
		Example: `  culvert hub --manifests /etc/culvert --state /var/lib/culvert
  culvert hub --manifests . --replica 1 --listen-spokes :8444 --listen-clients :8134 --http 127.0.0.1:9597 \
    --address hub.example.com:8443 --address hub.example.com:8444`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if opts.Cluster, err = pod.complete(opts.Manifests); err != nil {
				return err
			}
			if err := lifetimes(cmd, &opts.Lifetimes); err != nil {
				return err
			}
			for _, s := range from {
				p, err := netip.ParsePrefix(s)
				if err != nil {
					return usage.Errorf("--proxy-protocol-from %q: write a range such as 10.0.0.0/8", s)
				}
				opts.ProxyProtocolFrom = append(opts.ProxyProtocolFrom, p.Masked())
			}
			if opts.Common, err = c.start(cmd); err != nil {
				return err
			}
			return tunnel.RunHub(cmd.Context(), opts)
		},
	}
	c.flags(cmd, "127.0.0.1:9587")
	hubFlags(cmd, &opts)
	f := cmd.Flags()
	f.IntVar(&opts.Replica, "replica", 0, "which of the RemoteCluster's hubs this is")
	f.StringVar(&opts.Spokes, "listen-spokes", ":8443", "address:port for spokes")
	f.StringArrayVar(&opts.Names, "server-name", nil, "one more DNS name or address for the hub's certificate, as clients write it (repeat; {replica} stands for its number)")
	f.StringArrayVar(&from, "proxy-protocol-from", nil, "range of a front that sends the PROXY protocol on the spokes' port (repeat)")
	f.DurationVar(&opts.Lifetimes.Leaf, "certificate-lifetime", 0, "how long the certificates are valid that it issues, 10s to 168h; they are renewed after about half of it (default 168h, or the environment variable "+leafVariable+")")
	f.DurationVar(&opts.Lifetimes.Authority, "authority-lifetime", 0, "how long authorities are valid that it makes; the next one is made when a fifth of it is left (default 43800h, or the environment variable "+authorityVariable+")")
	f.StringVar(&pod.remoteCluster, "remote-cluster", "", "in a pod: name of the RemoteCluster, in the pod's namespace")
	f.StringVar(&pod.secret, "state-secret", "", "in a pod: Secret that takes the place of --state")
	return cmd
}

// Environment variables for hubs that the operator makes, whose arguments are its own
// (chart: hubPods.extraEnv).
const (
	leafVariable      = "CULVERT_CERTIFICATE_LIFETIME"
	authorityVariable = "CULVERT_AUTHORITY_LIFETIME"
)

// lifetimes takes what no flag says from the environment, and checks it.
func lifetimes(cmd *cobra.Command, l *pki.Lifetimes) error {
	for _, x := range []struct {
		flag, variable string
		into           *time.Duration
	}{{"certificate-lifetime", leafVariable, &l.Leaf}, {"authority-lifetime", authorityVariable, &l.Authority}} {
		text := os.Getenv(x.variable)
		if text == "" || cmd.Flags().Changed(x.flag) {
			continue
		}
		d, err := time.ParseDuration(text)
		if err != nil {
			return usage.Errorf("%s %q: write a duration such as 24h", x.variable, text)
		}
		*x.into = d
	}
	if err := l.Check(); err != nil {
		return usage.Wrap(err)
	}
	return nil
}

// hubPod are the flags of a hub in a pod.
type hubPod struct{ remoteCluster, secret string }

// complete is nil for a hub that works from files.
func (p hubPod) complete(manifests string) (*tunnel.HubPod, error) {
	switch {
	case p.remoteCluster == "" && manifests == "":
		return nil, usage.Errorf("--manifests is missing: the directory with the RemoteCluster")
	case p.remoteCluster == "":
		return nil, nil //nolint:nilnil // as said
	case manifests != "":
		return nil, usage.Errorf("--manifests and --remote-cluster: give one of them")
	case p.secret == "":
		return nil, usage.Errorf("--state-secret is missing: the Secret for authorities and tokens")
	}
	pod := os.Getenv("POD_NAME")
	if pod == "" {
		return nil, usage.Errorf("--remote-cluster: the environment variable POD_NAME is not set: the pod's name (downward API)")
	}
	api, err := podapi.New("")
	if err != nil {
		return nil, err
	}
	return &tunnel.HubPod{API: api, Namespace: api.Namespace(), Name: p.remoteCluster, Secret: p.secret, Pod: pod}, nil
}

// hubFlags are those that "culvert join" needs as well, to print where the hubs are.
func hubFlags(cmd *cobra.Command, opts *tunnel.HubOptions) {
	f := cmd.Flags()
	f.StringVar(&opts.Manifests, "manifests", "", "directory with the manifests (*.yaml, *.yml, *.json)")
	f.StringVar(&opts.State, "state", DefaultState, "directory for authorities, tokens and keys")
	f.StringVar(&opts.Clients, "listen-clients", ":8132", "address:port for clients")
	f.StringArrayVar(&opts.Addresses, "address", nil, "host:port where spokes reach the hubs, one for all or one for each (repeat); empty: spec.front.address")
	f.StringArrayVar(&opts.ClientAddresses, "client-address", nil, "host:port where clients reach the hubs, one for all or one for each (repeat, or {replica} for its number); empty: 127.0.0.1 and the port of --listen-clients")
	if cmd.Flags().Lookup("name") == nil {
		f.StringVar(&opts.Name, "name", "", "which RemoteCluster, when the manifests hold several: NAME or NAMESPACE/NAME")
	}
}
