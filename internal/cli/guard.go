package cli

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/guard"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

func newGuard() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "guard",
		Short: "Look after the guard that keeps plain packets off the network between nodes",
		Long: `The guard is the nftables table culvert-guard, which a NodeEncryption has on every node. The
node's agent sets it, keeps it on disk, and restores it before anything else; these commands
do so without an agent and without an API server: at boot, or when something is wrong.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&state, "state", "/var/lib/culvert-agent", "the agent's directory")
	open := func() (*guard.Guard, error) {
		return guard.New(guard.Options{File: filepath.Join(state, guard.FileName)})
	}
	cmd.AddCommand(
		&cobra.Command{
			Use:   "restore",
			Short: "Put up the guard that was saved, unless one stands",
			Long: `Puts up the guard that the agent saved on this node, unless one stands. Run at boot before
the kubelet it closes the time until the agent's pod runs. Without a saved guard nothing
happens, and the exit code is 0.`,
			Example: "  culvert guard restore",
			Args:    noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				g, err := open()
				if err != nil {
					return err
				}
				standing, err := g.Restore(cmd.Context())
				if err != nil {
					return err
				}
				text := "no guard: none was saved"
				if standing {
					text = "the guard stands"
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), text)
				return err
			},
		},
		&cobra.Command{
			Use:   "show",
			Short: "Print the guard, what it has dropped, and whose packets they were",
			Long: `Prints the guard that is saved on this node, what the one in the kernel has dropped (or, in
mode Permissive, would have), and the last minutes' senders and receivers. The exit code is 1
when a guard is saved and none stands.`,
			Example: "  culvert guard show",
			Args:    noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				g, err := open()
				if err != nil {
					return err
				}
				return showGuard(cmd, g)
			},
		},
		&cobra.Command{
			Use:   "remove",
			Short: "Remove the guard from the kernel and from the disk",
			Long: `Removes the guard from the kernel and from the disk. Plain packets between nodes are not
dropped here any more, until an agent with a NodeEncryption runs again.`,
			Example: "  culvert guard remove",
			Args:    noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				g, err := open()
				if err != nil {
					return err
				}
				return g.Remove(cmd.Context())
			},
		})
	return cmd
}

func showGuard(cmd *cobra.Command, g *guard.Guard) error {
	saved, err := g.Saved()
	if err != nil {
		return err
	}
	o, err := g.Observe()
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	_, _ = fmt.Fprint(out, netstate.State{Guard: saved}.String())
	if o.Present {
		for _, kind := range slices.Sorted(maps.Keys(o.Dropped)) {
			_, _ = fmt.Fprintf(out, "%s %d\n", kind, o.Dropped[kind])
		}
	}
	for _, p := range o.Seen {
		_, _ = fmt.Fprintf(out, "seen %s from %s to %s protocol %d\n", p.Kind, p.From, p.To, p.Protocol)
	}
	switch {
	case saved != nil && !o.Present:
		return errors.New("a guard is saved, and none stands: 'culvert guard restore' puts it up")
	case saved == nil && !o.Present:
		_, _ = fmt.Fprintln(out, "no guard")
	}
	return nil
}
