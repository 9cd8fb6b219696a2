package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/demo"
)

func newDemo() *cobra.Command {
	opts := demo.Options{Name: demo.DefaultName}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on this machine: sites, devices and a cluster in namespaces",
		Long: `Builds a small internet out of network namespaces: a cluster's network with a Culvert
gateway, an IPsec site (unmodified strongSwan behind NAT), a WireGuard site (a second
Culvert) and two devices (stock WireGuard). Prints who reached whom, seen from which
address, how fast, and who was rightly kept out. Leaves nothing behind.`,
		Example: `  culvert demo
  culvert demo --keep     # stay up to look around
  culvert demo down`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.Out = cmd.OutOrStdout()
			err := demo.Run(cmd.Context(), opts)
			if errors.Is(err, demo.ErrUnexpected) {
				return errNo
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&opts.Keep, "keep", false, "leave the demo up")
	cmd.PersistentFlags().StringVar(&opts.Name, "name", opts.Name, "name of the demo, when there are several")
	cmd.AddCommand(&cobra.Command{
		Use:    "serve ADDRESS…",
		Hidden: true, // what runs on the demo's hosts
		RunE:   func(cmd *cobra.Command, args []string) error { return demo.Serve(cmd.Context(), args) },
	})
	cmd.AddCommand(&cobra.Command{
		Use:   "down",
		Short: "Remove a demo that was left up",
		Args:  noArgs,
		RunE:  func(*cobra.Command, []string) error { return demo.Down(opts.Name) },
	})
	return cmd
}
