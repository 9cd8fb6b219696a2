package tunnel

import (
	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// NewSpoke is the command spoke.
func NewSpoke() *cobra.Command {
	var m member
	var policy string
	cmd := &cobra.Command{
		Use:   "spoke --join FILE",
		Short: "Dial out to the hubs, and give them access to local targets",
		Long: `Runs in the remote cluster: dials every hub, several connections each, and connects to
local targets for them. Nothing listens, except the exports that the hub's side asks for.

'culvert join NAME' on the hub's side prints the file for --join. The spoke makes its own
key, has it signed with the file's token, and renews its certificate from then on; the file
is not needed again. What it allows is what the file says, or --policy:

  targets:
  - cidrs: [10.0.0.0/8]
    ports: [{port: 10250}]

Loopback, link-local and metadata addresses are never dialled. Hubs are dialled through the
proxy that HTTPS_PROXY names, if any.`,
		Example: `  culvert spoke --join prod.yaml --state /var/lib/culvert-spoke
  HTTPS_PROXY=http://proxy.example.com:3128 culvert spoke --policy policy.yaml`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts, err := m.options(cmd)
			if err != nil {
				return err
			}
			return tunnel.RunSpoke(cmd.Context(), tunnel.SpokeOptions{MemberOptions: opts, Policy: policy})
		},
	}
	m.flags(cmd, "127.0.0.1:9588", "/var/lib/culvert-spoke")
	cmd.Flags().StringVar(&policy, "policy", "", "file with the targets that this spoke allows; empty: those of the invitation")
	return cmd
}
