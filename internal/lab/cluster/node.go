package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// createNodes makes the Node objects ahead of the kubelets, so that each has the pod
// ranges that the plan gives it.
func (c *Cluster) createNodes(ctx context.Context) error {
	var y strings.Builder
	for _, m := range c.plan.nodes {
		fmt.Fprintf(&y, "---\napiVersion: v1\nkind: Node\nmetadata: {name: %s, labels: {kubernetes.io/hostname: %[1]s}}\nspec: {podCIDR: %q, podCIDRs: [%[2]q, %q]}\n",
			m.name, m.podCIDRs[0], m.podCIDRs[1])
	}
	return c.Apply(ctx, y.String())
}

func (c *Cluster) startNodes(ctx context.Context) error {
	for _, n := range c.Nodes {
		if err := n.up(ctx); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// up boots the node and starts its programs.
func (n *Node) up(ctx context.Context) error {
	c := n.cluster
	if err := n.boot(ctx); err != nil {
		return err
	}
	if err := errors.Join(n.configure(), n.takePrepared()); err != nil {
		return err
	}
	if err := c.StartProgram(n.Name, "containerd"); err != nil {
		return err
	}
	err := until(ctx, time.Minute, "containerd answers", func() error {
		_, err := n.Run(ctx, "ctr", "version")
		return err
	})
	if err != nil {
		return fmt.Errorf("%w; its log ends with:\n%s", err, tail(c.Log(n.Name, "containerd")))
	}
	if c.options.CNI == Bridge {
		if err := n.masquerade(ctx); err != nil {
			return err
		}
	}
	if err := c.StartProgram(n.Name, "kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig="+c.pki(n.Name+".kubeconfig"),
		"--hostname-override="+n.Name, "--node-ip="+join(n.IPs())); err != nil {
		return err
	}
	if c.options.NoKubeProxy || c.options.CNI == Cilium { // whose configuration decides
		return nil
	}
	return n.startKubeProxy()
}

func (n *Node) startKubeProxy() error {
	c := n.cluster
	return c.StartProgram(n.Name, "kube-proxy", "--kubeconfig="+c.pki("kube-proxy.kubeconfig"), "--hostname-override="+n.Name,
		"--proxy-mode=nftables", "--cluster-cidr="+join(PodCIDRs), "--metrics-bind-address=127.0.0.1:10249",
		// These settings cannot be written in a network namespace.
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s")
}

// masquerade hides pods behind their node towards everything that is not a pod, as CNI
// plug-ins do that own no addresses outside.
func (n *Node) masquerade(ctx context.Context) error {
	pods := n.PodCIDRs()
	return nft(ctx, n.Host, fmt.Sprintf(`table ip cni-masquerade {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		ip saddr %s ip daddr != { %s, 224.0.0.0/4 } masquerade
	}
}
table ip6 cni-masquerade {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		ip6 saddr %s ip6 daddr != { %s, ff00::/8 } masquerade
	}
}
`, pods[0], PodCIDRs[0], pods[1], PodCIDRs[1]))
}

// configure writes the configuration of the node's programs into its own /etc.
func (n *Node) configure() error {
	c := n.cluster
	files := map[string]string{
		"containerd/config.toml":  fmt.Sprintf(containerdConfig, plugIns),
		"kubernetes/kubelet.yaml": fmt.Sprintf(kubeletConfig, c.pki("ca.crt"), c.pki(n.Name+"-serving.crt"), c.pki(n.Name+"-serving.key"), DNS[0]),
	}
	if c.options.CNI == Bridge {
		files["cni/net.d/10-cvk.conflist"] = fmt.Sprintf(cniConfig, c.options.MTU, n.PodCIDRs()[0], n.PodCIDRs()[1])
	}
	var errs []error
	for name, text := range files {
		// Through the first process's root: the upper layer of an overlay may not be written
		// behind its back.
		path := filepath.Join(fmt.Sprintf("/proc/%d/root/etc", n.init), name)
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600))
	}
	return errors.Join(errs...)
}

const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  # CAP_SYS_RESOURCE may be missing.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %s}
authorization: {mode: Webhook}
tlsCertFile: %s
tlsPrivateKeyFile: %s
clusterDNS: [%q]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
enforceNodeAllocatable: []
failSwapOn: false
resolvConf: ""
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%, imagefs.inodesFree: 0%%}
nodeStatusUpdateFrequency: 5s
`

const cniConfig = `{
  "cniVersion": "1.0.0",
  "name": "cvk",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "mtu": %d,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}], [{"subnet": "%s"}]]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`
