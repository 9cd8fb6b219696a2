// Package cli is the command tree that people type.
//
// A command parses flags, calls one package and prints; it decides nothing itself.
// Output is for people unless -o json or -o yaml is given. Exit codes: 0 done or "yes",
// 1 the answer is "no" or the work failed, 2 the command line is wrong.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/process"
)

// Streams are the standard streams.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
}

// errNo ends a command with exit code 1 after it has said everything itself.
var errNo = errors.New("the answer is no")

// usageError is a wrong command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// Run runs one command line and returns the exit code.
func Run(ctx context.Context, args []string, s Streams) int {
	root := newRoot(s)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errNo):
		return 1
	case errors.As(err, &usage):
		fmt.Fprintf(s.Err, "culvert: %v\nSee '%s --help'.\n", err, cmd.CommandPath())
		return 2
	}
	fmt.Fprintf(s.Err, "culvert: %v\n", err)
	return 1
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
  culvert status                           who is connected`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Version:       process.Version(),
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetVersionTemplate("culvert {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(newGateway(), newValidate(), newPlan(), newStatus(), newDevice(), newKeygen(), newDemo())
	return root
}

// noArgs refuses positional arguments; on a command with subcommands it names them.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if !cmd.HasAvailableSubCommands() {
		return usagef("%q is one argument too many", args[0])
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return usagef("there is no command %q; did you mean %q?", args[0], near[0])
	}
	return usagef("there is no command %q", args[0])
}

// exactly takes the named positional arguments, all of them.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("%s is missing", strings.Join(names[len(args):], " "))
		}
		if len(args) > len(names) {
			return usagef("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

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
