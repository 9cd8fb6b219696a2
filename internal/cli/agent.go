package cli

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/agent"
	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/process"
)

func newAgent() *cobra.Command {
	var opts agent.Options
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
	f.StringVar(&opts.HTTP, "http", "127.0.0.1:9591", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&opts.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	cmd.AddCommand(newAgentCleanup())
	return cmd
}

func newAgentCleanup() *cobra.Command {
	var log process.LogOptions
	var state string
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove from this node everything that an agent made",
		Long: `Removes the links, routes, rules and nftables tables that 'culvert agent' made on this node:
for one that was taken out of the cluster, or out of the DaemonSet's node selector. No agent
may run there any more, or it makes them again. It needs no API server; nothing that is not
Culvert's is touched.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usage.Wrap(err)
			}
			return agent.Cleanup(logger, state)
		},
	}
	f := cmd.Flags()
	f.StringVar(&state, "state", "/var/lib/culvert-agent", "the agent's directory: the guard in it goes, the key stays")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	return cmd
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
