package tunnel

import (
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// DefaultState is where the hub's side keeps its state.
const DefaultState = "/var/lib/culvert"

// NewHub is the command hub.
func NewHub() *cobra.Command {
	var opts tunnel.HubOptions
	var c common
	var from []string
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
connections end for up to 60 s while new ones go to the other hubs.`,
		Example: `  culvert hub --manifests /etc/culvert --state /var/lib/culvert
  culvert hub --manifests . --replica 1 --listen-spokes :8444 --listen-clients :8134 --http 127.0.0.1:9597 \
    --address hub.example.com:8443 --address hub.example.com:8444`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if opts.Manifests == "" {
				return usage.Errorf("--manifests is missing: the directory with the RemoteCluster")
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
	f.StringArrayVar(&opts.Names, "server-name", nil, "one more DNS name or address for the hub's certificate, as clients write it (repeat)")
	f.StringArrayVar(&from, "proxy-protocol-from", nil, "range of a front that sends the PROXY protocol on the spokes' port (repeat)")
	return cmd
}

// hubFlags are those that "culvert join" needs as well, to print where the hubs are.
func hubFlags(cmd *cobra.Command, opts *tunnel.HubOptions) {
	f := cmd.Flags()
	f.StringVar(&opts.Manifests, "manifests", "", "directory with the manifests (*.yaml, *.yml, *.json)")
	f.StringVar(&opts.State, "state", DefaultState, "directory for authorities, tokens and keys")
	f.StringVar(&opts.Clients, "listen-clients", ":8132", "address:port for clients")
	f.StringArrayVar(&opts.Addresses, "address", nil, "host:port where spokes reach the hubs, one for all or one for each (repeat); empty: spec.front.address")
	f.StringArrayVar(&opts.ClientAddresses, "client-address", nil, "host:port where clients reach the hubs, one for all or one for each (repeat); empty: 127.0.0.1 and the port of --listen-clients")
	if cmd.Flags().Lookup("name") == nil {
		f.StringVar(&opts.Name, "name", "", "which RemoteCluster, when the manifests hold several: NAME or NAMESPACE/NAME")
	}
}
