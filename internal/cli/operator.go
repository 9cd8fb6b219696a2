package cli

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/kube"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/operator"
	"github.com/culvert-vpn/culvert/internal/process"
)

type operatorFlags struct {
	kube           kube.Options
	serviceAccount string
	pullPolicy     string
	gatewayPod     string
	hubPod         string
	featureGates   []string
	frontService   string
	frontRoutes    string
	log            process.LogOptions
}

func newOperator() *cobra.Command {
	var opts operator.Options
	var flags operatorFlags
	var alone bool
	cmd := &cobra.Command{
		Use:   "operator",
		Short: "Run the operator: from objects in a cluster to gateways, addresses and conditions",
		Long: `Runs the operator until it is stopped. The chart does this; by hand it is for
development, against the cluster that --kubeconfig names.

For every VPNGateway it makes a StatefulSet, a Service, a disruption budget and the
gateway's rights, all called culvert-NAME in the gateway's namespace. Every Device gets an
address out of the gateway's deviceCIDRs (claimed by a Lease, so that none is given twice)
and, unless it brings a public key, a Secret NAME-wireguard with a ready configuration. What
objects contradict each other in is decided by who came first; everything that is refused
says so in its conditions, with the field and the way out:

  kubectl get vgw,sites,devices -A
  kubectl describe site berlin

For every RemoteCluster it makes hubs, called culvert-hub-NAME, and writes the front's table.
The feature gate ReversedTunnel turns that off, and the annotation
culvert.dev/reversed-tunnel on an object, true or false, overrides the gate.

Of several operators one leads, by a Lease in --namespace; the others wait. It reads no
Secret but those of devices that it made itself, by name.`,
		Example: `  culvert operator --kubeconfig ~/.kube/config --namespace culvert-system --image ghcr.io/culvert-vpn/culvert:v0.1.0
  kubectl -n culvert-system logs deployment/culvert-operator`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := process.NewLogger(cmd.ErrOrStderr(), flags.log)
			if err != nil {
				return usage.Wrap(err)
			}
			opts.Logger, opts.NoLeaderElection = logger, alone
			if err := flags.complete(&opts); err != nil {
				return err
			}
			return operator.Run(cmd.Context(), opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of the leader's Lease; else $POD_NAMESPACE")
	f.BoolVar(&alone, "alone", false, "work at once, without asking who leads: only when no other operator runs")
	f.StringVar(&opts.Workload.Image, "image", os.Getenv("CULVERT_IMAGE"), "image of the gateways; else $CULVERT_IMAGE")
	f.StringVar(&flags.pullPolicy, "image-pull-policy", "", "Always, IfNotPresent or Never; empty: as Kubernetes does by itself")
	f.StringVar(&flags.gatewayPod, "gateway-pod", "", "YAML file with a pod template that is merged into the gateways' (containers culvert and ipsec)")
	f.StringVar(&opts.Workload.ClusterRole, "gateway-cluster-role", "culvert-gateway", "ClusterRole that every gateway's service account is bound to")
	f.StringVar(&flags.serviceAccount, "service-account", "", "the operator's own, NAMESPACE/NAME, which it grants single Secrets; empty: culvert-operator in --namespace; none: it may read them already")
	f.StringVar(&flags.hubPod, "hub-pod", "", "YAML file with a pod template that is merged into the hubs' (container culvert)")
	f.StringSliceVar(&flags.featureGates, "feature-gates", nil, "NAME=true|false, repeated or comma-separated: "+gateReversedTunnel+" (default true)")
	f.StringVar(&opts.Tunnel.Address, "front-address", "", "host:port where remote clusters dial, unless a RemoteCluster says otherwise; empty: that of --front-service")
	f.StringVar(&opts.Tunnel.Domain, "front-domain", "hubs.culvert.internal", "DNS domain that hubs' server names are made below; it need not exist")
	f.StringVar(&flags.frontService, "front-service", "", "the front's Service, NAMESPACE/NAME, whose load balancer's address is taken")
	f.StringVar(&flags.frontRoutes, "front-routes", "", "ConfigMap for the front's table, NAMESPACE/NAME; empty: there is no front")
	f.BoolVar(&opts.Cilium, "cilium", false, "for gateways with nodeLink: CiliumEndpoint: keep their ranges in Cilium's CiliumEndpoints and in the ConfigMap kube-system/ip-masq-agent")
	f.StringVar(&opts.HTTP, "http", ":9587", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&opts.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
	f.StringVar(&flags.kube.Kubeconfig, "kubeconfig", "", "file that says where the API server is; empty: the cluster whose pod this is, else as kubectl does")
	f.StringVar(&flags.kube.Context, "context", "", "context of the kubeconfig")
	f.StringVar(&flags.log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&flags.log.Format, "log-format", "text", "text or json")
	return cmd
}

// complete turns flags into options.
func (f *operatorFlags) complete(o *operator.Options) error {
	if o.Workload.Image == "" {
		return usage.Errorf("--image is missing: the image that gateways run, such as ghcr.io/culvert-vpn/culvert:v0.1.0")
	}
	switch p := corev1.PullPolicy(f.pullPolicy); p {
	case "", corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
		o.Workload.ImagePullPolicy = p
	default:
		return usage.Errorf("--image-pull-policy %q: use Always, IfNotPresent or Never", f.pullPolicy)
	}
	var err error
	if o.Workload.Pod, err = podTemplate("--gateway-pod", f.gatewayPod); err != nil {
		return err
	}
	if o.Workload.HubPod, err = podTemplate("--hub-pod", f.hubPod); err != nil {
		return err
	}
	if err := f.tunnel(o); err != nil {
		return err
	}
	config, namespace, err := f.kube.Config()
	if err != nil {
		return err
	}
	o.Rest = config
	if o.Namespace == "" {
		o.Namespace = namespace
	}
	switch f.serviceAccount {
	case "":
		o.ServiceAccount = model.ID{Namespace: o.Namespace, Name: "culvert-operator"}
	case "none":
	default:
		ns, name, ok := strings.Cut(f.serviceAccount, "/")
		if !ok || ns == "" || name == "" {
			return usage.Errorf("--service-account %q: write NAMESPACE/NAME, or none", f.serviceAccount)
		}
		o.ServiceAccount = model.ID{Namespace: ns, Name: name}
	}
	return nil
}

// podTemplate reads a file as JSON; nil: there is none.
func podTemplate(flag, file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	template, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", flag, file, err)
	}
	return template, nil
}

// gateReversedTunnel is the feature gate of RemoteClusters.
const gateReversedTunnel = "ReversedTunnel"

// tunnel turns the flags about RemoteClusters into options.
func (f *operatorFlags) tunnel(o *operator.Options) error {
	o.Tunnel.Enabled = true
	for _, gate := range f.featureGates {
		name, value, _ := strings.Cut(gate, "=")
		on, err := strconv.ParseBool(value)
		if err != nil || name != gateReversedTunnel {
			return usage.Errorf("--feature-gates %q: write %s=true or %[2]s=false; there is no other gate", gate, gateReversedTunnel)
		}
		o.Tunnel.Enabled = on
	}
	for _, x := range []struct {
		flag, value string
		into        *model.ID
	}{{"--front-service", f.frontService, &o.Tunnel.Service}, {"--front-routes", f.frontRoutes, &o.Tunnel.Routes}} {
		ns, name, ok := strings.Cut(x.value, "/")
		switch {
		case x.value == "":
			continue
		case !ok || ns == "" || name == "":
			return usage.Errorf("%s %q: write NAMESPACE/NAME", x.flag, x.value)
		case !o.Tunnel.Enabled:
			return usage.Errorf("%s with --feature-gates %s=false: the front leads to nothing but hubs: turn the gate on, or leave the front out (chart: featureGates.%[2]s, front.enabled)", x.flag, gateReversedTunnel)
		}
		*x.into = model.ID{Namespace: ns, Name: name}
	}
	if a := o.Tunnel.Address; a != "" {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return usage.Errorf("--front-address %q: write host:port, such as tunnel.example.com:443", a)
		}
	}
	if o.Tunnel.Domain == "" {
		return usage.Errorf("--front-domain is empty: write a DNS domain; it need not exist")
	}
	return nil
}
