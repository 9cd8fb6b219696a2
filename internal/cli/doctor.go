package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/ipsec"
)

// finding is one thing that doctor looked at.
type finding struct {
	Result  string `json:"result"` // ok, note or fail
	Check   string `json:"check"`
	Message string `json:"message"` // what was found, and what to do
}

// The results: what is well, what somebody may want to know, what is broken.
const (
	findingOK   = "ok"
	findingNote = "note"
	findingFail = "FAIL"
)

type findings []finding

func (f *findings) add(result, check, format string, args ...any) {
	*f = append(*f, finding{result, check, fmt.Sprintf(format, args...)})
}

func newDoctor() *cobra.Command {
	var r running
	var out output
	var cluster clusterFlags
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "What is wrong with this host or cluster, and what to do",
		Long: `Looks at a cluster (that of --kubeconfig, or a configured one when no gateway runs on this
host): whether the API server answers and knows Culvert's kinds, operator and agents run,
gateways are up, and every object is in effect. Without a cluster it looks at this host:
whether it can be a gateway, and how the one that runs here is doing.

Every line says what was found and what to do. Exit code 1 when something is broken.`,
		Example: `  culvert doctor
  culvert doctor --kubeconfig ~/.kube/config -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			var found findings
			if cluster.wanted(cmd, r.path(), "state", "socket") {
				c, err := cluster.connect()
				if err != nil {
					return err
				}
				found = c.examine(cmd.Context())
			} else {
				found = examineHost(cmd.Context(), &r)
			}
			if err := out.print(cmd.OutOrStdout(), found, found.print); err != nil {
				return err
			}
			for _, f := range found {
				if f.Result == findingFail {
					return errNo
				}
			}
			return nil
		},
	}
	r.flags(cmd)
	cluster.flags(cmd)
	out.flag(cmd)
	return cmd
}

func (f findings) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, x := range f {
		fmt.Fprintf(t, "%s\t%s\t%s\n", x.Result, x.Check, x.Message)
	}
	return t.Flush()
}

// examineHost looks at what a standalone gateway needs.
func examineHost(ctx context.Context, r *running) findings {
	var f findings
	root := os.Geteuid() == 0
	if root {
		f.add(findingOK, "privileges", "root")
	} else {
		f.add(findingNote, "privileges", "not root: a gateway configures the network and must be; some checks are left out")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		f.add(findingFail, "TUN", "%v: load the module (modprobe tun), or give the container /dev/net/tun; without it there is no tunnel in user space", err)
	} else {
		f.add(findingOK, "TUN", "/dev/net/tun is there")
	}
	for _, p := range []struct{ program, what string }{
		{"nft", "every gateway needs it: install nftables"},
		{"charon-systemd", "IPsec sites need it: install strongSwan (charon-systemd, libcharon-extra-plugins)"},
	} {
		if path, err := lookProgram(p.program); err != nil {
			f.add(findingFail, p.program, "is not installed; %s", p.what)
		} else {
			f.add(findingOK, p.program, "%s", path)
		}
	}
	if root {
		if path, why, err := ipsec.DetectDatapath(); err != nil {
			f.add(findingFail, "ESP", "%v", err)
		} else {
			f.add(findingOK, "ESP", "by %s: %s", path, why)
		}
	}
	for _, s := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		b, err := os.ReadFile("/proc/sys/" + s)
		name := strings.ReplaceAll(s, "/", ".")
		switch {
		case err != nil:
			f.add(findingNote, name, "%v", err)
		case strings.TrimSpace(string(b)) == "1":
			f.add(findingOK, name, "1")
		case unix.Access("/proc/sys/"+s, unix.W_OK) == nil:
			f.add(findingOK, name, "%s; a gateway sets it to 1", strings.TrimSpace(string(b)))
		default:
			f.add(findingNote, name, "%s, and cannot be written here: it must be set from outside (sysctl -w %s=1; in a cluster the agent does)", strings.TrimSpace(string(b)), name)
		}
	}
	examineGateway(ctx, r, &f)
	return f
}

func lookProgram(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if _, err := os.Stat(dir + name); err == nil {
			return dir + name, nil
		}
	}
	return exec.LookPath(name)
}

// examineGateway asks the gateway of this host, or else whether one could have its ports.
func examineGateway(ctx context.Context, r *running, f *findings) {
	var report gateway.Report
	if _, err := os.Stat(r.path()); err != nil {
		f.add(findingNote, "gateway", "none runs here with state directory %s", r.state)
		for _, port := range []int{500, 4500, 51820} {
			if taken(ctx, port) {
				f.add(findingNote, fmt.Sprintf("UDP port %d", port), "is taken by another program (see 'ss -ulnp'): a gateway that needs it will say so")
			}
		}
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := r.get(ctx, "/v1/status", &report); err != nil {
		f.add(findingFail, "gateway", "%v", err)
		return
	}
	f.add(findingOK, "gateway", "%s runs since %s", orDash(report.Gateway), report.Started.UTC().Format(time.RFC3339))
	for step, msg := range sorted(report.Errors) {
		f.add(findingFail, "gateway: "+step, "%s", msg)
	}
	for _, p := range report.Problems {
		f.add(findingFail, strings.TrimSpace("object "+p.Object), "%s", strings.TrimPrefix(problemText(p), "problem: "))
	}
	for _, p := range append(report.Sites, report.Devices...) {
		if !p.Connected && p.Reason != "Waiting" {
			f.add(findingNote, p.Name, "%s", p.Message)
		}
	}
}

// taken reports whether a UDP port cannot be had.
func taken(ctx context.Context, port int) bool {
	var l net.ListenConfig
	c, err := l.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", port))
	if err != nil {
		return !os.IsPermission(err)
	}
	_ = c.Close()
	return false
}
