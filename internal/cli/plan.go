package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
)

func newPlan() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "What would be configured, as text, without touching anything",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPlanGateway())
	return cmd
}

func newPlanGateway() *cobra.Command {
	var files []string
	var name string
	var diff bool
	var r running
	var out output
	var cluster clusterFlags
	cmd := &cobra.Command{
		Use:   "gateway [-f FILE…]",
		Short: "The network state that a gateway would apply",
		Long: `Prints the links, peers, connections, routes, rules, firewall and services that a gateway
would apply for these manifests, one per line, without touching anything. Keys are
redacted.

Without -f, and with a configured cluster, it plans for the objects there, with what operator
and gateway have told in status; Secrets are not read.

With --diff it asks the running gateway what it has applied, plans with that gateway's own
facts (addresses, MTU, datapaths), and prints what would change: "-" goes, "+" comes. Exit
code 1 when something would.`,
		Example: `  culvert plan gateway -f manifests/
  culvert plan gateway -f manifests/ -f new-site.yaml --diff`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if len(files) == 0 && !diff && cluster.wanted(cmd, "", "state", "socket") {
				lines, err := planOfCluster(cmd, &cluster, name)
				if err != nil {
					return err
				}
				return printLines(cmd, &out, lines)
			}
			gw, err := loadGateway(cmd, files, name)
			if err != nil {
				return err
			}
			facts, applied := plan.Facts{Now: time.Now()}, []string(nil)
			if diff {
				if facts, applied, err = r.facts(cmd.Context()); err != nil {
					return err
				}
			}
			facts.Addresses, _, _ = plan.Addresses(gw, plan.AddressBook(facts.Addresses))
			lines := plan.Gateway(gw, facts).State.Lines()
			if diff {
				lines = netstate.DiffLines(applied, lines)
			}
			err = printLines(cmd, &out, lines)
			if err == nil && diff && len(lines) > 0 {
				return errNo
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&files, "filename", "f", nil, "file or directory with manifests, - for standard input; may be repeated")
	f.StringVar(&name, "name", "", "which VPNGateway, when the manifests hold several: NAME or NAMESPACE/NAME")
	f.BoolVar(&diff, "diff", false, "print only the difference to the running gateway")
	r.flags(cmd)
	cluster.flags(cmd)
	out.flag(cmd)
	return cmd
}

func printLines(cmd *cobra.Command, out *output, lines []string) error {
	return out.print(cmd.OutOrStdout(), lines, func(w io.Writer) error {
		for _, l := range lines {
			if _, err := fmt.Fprintln(w, l); err != nil {
				return err
			}
		}
		return nil
	})
}

// loadGateway reads manifests and returns the one gateway that they are about. Problems
// go to standard error; they are not fatal: the rest is in effect.
func loadGateway(cmd *cobra.Command, files []string, name string) (*model.Gateway, error) {
	objects, problems, err := load(cmd, files)
	if err != nil {
		return nil, err
	}
	m := model.Parse(objects, model.ParseOptions{})
	for _, p := range append(problems, m.Problems...) {
		fmt.Fprintln(cmd.ErrOrStderr(), problemLine(p))
	}
	return gateway.Choose(m.Gateways, name)
}

// facts asks the running gateway for its facts and for what it has applied.
func (r *running) facts(ctx context.Context) (plan.Facts, []string, error) {
	var applied []string
	var public gateway.PublicFacts
	if err := r.get(ctx, "/v1/plan", &applied); err != nil {
		return plan.Facts{}, nil, err
	}
	if err := r.get(ctx, "/v1/facts", &public); err != nil {
		return plan.Facts{}, nil, err
	}
	facts, err := public.Facts()
	facts.Now = time.Now()
	return facts, applied, err
}
