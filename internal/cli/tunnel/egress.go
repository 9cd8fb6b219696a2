package tunnel

import (
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// defaultSocket is where kube-apiserver finds the egress.
const defaultSocket = "/run/culvert/egress.sock"

// NewEgress is the command egress.
func NewEgress() *cobra.Command {
	var m member
	var opts tunnel.EgressOptions
	var mode string
	cmd := &cobra.Command{
		Use:   "egress --join FILE",
		Short: "HTTP CONNECT on a Unix socket, for kube-apiserver and others",
		Long: `Runs beside kube-apiserver: takes HTTP CONNECT on a Unix socket and forwards it to
whichever hub is alive. When one dies before a connection is established, another one is
tried at once. It joins with 'culvert join NAME --role client' and renews its certificate.

--listen adds a loopback address for what cannot use a Unix socket, such as Prometheus
(proxy_url: http://127.0.0.1:8133). There, 'GET http://host/' goes through the tunnel, too.`,
		Example: `  culvert egress --join egress.yaml --socket /run/culvert/egress.sock
  curl --unix-socket /run/culvert/egress.sock -p -x http://localhost https://10.0.0.7:10250/healthz
  culvert egress config > egress-selector.yaml`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			bits, err := strconv.ParseUint(mode, 8, 9)
			if err != nil {
				return usage.Errorf("--socket-mode %q: write octal permissions such as 0660", mode)
			}
			opts.Mode = os.FileMode(bits)
			if opts.MemberOptions, err = m.options(cmd); err != nil {
				return err
			}
			return tunnel.RunEgress(cmd.Context(), opts)
		},
	}
	m.flags(cmd, "127.0.0.1:9589", "/var/lib/culvert-egress")
	f := cmd.Flags()
	f.StringVar(&opts.Socket, "socket", defaultSocket, "path of the Unix socket; empty: none")
	f.StringVar(&mode, "socket-mode", "0660", "permissions of the Unix socket; its group is the directory's when that is set-group-ID")
	f.StringVar(&opts.Listen, "listen", "", "loopback address:port for clients that cannot use the socket; empty: none")
	cmd.AddCommand(egressConfig())
	return cmd
}

// egressConfig is "culvert egress config".
func egressConfig() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the EgressSelectorConfiguration for kube-apiserver",
		Long: `Prints the file for kube-apiserver's --egress-selector-config-file. What concerns the
cluster (nodes, pods, services, webhooks, aggregated APIs) goes through the socket; etcd and
the control plane's own are dialled directly. Beside it, set

  --kubelet-preferred-address-types=InternalIP   names of nodes need not resolve
  --kubelet-certificate-authority=FILE           kubelets are verified: whoever steals a
                                                 spoke receives its connections`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), tunnel.EgressSelectorConfiguration(socket))
			return err
		},
	}
	cmd.Flags().StringVar(&socket, "socket", defaultSocket, "path of the Unix socket, as kube-apiserver sees it")
	return cmd
}
