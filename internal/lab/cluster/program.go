package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const module = "github.com/culvert-vpn/culvert"

// Programs returns the directory with Kubernetes' programs and coredns, and
// builds them when they are not there (some minutes); out gets a line for each.
func Programs(ctx context.Context, out io.Writer) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "hack/kubernetes.sh"))
	var said bytes.Buffer
	cmd.Stderr = io.MultiWriter(&said, out)
	dir, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build Kubernetes: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(string(dir)), nil
}

// Program is the path of one of kubectl, etcd, coredns, Kubernetes' components and, where
// there is a Cilium, cilium-dbg and its components.
func (c *Cluster) Program(name string) string {
	switch {
	case name == "cilium-agent":
		return c.path(name)
	case strings.HasPrefix(name, "cilium-"):
		return filepath.Join(c.cilium, name)
	}
	return filepath.Join(c.programs, name)
}

// plugIns is the directory with the nodes' CNI plug-ins, each node's own: see init.sh.
const plugIns = "/opt/cni/bin"

// moduleRoot finds Culvert's source: its module is above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(b, []byte("module "+module+"\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("a cluster is built from Culvert's source: run this inside a checkout")
		}
	}
}

// build compiles one of Culvert's own main packages to a static program; more is for its environment.
func build(ctx context.Context, pkg, output string, more ...string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", output, "./"+pkg)
	cmd.Dir = root
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), more...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, strings.TrimSpace(string(out)))
	}
	return nil
}
