package tunnel

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// NewJoin is the command join.
func NewJoin() *cobra.Command {
	var opts tunnel.HubOptions
	var role, as string
	cmd := &cobra.Command{
		Use:   "join NAME",
		Short: "Print what a remote cluster, a spoke or an egress joins with: a token, once, for an hour",
		Long: `Prints an invitation to the RemoteCluster NAME (or NAMESPACE/NAME) for 'culvert spoke
--join FILE' or, with --role client, 'culvert egress --join FILE'. It holds a token that
works once and for one hour, the authorities that hubs are verified with, and where hubs
are; no private key: that is made where it is used.

For hubs in a cluster, whose operator made them from the RemoteCluster NAME, it prints the one
manifest that is to be applied in the remote cluster: namespace, rights, the spokes and
their invitation. With --role client it is one for the namespace of the RemoteCluster, with what
'culvert egress' needs there. It needs the right to read and update the Secret with the
RemoteCluster's authority.

For standalone hubs run it where the hub's --state is, with the hub's flags.`,
		Example: `  culvert join prod -n team-a | kubectl --context remote apply -f -
  culvert join prod -n team-a --role client | kubectl apply -f -
  culvert join revoke prod -n team-a --as spoke-20260301-120000
  culvert join prod --manifests /etc/culvert > prod.yaml
  culvert join prod --manifests /etc/culvert --role client --as apiserver-0 > egress.yaml
  culvert join certificate prod --manifests /etc/culvert --as prometheus --out ./tls
  culvert join revoke prod --manifests /etc/culvert --as spoke-7`,
		Args: usage.Exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, as, err := Joining(role, as)
			if err != nil {
				return err
			}
			opts.Name = args[0]
			i, err := tunnel.Invite(opts, r, as)
			if err != nil {
				return err
			}
			b, err := yaml.Marshal(i)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "# An invitation to RemoteCluster %s: a secret until it is used or expires.\n%s", i.RemoteCluster, b)
			return err
		},
	}
	hubFlags2(cmd, &opts)
	cmd.Flags().StringVar(&role, "role", "spoke", "spoke or client")
	cmd.Flags().StringVar(&as, "as", "", "what the certificate calls it; empty: the role and the time")
	cmd.AddCommand(joinCertificate(), joinRevoke())
	return cmd
}

// hubFlags2 are hubFlags without --name, which is an argument.
func hubFlags2(cmd *cobra.Command, opts *tunnel.HubOptions) {
	hubFlags(cmd, opts)
	_ = cmd.Flags().MarkHidden("name")
}

// Joining is the role and the name that the flags --role and --as ask for.
func Joining(role, as string) (pki.Role, string, error) {
	r, err := roleOf(role)
	if as == "" {
		as = string(r) + "-" + time.Now().UTC().Format("20060102-150405")
	}
	return r, as, err
}

func roleOf(s string) (pki.Role, error) {
	switch r := pki.Role(s); r {
	case pki.Spoke, pki.Client:
		return r, nil
	}
	return "", usage.Errorf("--role %q: use spoke or client", s)
}

// joinCertificate is "culvert join certificate".
func joinCertificate() *cobra.Command {
	var opts tunnel.HubOptions
	var as, out string
	cmd := &cobra.Command{
		Use:   "certificate NAME --as CLIENT --out DIR",
		Short: "Write a client's certificate and key, for programs that read files",
		Long: `Writes tls.crt, tls.key and ca.crt for a client that speaks HTTP CONNECT to a hub over TLS
and cannot join by itself, such as curl or Prometheus. They are valid for seven days and
renewed by running this again.`,
		Args: usage.Exactly("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			if as == "" || out == "" {
				return usage.Errorf("--as and --out are needed")
			}
			opts.Name = args[0]
			return tunnel.IssueClient(opts, as, out)
		},
	}
	hubFlags2(cmd, &opts)
	cmd.Flags().StringVar(&as, "as", "", "what the certificate calls it")
	cmd.Flags().StringVar(&out, "out", "", "directory for the files")
	return cmd
}

// joinRevoke is "culvert join revoke".
func joinRevoke() *cobra.Command {
	var opts tunnel.HubOptions
	var role, as string
	cmd := &cobra.Command{
		Use:   "revoke NAME --as MEMBER",
		Short: "Take a spoke's or client's certificates back, and close its connections",
		Long: `Takes back all certificates that were issued so far to a spoke or client. The hubs that
share --state close its connections within two seconds. It may join again with a new token.`,
		Args: usage.Exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := roleOf(role)
			if err != nil {
				return err
			}
			if as == "" {
				return usage.Errorf("--as is missing: whose certificates (see 'name' in the hub's /v1/status)")
			}
			opts.Name = args[0]
			if err := tunnel.Revoke(opts, r, as); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "revoked %s %s\n", r, as)
			return nil
		},
	}
	hubFlags2(cmd, &opts)
	cmd.Flags().StringVar(&role, "role", "spoke", "spoke or client")
	cmd.Flags().StringVar(&as, "as", "", "what its certificate calls it")
	return cmd
}
