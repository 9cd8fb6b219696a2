package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	apimeta "k8s.io/apimachinery/pkg/api/meta"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/kube"
)

// newAgentRemovable is for the chart's Job that runs before an uninstallation.
func newAgentRemovable() *cobra.Command {
	var k kube.Options
	cmd := &cobra.Command{
		Use:    "removable",
		Short:  "Tell whether the agents can be removed from the cluster",
		Long:   "Fails, and says what to do, while a NodeEncryption is Strict: without agents its nodes could not reach each other any more.",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, _, err := k.Config()
			if err != nil {
				return err
			}
			c, err := kube.NewClient(config)
			if err != nil {
				return err
			}
			var list v1alpha1.NodeEncryptionList
			if err := c.List(cmd.Context(), &list); err != nil && !apimeta.IsNoMatchError(err) {
				return fmt.Errorf("list NodeEncryptions: %w", err)
			}
			for _, o := range list.Items {
				if o.Spec.Enforcement == v1alpha1.EnforcementStrict {
					return errors.New("NodeEncryption cluster is Strict: without agents the nodes would drop what they say to each other, as nobody encrypts it. " +
						"Nothing was removed. Run 'kubectl delete nodeencryption cluster', and uninstall again")
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&k.Kubeconfig, "kubeconfig", "", "API server, when not that of the pod")
	return cmd
}
