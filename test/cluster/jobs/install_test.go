package jobs_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster/clustertest"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

const root = "../../.."

// install builds the image, puts it on the nodes, and installs the chart.
func install(t *testing.T, c *clustertest.Cluster) {
	t.Helper()
	script(t, "hack/image.sh")
	c.Load(filepath.Join(root, ".cache/image/culvert.tar"))
	helm(t, c, "install", "culvert", filepath.Join(root, "charts/culvert"), "--namespace", "culvert-system", "--create-namespace",
		"--set", "image.repository=culvert.dev/culvert,image.tag=dev,image.pullPolicy=Never")
	t.Cleanup(func() { helm(t, c, "uninstall", "culvert", "--namespace", "culvert-system", "--wait") })
	labtest.Eventually(t, time.Minute, "operator and agents are ready", func() error {
		_, err := c.TryKubectl("-n", "culvert-system", "wait", "pod", "--all", "--for=condition=Ready", "--timeout=5s")
		return err
	})
}

// helm runs the project's helm against the cluster, away from the caller's configuration.
func helm(t *testing.T, c *clustertest.Cluster, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	home := t.TempDir()
	cmd := exec.CommandContext(ctx, script(t, "hack/helm.sh"), args...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG="+c.Kubeconfig())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("helm %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// script runs a script of the project and returns the last line that it printed.
func script(t *testing.T, path string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(root, path))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
