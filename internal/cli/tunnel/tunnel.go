package tunnel

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/podapi"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// Commands are all that culvert-tunnel has.
func Commands() []*cobra.Command {
	return []*cobra.Command{NewHub(), NewSpoke(), NewEgress(), NewFront()}
}

// Run runs one command line of culvert-tunnel and returns the exit code.
func Run(ctx context.Context, args []string, out, errs io.Writer) int {
	root := &cobra.Command{
		Use:   "culvert-tunnel",
		Short: "The reversed tunnel of Culvert, without the rest",
		Long: `The commands of the reversed tunnel: a control plane reaches a cluster that only dials
out. They are the same as those of culvert; this program is smaller.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usage.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Version:       process.Version(),
	}
	root.SetOut(out)
	root.SetErr(errs)
	root.SetVersionTemplate("culvert-tunnel {{.Version}}\n")
	root.AddCommand(Commands()...)
	return usage.Run(ctx, root, args, errs)
}

// common are the flags that all loops have.
type common struct {
	tunnel.Common
	log process.LogOptions
}

func (c *common) flags(cmd *cobra.Command, http string) {
	f := cmd.Flags()
	f.StringVar(&c.HTTP, "http", http, "address:port for /healthz, /readyz, /metrics and /v1/status; empty: none")
	f.BoolVar(&c.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.StringVar(&c.log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&c.log.Format, "log-format", "text", "text or json")
}

func (c *common) start(cmd *cobra.Command) (tunnel.Common, error) {
	logger, err := process.NewLogger(cmd.ErrOrStderr(), c.log)
	if err != nil {
		return c.Common, usage.Wrap(err)
	}
	c.Logger = logger
	return c.Common, nil
}

// member are the flags of those who join.
type member struct {
	common
	join, state, secret, instance string
	least, most                   int
}

func (m *member) flags(cmd *cobra.Command, http, state string) {
	m.common.flags(cmd, http)
	f := cmd.Flags()
	f.StringVar(&m.join, "join", "", "file that 'culvert join' printed; needed the first time only")
	f.StringVar(&m.state, "state", state, "directory for the key and certificate")
	f.StringVar(&m.secret, "state-secret", "", "in a pod: Secret of the pod's namespace that takes the place of --state, for all replicas")
	f.StringVar(&m.instance, "instance", "", "how this one calls itself; empty: the host's name")
	f.IntVar(&m.least, "connections", 2, "connections to each hub")
	f.IntVar(&m.most, "max-connections", 8, "connections to each hub when all carry streams")
}

func (m *member) options(cmd *cobra.Command) (tunnel.MemberOptions, error) {
	c, err := m.start(cmd)
	opts := tunnel.MemberOptions{
		Common: c, Invitation: m.join, Keeper: tunnel.FileKeeper{Dir: m.state}, Instance: m.instance, Least: m.least, Most: m.most,
	}
	if err == nil && m.secret != "" {
		var api *podapi.Client
		if api, err = podapi.New(""); err == nil {
			opts.Keeper = tunnel.PodKeeper{API: api, Secret: m.secret}
		}
	}
	return opts, err
}
