package cli

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/agent"
	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/cni"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/process"
)

func newAgent() *cobra.Command {
	var opts agent.Options
	var cniOpts cniFlags
	var api kube.Options
	var log process.LogOptions
	cmd := &cobra.Command{
		Use:   "agent --node NAME",
		Short: "Run on a node of a cluster: lead its traffic for sites and devices to the gateways",
		Long: `Runs on every node of a cluster, as the chart's DaemonSet does (root, the host's network and
process identifiers). For VPNGateways with clusterTraffic.source: Preserve it

  - leads what the node and its pods send to sites and devices to the gateway's active pod:
    through a link of our own (VXLAN, UDP port 19604 between the nodes), or plainly, as
    clusterTraffic.nodeLink says; within a second of the pod's moving;
  - keeps the CNI from masquerading it;
  - lets nothing for those ranges leave by another route while no gateway pod is active;
  - sets the kernel settings of the gateway pods on the node, which they may not do themselves.

When it is stopped (SIGTERM) all of that stays in place, so that an upgrade interrupts
nothing. When its DaemonSet was deleted, which it asks the API server, everything goes. On a
node that an agent left otherwise, 'culvert agent cleanup' removes it.`,
		Example: `  culvert agent --node "$NODE_NAME"
  culvert agent --node worker-1 --kubeconfig admin.conf --http 127.0.0.1:9591`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Node == "" {
				return usage.Errorf("--node is missing: the name of the Node that this is, as 'kubectl get nodes' shows it")
			}
			logger, err := process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usage.Wrap(err)
			}
			config, namespace, err := api.Config()
			if err != nil {
				return err
			}
			if ns := os.Getenv("POD_NAMESPACE"); ns != "" {
				namespace = ns
			}
			opts.Logger = logger
			if opts.CNI, err = cniOpts.options(opts.State); err != nil {
				return err
			}
			opts.Cluster, err = agent.NewKubernetes(agent.KubernetesOptions{
				Config: config, Node: opts.Node, Namespace: namespace, DaemonSet: os.Getenv("DAEMONSET"), Logger: logger,
			})
			if err != nil {
				return err
			}
			return agent.Run(cmd.Context(), opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Node, "node", "", "the name of this node's Node object")
	f.StringVar(&api.Kubeconfig, "kubeconfig", "", "file that says where the API server is; empty: that of the cluster whose pod this is, or KUBECONFIG")
	f.StringVar(&opts.State, "state", "/var/lib/culvert-agent", "directory for this node's key and guard (NodeEncryption), which must outlive the agent and a restart of the node")
	f.Var(prefixes{&opts.PodRanges}, "pod-range", "range of the cluster's pods (repeatable), beyond those of Nodes and VPNGateways: with a NodeEncryption nothing leaves for it in the clear")
	cniOpts.flags(cmd, "", "")
	f.StringVar(&opts.CiliumSocket, "cilium-socket", "", "the socket of this node's Cilium agent (usually /var/run/cilium/cilium.sock), for gateways with nodeLink: CiliumEndpoint: Cilium is told not to verify the sources of their pods; empty: that link does not work")
	f.StringVar(&opts.HTTP, "http", "127.0.0.1:9591", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&opts.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	cmd.AddCommand(newAgentCleanup(), newAgentRemovable())
	return cmd
}

func newAgentCleanup() *cobra.Command {
	var log process.LogOptions
	var opts agent.Options
	var cniOpts cniFlags
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove from this node everything that an agent made",
		Long: `Removes the links, routes, rules and nftables tables that 'culvert agent' made on this node, and
its part of the network configuration (not the plug-in's program, which the container runtime
may ask for as long as pods live that it let in): for one that was taken out of the cluster, or out of the DaemonSet's node selector. No agent
may run there any more, or it makes them again. It needs no API server; nothing that is not
Culvert's is touched.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usage.Wrap(err)
			}
			opts.Logger = logger
			if opts.CNI, err = cniOpts.options(opts.State); err != nil {
				return err
			}
			return agent.Cleanup(opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.State, "state", "/var/lib/culvert-agent", "the agent's directory: the guard in it goes, the key stays")
	cniOpts.flags(cmd, "/etc/cni/net.d", "/opt/cni/bin")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	return cmd
}

// cniFlags say where the container runtime's network configuration is.
type cniFlags struct{ config, bin, root string }

func (c *cniFlags) flags(cmd *cobra.Command, config, bin string) {
	f := cmd.Flags()
	f.StringVar(&c.config, "cni-config", config, "the container runtime's directory with network configurations, on the host (usually /etc/cni/net.d): while NodeEncryption is Strict no pod gets a network before the guard stands; empty: pods do not wait")
	f.StringVar(&c.bin, "cni-bin", bin, "the container runtime's directory with network plug-ins, on the host (usually /opt/cni/bin)")
	f.StringVar(&c.root, "host-root", "/proc/1/root", "where the host's file system is to be found")
}

// options are nil when there is no configuration to change.
func (c *cniFlags) options(state string) (*cni.Options, error) {
	if c.config == "" {
		return nil, nil
	}
	if c.bin == "" {
		return nil, usage.Errorf("--cni-config needs --cni-bin: the directory that the container runtime finds network plug-ins in")
	}
	own, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return &cni.Options{Root: c.root, ConfigDir: c.config, BinDir: c.bin, State: state, Program: filepath.Join(filepath.Dir(own), cni.Plugin)}, nil
}

// prefixes is a flag of ranges.
type prefixes struct{ list *[]netip.Prefix }

// Set adds ranges, separated by commas.
func (p prefixes) Set(s string) error {
	for _, x := range strings.Split(s, ",") {
		c, err := netip.ParsePrefix(strings.TrimSpace(x))
		if err != nil {
			return fmt.Errorf("%q is not a range such as 10.244.0.0/16", x)
		}
		*p.list = append(*p.list, c.Masked())
	}
	return nil
}

// String lists the ranges.
func (p prefixes) String() string {
	if p.list == nil {
		return ""
	}
	var out []string
	for _, c := range *p.list {
		out = append(out, c.String())
	}
	return strings.Join(out, ",")
}

// Type is the kind of value that a usage text shows.
func (prefixes) Type() string { return "CIDR" }
