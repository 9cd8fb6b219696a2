package cli

import (
	"encoding/base64"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/store"
)

func newKeygen() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Make a gateway's key ahead of its first start; print the public half",
		Long: `Makes the WireGuard key of the gateway whose state directory is given, unless it has one,
and prints its public key, for the other side's Site. The private key stays in the
directory (mode 0600) and is never replaced.`,
		Example: `  culvert keygen --state /var/lib/culvert`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := store.Open(state)
			if err != nil {
				return err
			}
			_, pub, err := s.GatewayKey()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), base64.StdEncoding.EncodeToString(pub[:]))
			return err
		},
	}
	cmd.Flags().StringVar(&state, "state", defaultState, "state directory of the gateway")
	return cmd
}
