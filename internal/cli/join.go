package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	clitunnel "github.com/culvert-vpn/culvert/internal/cli/tunnel"
	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/tunnel"
	"github.com/culvert-vpn/culvert/internal/workload"
)

// joinFlags are those of "culvert join" in a cluster.
type joinFlags struct {
	cluster clusterFlags
	spoke   spokeManifest
	format  string
	account string // of the egress
}

// newJoin is the command join: of standalone hubs when --manifests is given, else of a
// cluster's.
func newJoin() *cobra.Command {
	cmd := clitunnel.NewJoin()
	var flags joinFlags
	flags.cluster.flags(cmd)
	cmd.PersistentFlags().StringVarP(&flags.cluster.namespace, "namespace", "n", "", "namespace of the RemoteCluster (default: the configuration's)")
	f := cmd.Flags()
	f.StringVarP(&flags.format, "output", "o", "manifest", "in a cluster: manifest, or invitation for 'culvert spoke --join' and 'culvert egress --join'")
	f.StringVar(&flags.spoke.Namespace, "remote-namespace", "culvert-spoke", "namespace in the remote cluster")
	f.StringVar(&flags.spoke.Image, "image", "", "image of the spokes (default: that of the hubs)")
	f.StringVar(&flags.spoke.PullPolicy, "image-pull-policy", "IfNotPresent", "Always, IfNotPresent or Never")
	f.IntVar(&flags.spoke.Replicas, "replicas", 2, "how many spokes run in the remote cluster")
	f.StringVar(&flags.spoke.Proxy, "https-proxy", "", "proxy that the spokes dial out through, such as http://proxy.example.com:3128")
	f.StringVar(&flags.account, "service-account", "default", "with --role client: service account of the pod that runs 'culvert egress'")
	inCluster(cmd, &flags, flags.join)
	for _, sub := range cmd.Commands() {
		switch sub.Name() {
		case "certificate":
			inCluster(sub, &flags, certificate)
		case "revoke":
			inCluster(sub, &flags, revoke)
		}
	}
	return cmd
}

// inCluster makes a command of standalone hubs one of a cluster's, unless --manifests is
// given.
func inCluster(cmd *cobra.Command, flags *joinFlags, run func(context.Context, *hubsOf, *cobra.Command) error) {
	standalone := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed("manifests") {
			return standalone(cmd, args)
		}
		conn, err := flags.cluster.connect()
		if err != nil {
			return fmt.Errorf("%w; for standalone hubs give --manifests", err)
		}
		h, err := findHubs(cmd.Context(), conn, args[0])
		if err != nil {
			return err
		}
		return run(cmd.Context(), h, cmd)
	}
}

// hubsOf are the hubs of a RemoteCluster in a cluster.
type hubsOf struct {
	*connection
	object *v1alpha1.RemoteCluster
	parsed *model.RemoteCluster
	state  *tunnel.State
}

// findHubs looks for a RemoteCluster, NAME or NAMESPACE/NAME, that has hubs.
func findHubs(ctx context.Context, conn *connection, name string) (*hubsOf, error) {
	key := client.ObjectKey{Namespace: conn.namespace, Name: name}
	if ns, n, ok := strings.Cut(name, "/"); ok {
		key = client.ObjectKey{Namespace: ns, Name: n}
	}
	h := &hubsOf{connection: conn, object: &v1alpha1.RemoteCluster{}}
	if err := conn.Get(ctx, key, h.object); err != nil {
		return nil, conn.explain(err)
	}
	var err error
	if h.parsed, err = tunnel.ParseRemoteCluster(h.object); err != nil {
		return nil, err
	}
	if h.parsed.FrontHost == "" || h.object.Status.Authority == "" {
		why := condition(h.object.Status.Conditions, v1alpha1.ConditionReady)
		if a := condition(h.object.Status.Conditions, v1alpha1.ConditionAccepted); a.Status == metav1.ConditionFalse {
			why = a
		}
		return nil, fmt.Errorf("RemoteCluster %s/%s has no hubs yet (%s %s): wait for them: kubectl -n %s wait remotecluster/%s --for=condition=Ready",
			key.Namespace, key.Name, why.Reason, why.Message, key.Namespace, key.Name)
	}
	secret := &clusterSecret{conn, client.ObjectKey{Namespace: key.Namespace, Name: workload.HubSecret(key.Name)}, nil}
	h.state = tunnel.SecretState(secret, func() string { return h.object.Status.Authority })
	return h, nil
}

// clusterSecret is a Secret as a person reaches it.
type clusterSecret struct {
	*connection
	key  client.ObjectKey
	last *corev1.Secret
}

func (s *clusterSecret) String() string { return "Secret " + s.key.String() }

