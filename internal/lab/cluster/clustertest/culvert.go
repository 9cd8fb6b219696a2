package clustertest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// System is the namespace that Install installs Culvert into.
const System = "culvert-system"

// Release is the name of the Helm release that Install makes.
const Release = "culvert"

// helmTimeout is for helm with its hooks.
const helmTimeout = 10 * time.Minute

// root is this module's directory.
var root = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	return filepath.Dir(strings.TrimSpace(string(out))), err
})

// built makes the image of this checkout, once per process; CULVERT_IMAGE=FILE in the
// environment is one that is built already.
var built = sync.OnceValues(func() (archive string, err error) {
	if file := os.Getenv("CULVERT_IMAGE"); file != "" {
		return file, nil
	}
	dir, err := root()
	if err != nil {
		return "", err
	}
	out, err := exec.Command(filepath.Join(dir, "hack/image.sh")).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("hack/image.sh: %w: %s", err, out)
	}
	return filepath.Join(dir, ".cache/image/culvert.tar"), nil
})

// loaded are the clusters (*cluster.Cluster) that have this process's image.
var loaded sync.Map

// LoadCulvert builds Culvert's image from this checkout and loads it into every node, once for a
// cluster that this process started or uses.
func (c *Cluster) LoadCulvert() {
	c.t.Helper()
	if _, done := loaded.Load(c.Cluster); done {
		return
	}
	archive, err := built()
	if err != nil {
		c.t.Fatal(err)
	}
	c.Load(archive)
	loaded.Store(c.Cluster, true)
}

// Chart is the path of the chart in this checkout.
func (c *Cluster) Chart() string {
	c.t.Helper()
	dir, err := root()
	if err != nil {
		c.t.Fatal(err)
	}
	return filepath.Join(dir, "charts/culvert")
}

// Install loads Culvert's image into the nodes and installs the chart with further
// arguments of helm ("--set", "--values" …). At the test's end it is uninstalled, and
// its CRDs, with all objects, are removed, unless the cluster ends then too.
func (c *Cluster) Install(args ...string) {
	c.t.Helper()
	c.LoadCulvert()
	if !c.ends {
		c.t.Cleanup(c.remove)
	}
	c.Helm(append([]string{"install", Release, c.Chart(), "--namespace", System, "--create-namespace", "--wait", "--timeout=2m"}, c.image(args)...)...)
}

// Upgrade upgrades what Install installed; args replace those of before.
func (c *Cluster) Upgrade(args ...string) {
	c.t.Helper()
	c.Helm(append([]string{"upgrade", Release, c.Chart(), "--namespace", System, "--wait", "--timeout=2m"}, c.image(args)...)...)
}

// image adds what makes the chart use the image that LoadCulvert loaded.
func (c *Cluster) image(args []string) []string {
	return append([]string{"--set", "image.repository=culvert.dev/culvert,image.tag=dev,image.pullPolicy=Never"}, args...)
}

func (c *Cluster) remove() {
	c.t.Helper()
	if out, err := c.TryHelm("uninstall", Release, "--namespace", System, "--ignore-not-found"); err != nil {
		c.t.Errorf("%v: %s", err, out)
	}
	crds, err := c.TryKubectl("get", "crd", "-o", "name")
	if err != nil {
		c.t.Error(err)
	}
	doomed := []string{"delete", "--ignore-not-found", "--timeout=60s", "namespace/" + System}
	for name := range strings.FieldsSeq(crds) {
		if strings.HasSuffix(name, ".culvert.dev") {
			doomed = append(doomed, name)
		}
	}
	if out, err := c.TryKubectl(doomed...); err != nil {
		c.t.Errorf("%v: %s", err, out)
	}
}

// Helm runs the helm that hack/helm pins and returns what it printed.
func (c *Cluster) Helm(args ...string) string {
	c.t.Helper()
	out, err := c.TryHelm(args...)
	if err != nil {
		pods, _ := c.TryKubectl("-n", System, "get", "pods,events", "-o", "wide")
		c.t.Fatalf("%v\n%s", err, pods)
	}
	return out
}

// helm is the path of the program, which is built if need be.
var helm = sync.OnceValues(func() (path string, err error) {
	dir, err := root()
	if err != nil {
		return "", err
	}
	var errs bytes.Buffer
	find := exec.Command(filepath.Join(dir, "hack/helm.sh")) //nolint:noctx // as long as it takes
	find.Stderr = &errs
	out, err := find.Output()
	if err != nil {
		return "", fmt.Errorf("hack/helm.sh: %w: %s", err, &errs)
	}
	return strings.TrimSpace(string(out)), nil
})

// TryHelm is Helm for what may fail.
func (c *Cluster) TryHelm(args ...string) (string, error) {
	path, err := helm()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), helmTimeout)
	defer cancel()
	home, err := os.MkdirTemp("", "helm-*") // not the test's: it may be ending
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(home) }()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("helm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// plugin makes the program culvert kubectl's plug-in and returns the directory that it is
// in: the program beside the image, built if there is none.
var plugin = sync.OnceValues(func() (directory string, err error) {
	archive, err := built()
	if err != nil {
		return "", err
	}
	directory = filepath.Join(filepath.Dir(archive), "bin")
	program := filepath.Join(directory, "culvert")
	if _, err := os.Stat(program); err != nil {
		dir, err := root()
		if err != nil {
			return "", err
		}
		build := exec.Command("go", "build", "-o", program, "./cmd/culvert") //nolint:noctx // as long as it takes
		build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build culvert: %w: %s", err, out)
		}
	}
	link := filepath.Join(directory, "kubectl-culvert")
	if err := os.Symlink("culvert", link); err != nil && !os.IsExist(err) {
		return "", err
	}
	return directory, nil
})

// Culvert runs "kubectl culvert" and returns what it printed on its standard output.
func (c *Cluster) Culvert(args ...string) string {
	c.t.Helper()
	bin, err := plugin()
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Program("kubectl"), append([]string{"culvert"}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "KUBECONFIG="+c.Kubeconfig())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("kubectl culvert %s: %v: %s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// CulvertProgram is the path of the program culvert that the image has, to be run on machines
// outside.
func (c *Cluster) CulvertProgram() string {
	c.t.Helper()
	bin, err := plugin()
	if err != nil {
		c.t.Fatal(err)
	}
	return filepath.Join(bin, "culvert")
}
