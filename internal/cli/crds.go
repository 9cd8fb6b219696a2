package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/kube"
)

// newCRDs is for the chart's Job; people have kubectl.
func newCRDs() *cobra.Command {
	var k kube.Options
	var dir string
	cmd := &cobra.Command{
		Use:    "crds",
		Short:  "Bring the cluster's CRDs up to date",
		Long:   "Makes the cluster's CRDs those of the files in a directory, and waits until they are served. Nothing is deleted.",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, _, err := k.Config()
			if err != nil {
				return err
			}
			return kube.ApplyCRDs(cmd.Context(), config, dir, func(name string) { fmt.Fprintln(cmd.OutOrStdout(), name) })
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "crds", "directory with the CRDs, one to a file")
	cmd.Flags().StringVar(&k.Kubeconfig, "kubeconfig", "", "API server, when not that of the pod")
	return cmd
}
