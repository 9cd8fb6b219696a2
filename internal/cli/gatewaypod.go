package cli

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/ipsec"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/process"
)

// podIPsecDir is where the containers of a gateway pod share the IKE daemon's files.
const podIPsecDir = "/run/culvert/ipsec"

// podFlags are those of a gateway in a cluster.
type podFlags struct {
	kube      kube.Options
	namespace string
}

func (p *podFlags) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.kube.Kubeconfig, "kubeconfig", "", "API server, when not that of the pod")
	f.StringVarP(&p.namespace, "namespace", "n", "", "namespace of the VPNGateway in the cluster (default: POD_NAMESPACE, else that of the configuration)")
}

// complete adds to the options what makes the gateway one of a cluster.
func (p *podFlags) complete(cmd *cobra.Command, opts *gateway.Options) error {
	config, namespace, err := p.kube.Config()
	if err != nil {
		return err
	}
	client, err := kube.NewClient(config)
	if err != nil {
		return err
	}
	if ns := os.Getenv("POD_NAMESPACE"); ns != "" {
		namespace = ns
	}
	if p.namespace != "" {
		namespace = p.namespace
	}
	id := model.ID{Namespace: namespace, Name: opts.Name}
	if ns, name, ok := strings.Cut(opts.Name, "/"); ok {
		id = model.ID{Namespace: ns, Name: name}
	}
	c := &gateway.Cluster{Client: client, Gateway: id, Pod: os.Getenv("POD_NAME"), Node: os.Getenv("NODE_NAME")}
	inPod := c.Pod != ""
	if !inPod {
		if c.Pod, err = os.Hostname(); err != nil {
			return err
		}
	}
	for name, into := range map[string]*[]netip.Addr{"POD_IPS": &c.PodIPs, "HOST_IPS": &c.HostIPs} {
		if *into, err = addresses(os.Getenv(name)); err != nil {
			return fmt.Errorf("environment variable %s: %w", name, err)
		}
	}
	opts.Name, opts.Cluster = id.String(), c
	if inPod && opts.IPsecDir == "" {
		opts.IPsecDir = podIPsecDir
	}
	if !cmd.Flags().Changed("keep-on-stop") {
		opts.KeepOnStop = true
	}
	return nil
}

// addresses reads what the downward API writes: "10.0.0.1,fd00::1".
func addresses(s string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, x := range strings.Split(s, ",") {
		if x == "" {
			continue
		}
		a, err := netip.ParseAddr(x)
		if err != nil {
			return nil, err
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

func newIPsecDaemon() *cobra.Command {
	opts := ipsec.Options{}
	var datapath string
	var log process.LogOptions
	cmd := &cobra.Command{
		Use:   "ipsec-daemon",
		Short: "Run the IKE daemon of a gateway pod, in a container of its own",
		Long: `Runs strongSwan's charon with its settings, socket and log in --dir, and starts it again when
it ends. It configures nothing: 'culvert gateway --ipsec-dir DIR', in the same network
namespace, does, and may be restarted without the loss of an SA. The datapath must be the
one that the gateway uses; both find out the same. It needs the capabilities NET_ADMIN and
NET_BIND_SERVICE.`,
		Example: "  culvert gateway ipsec-daemon --dir /run/culvert/ipsec",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := ipsecDatapath(datapath)
			if err != nil {
				return err
			}
			logger, err := process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usagef("%w", err)
			}
			opts.Logger = logger
			if path == "" {
				var why string
				if path, why, err = ipsec.DetectDatapath(); err != nil {
					return fmt.Errorf("find out who can encrypt ESP: %w", err)
				}
				logger.Info("ipsec datapath", "datapath", path, "reason", why)
			}
			return ipsec.Supervise(cmd.Context(), opts, path, gateway.Fence)
		},
	}
	cmd.Flags().StringVar(&opts.Dir, "dir", podIPsecDir, "directory for the daemon's settings, socket and log")
	cmd.Flags().StringVar(&datapath, "ipsec", "auto", "ESP datapath: auto, kernel or libipsec")
	logFlags(cmd, &log)
	return cmd
}
