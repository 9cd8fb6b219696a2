package cli

import (
	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/wireguard"
)

func newGateway() *cobra.Command {
	var opts gateway.Options
	var wg, ipsec string
	var log process.LogOptions
	cmd := &cobra.Command{
		Use:   "gateway --manifests DIR",
		Short: "Run a gateway on this host, from manifests, without Kubernetes",
		Long: `Runs the gateway that the manifests describe on this host (root, Linux) until it is
stopped: WireGuard in the kernel when that has it and in this process when not; IPsec by
strongSwan's charon, with ESP in the kernel or in charon. Changes of the manifests are
followed; what did not change is not touched.

The least that is needed is one VPNGateway:

  apiVersion: culvert.dev/v1alpha1
  kind: VPNGateway
  metadata: {name: edge, namespace: default}
  spec:
    cluster:
      podCIDRs: [10.244.0.0/16]
      serviceCIDRs: [10.96.0.0/16]
    deviceCIDRs: [10.99.0.0/24]
    expose: {address: vpn.example.com}

Keys, allocated addresses and peers' last endpoints are kept in --state: back it up.
Stopping the gateway (SIGTERM) takes down everything it made: from then on the host forwards
packets for the tunnels' ranges like any others, in plaintext. For restarts and upgrades use
--keep-on-stop: firewall and routes stay and keep such packets in.`,
		Example: `  culvert gateway --manifests /etc/culvert --state /var/lib/culvert
  culvert gateway --manifests . --state ./state --http 127.0.0.1:9586`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Manifests == "" {
				return usagef("--manifests is missing: the directory with the VPNGateway")
			}
			switch wg {
			case "auto":
			case string(wireguard.Kernel), string(wireguard.UserSpace):
				opts.WireGuard = wireguard.Datapath(wg)
			default:
				return usagef("--wireguard %q: use auto, %s or %s", wg, wireguard.Kernel, wireguard.UserSpace)
			}
			switch ipsec {
			case "auto":
			case string(netstate.KernelESP), string(netstate.LibIPsec):
				opts.IPsec = netstate.IPsecDatapath(ipsec)
			default:
				return usagef("--ipsec %q: use auto, %s or %s", ipsec, netstate.KernelESP, netstate.LibIPsec)
			}
			logger, err := process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usagef("%w", err)
			}
			opts.Logger = logger
			return gateway.Run(cmd.Context(), opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Manifests, "manifests", "", "directory with the manifests (*.yaml, *.yml, *.json)")
	f.StringVar(&opts.State, "state", defaultState, "directory for keys, addresses and sockets")
	f.StringVar(&opts.Name, "name", "", "which VPNGateway to run, when the manifests hold several: NAME or NAMESPACE/NAME")
	f.StringVar(&wg, "wireguard", "auto", "WireGuard datapath: auto, kernel or userspace")
	f.StringVar(&ipsec, "ipsec", "auto", "ESP datapath: auto, kernel or libipsec")
	f.StringVar(&opts.HTTP, "http", "127.0.0.1:9586", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&opts.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.BoolVar(&opts.KeepOnStop, "keep-on-stop", false, "leave links, routes and charon in place when stopped, for a successor")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	return cmd
}