// Read implements tunnel.Secret.
func (s *clusterSecret) Read(ctx context.Context) (map[string][]byte, string, error) {
	s.last = &corev1.Secret{}
	err := s.Get(ctx, s.key, s.last)
	if apierrors.IsNotFound(err) {
		return nil, "", nil
	}
	if s.last.Data == nil {
		s.last.Data = map[string][]byte{}
	}
	return s.last.Data, s.last.ResourceVersion, s.explain(err)
}

// Write implements tunnel.Secret.
func (s *clusterSecret) Write(ctx context.Context, data map[string][]byte, version string) error {
	if version == "" {
		return errors.New("it is not there: hubs make it, or put it back")
	}
	s.last.Data = data
	err := s.Update(ctx, s.last)
	if apierrors.IsConflict(err) {
		return tunnel.ErrConflict
	}
	return s.explain(err)
}

// join prints a manifest or an invitation.
func (f *joinFlags) join(ctx context.Context, h *hubsOf, cmd *cobra.Command) error {
	if f.format != "manifest" && f.format != "invitation" {
		return usagef("--output %q: use manifest or invitation", f.format)
	}
	role, as, err := clitunnel.Joining(cmd.Flag("role").Value.String(), cmd.Flag("as").Value.String())
	if err != nil {
		return err
	}
	if role == pki.Spoke && f.format == "manifest" {
		if err := f.spoke.complete(ctx, h); err != nil {
			return err
		}
	}
	i, err := h.state.Invite(h.parsed, pki.Identity{UID: h.parsed.UID, Role: role, Name: as}, h.addresses(role))
	if err != nil {
		return err
	}
	text, err := yaml.Marshal(i)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	switch {
	case f.format == "invitation":
		_, err = fmt.Fprintf(out, "# An invitation to RemoteCluster %s: a secret until it is used or expires.\n%s", i.RemoteCluster, text)
	case role == pki.Client:
		err = egressManifest(out, h, f.account, string(text))
	default:
		err = f.spoke.print(out, h, string(text))
	}
	return err
}

// addresses are where a role reaches the hubs.
func (h *hubsOf) addresses(role pki.Role) []wire.HubAddress {
	var out []wire.HubAddress
	for i := range h.parsed.Replicas {
		a := wire.HubAddress{Address: h.parsed.FrontHost, ServerName: wire.HubServerName(h.parsed.UID, i, h.parsed.FrontName)}
		if role == pki.Client {
			a.Address = fmt.Sprintf("%s.%s.svc:%d", workload.HubPod(h.object.Name, i), h.object.Namespace, workload.HubClientPort)
		}
		out = append(out, a)
	}
	return out
}

// certificate is "culvert join certificate" in a cluster.
func certificate(_ context.Context, h *hubsOf, cmd *cobra.Command) error {
	as, out := cmd.Flag("as").Value.String(), cmd.Flag("out").Value.String()
	if as == "" || out == "" {
		return usagef("--as and --out are needed")
	}
	pair, trusted, err := h.state.Issue(pki.Identity{UID: h.parsed.UID, Role: pki.Client, Name: as}, time.Now())
	if err != nil {
		return err
	}
	return tunnel.WritePair(out, pair, tunnel.EncodeAuthorities(trusted))
}

// revokedAnnotation makes hubs look for what was revoked.
const revokedAnnotation = "culvert.dev/revoked"

// revoke is "culvert join revoke" in a cluster.
func revoke(ctx context.Context, h *hubsOf, cmd *cobra.Command) error {
	role, as, err := clitunnel.Joining(cmd.Flag("role").Value.String(), cmd.Flag("as").Value.String())
	if err != nil {
		return err
	}
	if cmd.Flag("as").Value.String() == "" {
		return usagef("--as is missing: whose certificates (see 'kubectl get remotecluster -o yaml', status.hubs[].spokes[].name, up to the '/')")
	}
	now := time.Now()
	if err := h.state.Revoke(role, as, now); err != nil {
		return err
	}
	u := &unstructured.Unstructured{}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(model.KindRemoteCluster))
	u.SetNamespace(h.object.Namespace)
	u.SetName(h.object.Name)
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, revokedAnnotation, now.UTC().Format(time.RFC3339))
	if err := h.Patch(ctx, u, client.RawPatch("application/merge-patch+json", patch)); err != nil {
		return fmt.Errorf("%s %s is revoked, and the hubs will find out within a minute; telling them at once failed: %w", role, as, h.explain(err))
	}
	fmt.Fprintf(cmd.OutOrStdout(), "revoked %s %s\n", role, as)
	return nil
}

// indent moves a text to the right.
func indent(text string, by int) string {
	pad := strings.Repeat(" ", by)
	return pad + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n"+pad)
}

// egressManifest is what 'culvert egress' needs in the namespace of the RemoteCluster.
func egressManifest(out io.Writer, h *hubsOf, account, invitation string) error {
	name := workload.EgressName(h.object.Name)
	_, err := fmt.Fprintf(out, egressTemplate, h.object.Namespace+"/"+h.object.Name, name, h.object.Namespace, account, indent(invitation, 4))
	return err
}
