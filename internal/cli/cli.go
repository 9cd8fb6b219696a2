// Package cli is the command tree that people type.
//
// A command parses flags, calls one package and prints; it decides nothing itself.
// Output is for people unless -o json or -o yaml is given. Exit codes: 0 done or "yes",
// 1 the answer is "no" or the work failed, 2 the command line is wrong.
package cli

import (
	"context"
	"encoding/json"
	"io"
	"iter"
	"maps"
	"slices"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/cli/tunnel"
	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/process"
)

// Streams are the standard streams, and the name that the program was called by.
type Streams struct {
	Program string // os.Args[0]; empty: culvert
	In      io.Reader
	Out     io.Writer
	Err     io.Writer
}

// errNo ends a command with exit code 1 after it has said everything itself.
var errNo = usage.ErrNo

func usagef(format string, args ...any) error { return usage.Errorf(format, args...) }

// Run runs one command line and returns the exit code.
func Run(ctx context.Context, args []string, s Streams) int {
	return usage.Run(ctx, newRoot(s), args, s.Err)
}

func newRoot(s Streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "culvert",
		Short: "A VPN that lives in Kubernetes",
		Long: `Culvert joins sites (on-prem networks) and devices (single machines) to a cluster's
nodes, pods and services, over WireGuard and IPsec.

Start with one of these:
  culvert validate -f site.yaml            check manifests, with field paths
  culvert plan gateway -f DIR              what a gateway would configure
  culvert gateway --manifests DIR          run a gateway, no Kubernetes needed
  culvert device add phone                 a device in one line
  culvert status                           who is connected
  culvert doctor                           what is wrong, and what to do

Installed as kubectl-culvert it is a plug-in of kubectl: kubectl culvert status.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usage.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Version:       process.Version(),
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetVersionTemplate("culvert {{.Version}}\n")
	root.AddCommand(tunnel.Commands()...)
	root.AddCommand(newJoin(), newGateway(), newOperator(), newAgent(), newGuard(), newValidate(), newPlan(), newStatus(), newDoctor(), newDevice(), newKeygen(), newDemo(), newCRDs())
	asPlugin(root, s.Program)
	return root
}

// noArgs refuses positional arguments.
func noArgs(cmd *cobra.Command, args []string) error { return usage.NoArgs(cmd, args) }

// exactly takes the named positional arguments, all of them.
func exactly(names ...string) cobra.PositionalArgs { return usage.Exactly(names...) }

// output is the -o flag.
type output struct{ format string }

func (o *output) flag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "text", "output format: text, json or yaml")
}

func (o *output) check() error {
	if !slices.Contains([]string{"text", "json", "yaml"}, o.format) {
		return usagef("--output %q: use text, json or yaml", o.format)
	}
	return nil
}

// print writes value in the machine format, or calls text for people.
func (o *output) print(w io.Writer, value any, text func(io.Writer) error) error {
	switch o.format {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(value)
	case "yaml":
		b, err := yaml.Marshal(value)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	return text(w)
}

// sorted walks a map in the order of its keys.
func sorted[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}
