package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/gateway"
)

const defaultState = "/var/lib/culvert"

// running reaches a gateway over its Unix socket.
type running struct {
	socket string
	state  string
}

func (r *running) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.state, "state", defaultState, "state directory of the gateway")
	cmd.Flags().StringVar(&r.socket, "socket", "", "Unix socket of the gateway (default: run/culvert.sock in --state)")
}

func (r *running) path() string {
	if r.socket != "" {
		return r.socket
	}
	return filepath.Join(r.state, "run", "culvert.sock")
}

// get reads one resource ("/v1/status") of the gateway into a value.
func (r *running) get(ctx context.Context, resource string, into any) error {
	path := r.path()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://culvert"+resource, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || (err != nil && strings.Contains(err.Error(), "connection refused")) {
		return fmt.Errorf("no gateway answers at %s: is one running? Name its state directory with --state, or its socket with --socket", path)
	}
	if err != nil {
		return fmt.Errorf("ask the gateway at %s: %w", path, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the gateway at %s: it says %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func newStatus() *cobra.Command {
	var r running
	var out output
	var cluster clusterFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Sites and devices: state, last handshake, bytes",
		Long: `Asks a running gateway who is connected, since when, with how many bytes, what is not in
effect, and why. Exit code 1 when something could not be applied or an object is refused.

The gateway is that of --state or --socket. Without these, and when no gateway runs on this
host, a configured cluster is asked: for the gateways, sites, devices and remote clusters of
all namespaces (or of --namespace), with what their conditions say, and for the nodes'
agents. Bytes, handshakes and latencies come from the gateways' pods, through the API server
("get" of pods/proxy); of several pods the one with a * works.`,
		Example: `  culvert status
  culvert status --kubeconfig ~/.kube/config --namespace vpn
  culvert status --state /srv/vpn/state
  culvert status -o json | jq '.sites[] | select(.connected | not)'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if cluster.wanted(cmd, r.path(), "state", "socket") {
				return runClusterStatus(cmd, &cluster, &out)
			}
			var report gateway.Report
			if err := r.get(cmd.Context(), "/v1/status", &report); err != nil {
				return err
			}
			err := out.print(cmd.OutOrStdout(), report, func(w io.Writer) error { return printStatus(w, &report, time.Now()) })
			if err != nil {
				return err
			}
			if len(report.Errors) > 0 || len(report.Problems) > 0 {
				return errNo
			}
			return nil
		},
	}
	r.flags(cmd)
	cluster.flags(cmd)
	cmd.Flags().StringVarP(&cluster.namespace, "namespace", "n", "", "of a cluster: this namespace only")
	out.flag(cmd)
	return cmd
}

func printStatus(w io.Writer, r *gateway.Report, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	name := r.Gateway
	if name == "" {
		name = "(no VPNGateway yet)"
	}
	fmt.Fprintf(t, "Gateway %s\n", name)
	if r.Key != "" {
		fmt.Fprintf(t, "  public key\t%s\n", r.Key)
	}
	for _, d := range []string{"wireguard", "ipsec"} {
		if r.Datapath[d] != "" {
			fmt.Fprintf(t, "  %s\t%s\n", d, r.Datapath[d])
		}
	}
	if r.Services.Mode != "" {
		fmt.Fprintf(t, "  services\t%s, %d ports\n", r.Services.Mode, r.Services.Ports)
	}
	printPeers(t, "SITE", r.Sites, now)
	printPeers(t, "DEVICE", r.Devices, now)
	if err := t.Flush(); err != nil {
		return err
	}
	for reason, n := range sorted(r.Dropped) {
		if n > 0 {
			fmt.Fprintf(w, "dropped: %d packets: %s\n", n, reason)
		}
	}
	for step, msg := range sorted(r.Errors) {
		fmt.Fprintf(w, "error: %s: %s\n", step, msg)
	}
	for _, p := range r.Problems {
		fmt.Fprintln(w, problemText(p))
	}
	return nil
}

func problemText(p gateway.ProblemReport) string {
	line := "problem: "
	for _, part := range []string{p.Origin, p.Object, p.Field} {
		if part != "" {
			line += part + ": "
		}
	}
	line += p.Message
	if p.Kept {
		line += " (the last good version stays in effect)"
	}
	return line
}

func printPeers(w io.Writer, title string, peers []gateway.PeerReport, now time.Time) {
	if len(peers) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\tTYPE\tSTATE\tSINCE\tENDPOINT\tRECEIVED\tSENT\tADDRESSES\n", title)
	for _, p := range peers {
		state, since := "down", "-"
		if p.Connected {
			state = "up"
		} else if p.Reason != "" {
			state = p.Reason
		}
		if !p.Since.IsZero() {
			since = ago(now.Sub(p.Since))
		}
		var addrs []string
		for _, a := range p.Addresses {
			if a.IsSingleIP() {
				addrs = append(addrs, a.Addr().String())
			} else {
				addrs = append(addrs, a.String())
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, p.Type, state, since,
			orDash(p.Endpoint), bytesText(p.ReceivedBytes), bytesText(p.SentBytes), orDash(strings.Join(addrs, ",")))
	}
	for _, p := range peers {
		if p.Message != "" && !p.Connected {
			fmt.Fprintf(w, "  %s: %s\n", p.Name, p.Message)
		}
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// ago is a duration in two units at most.
func ago(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds ago", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm ago", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}

// bytesText is a byte count in binary units.
func bytesText(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	x := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if x /= 1024; x < 1024 {
			return fmt.Sprintf("%.1f %s", x, unit)
		}
	}
	return fmt.Sprintf("%.1f PiB", x/1024)
}
