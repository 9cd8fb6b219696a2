package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/kube"
)

// clusterFlags choose the cluster that a command works on, when it does not work on a
// gateway of this host.
type clusterFlags struct {
	kube      kube.Options
	namespace string // empty: the configuration's
}

func (c *clusterFlags) flags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&c.kube.Kubeconfig, "kubeconfig", "", "cluster to work on (default: that of the pod, KUBECONFIG, ~/.kube/config)")
	f.StringVar(&c.kube.Context, "context", "", "context of the kubeconfig")
}

// wanted decides whether a command is about a cluster: when a flag says so, or when it is
// a plug-in of kubectl; not when one of the flags of a standalone gateway is given, or
// such a gateway is there (local); else when a cluster is configured.
func (c *clusterFlags) wanted(cmd *cobra.Command, local string, standalone ...string) bool {
	for _, name := range standalone {
		if f := cmd.Flag(name); f != nil && f.Changed {
			return false
		}
	}
	if c.kube.Kubeconfig != "" || c.kube.Context != "" || isPlugin(cmd) {
		return true
	}
	if _, err := os.Stat(local); err == nil {
		return false
	}
	_, _, err := c.kube.Config()
	return !errors.Is(err, kube.ErrNoCluster)
}

// connection is a client and the namespace to work in.
type connection struct {
	client.WithWatch
	namespace string
	host      string
	config    *rest.Config
}

func (c *clusterFlags) connect() (*connection, error) {
	config, namespace, err := c.kube.Config()
	if err != nil {
		return nil, err
	}
	config.Timeout = 30 * time.Second
	cl, err := kube.NewClient(config)
	if err != nil {
		return nil, err
	}
	if c.namespace != "" {
		namespace = c.namespace
	}
	return &connection{WithWatch: cl, namespace: namespace, host: config.Host, config: config}, nil
}

// explain turns what an API server says into what to do.
func (c *connection) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case meta.IsNoMatchError(err), apierrors.IsNotFound(err) && isKindMissing(err):
		return fmt.Errorf("the cluster %s does not know Culvert's kinds: install the chart (helm install culvert …): %w", c.host, err)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("the cluster %s does not allow it to you: %w", c.host, err)
	}
	return err
}

// isKindMissing tells a path that the server does not have from an object that it does not
// have: the latter has a name.
func isKindMissing(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status) && (status.Status().Details == nil || status.Status().Details.Name == "")
}

// inventory are the objects that people ask about.
type inventory struct {
	gateways []v1alpha1.VPNGateway
	sites    []v1alpha1.Site
	devices  []v1alpha1.Device
}

// inventory lists a namespace, or all when it is empty.
func (c *connection) inventory(ctx context.Context, namespace string) (inventory, error) {
	var gateways v1alpha1.VPNGatewayList
	var sites v1alpha1.SiteList
	var devices v1alpha1.DeviceList
	for _, list := range []client.ObjectList{&gateways, &sites, &devices} {
		if err := c.List(ctx, list, client.InNamespace(namespace)); err != nil {
			return inventory{}, c.explain(err)
		}
	}
	return inventory{gateways.Items, sites.Items, devices.Items}, nil
}

// condition is a condition of a list, or one that is unknown.
func condition(list []metav1.Condition, name string) metav1.Condition {
	if c := meta.FindStatusCondition(list, name); c != nil {
		return *c
	}
	return metav1.Condition{Type: name, Status: metav1.ConditionUnknown}
}
