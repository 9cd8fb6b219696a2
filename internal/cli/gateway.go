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
	var pod podFlags
	cmd := &cobra.Command{
		Use:   "gateway (--manifests DIR | --name NAME)",
		Short: "Run a gateway on this host: from manifests without Kubernetes, or as a pod",
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

Without --manifests the gateway is a pod of a cluster: the objects come from the API server
(that of the pod's service account, or --kubeconfig), and its key, its peers' endpoints and
its reports go there. The operator starts it so, and says by the environment what pod it is:
POD_NAME, POD_NAMESPACE, POD_IPS, NODE_NAME, HOST_IPS. Its IKE daemon is another container of
the pod ('culvert gateway ipsec-daemon'), so that a restart of culvert loses no SA.

Keys, allocated addresses and peers' last endpoints are kept in --state: back it up.
Stopping the gateway (SIGTERM) takes down everything it made: from then on the host forwards
packets for the tunnels' ranges like any others, in plaintext. For restarts and upgrades use
--keep-on-stop: firewall and routes stay and keep such packets in.`,
		Example: `  culvert gateway --manifests /etc/culvert --state /var/lib/culvert
  culvert gateway --manifests . --state ./state --http 127.0.0.1:9586
  culvert gateway --namespace vpn --name edge --keep-on-stop`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Manifests == "" && opts.Name == "" {
				return usagef("--manifests is missing: the directory with the VPNGateway (or, in a cluster, --name NAME)")
			}
			if opts.Manifests == "" {
				if err := pod.complete(cmd, &opts); err != nil {
					return err
				}
			}
			switch wg {
			case "auto":
			case string(wireguard.Kernel), string(wireguard.UserSpace):
				opts.WireGuard = wireguard.Datapath(wg)
			default:
				return usagef("--wireguard %q: use auto, %s or %s", wg, wireguard.Kernel, wireguard.UserSpace)
			}
			var err error
			if opts.IPsec, err = ipsecDatapath(ipsec); err != nil {
				return err
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
	f.StringVar(&opts.Manifests, "manifests", "", "directory with the manifests (*.yaml, *.yml, *.json); none: objects of a cluster")
	f.StringVar(&opts.State, "state", defaultState, "directory for keys, addresses and sockets")
	f.StringVar(&opts.Name, "name", "", "which VPNGateway to run, in a cluster or when the manifests hold several: NAME or NAMESPACE/NAME")
	pod.flags(cmd)
	f.StringVar(&opts.IPsecDir, "ipsec-dir", "", "directory of an IKE daemon that 'culvert gateway ipsec-daemon' runs (in a pod: "+podIPsecDir+"); none: a child of this process")
	f.StringVar(&wg, "wireguard", "auto", "WireGuard datapath: auto, kernel or userspace")
	f.StringVar(&ipsec, "ipsec", "auto", "ESP datapath: auto, kernel or libipsec")
	f.StringVar(&opts.HTTP, "http", "127.0.0.1:9586", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&opts.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.BoolVar(&opts.KeepOnStop, "keep-on-stop", false, "leave links, routes and charon in place when stopped, for a successor (in a pod: the default)")
	logFlags(cmd, &log)
	cmd.AddCommand(newIPsecDaemon())
	return cmd
}

func logFlags(cmd *cobra.Command, log *process.LogOptions) {
	cmd.Flags().StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().StringVar(&log.Format, "log-format", "text", "text or json")
}

// ipsecDatapath reads --ipsec; empty: to be found out.
func ipsecDatapath(s string) (netstate.IPsecDatapath, error) {
	switch s {
	case "auto":
		return "", nil
	case string(netstate.KernelESP), string(netstate.LibIPsec):
		return netstate.IPsecDatapath(s), nil
	}
	return "", usagef("--ipsec %q: use auto, %s or %s", s, netstate.KernelESP, netstate.LibIPsec)
}
