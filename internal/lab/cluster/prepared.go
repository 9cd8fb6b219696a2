package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// PreparedEnv names the environment variable with a directory that Prepare made. A cluster that starts
// copies it to its nodes, in place of loading each image into each node.
const PreparedEnv = "CULVERT_IMAGES"

// What is in such a directory.
const (
	preparedRoot     = "containerd" // containerd's directory, with the images
	preparedServer   = "server"     // TestServer
	preparedArchives = "archives.json"
)

// archive is a file that images came from, as it was then.
type archive struct {
	Path string
	Size int64
	Time time.Time
}

func archiveAt(path string) (archive, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return archive{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return archive{}, err
	}
	return archive{path, info.Size(), info.ModTime().UTC()}, nil
}

// Prepare makes a directory anew: with the images that every node has, and those of archives (see
// Load), as a node's containerd keeps them.
func Prepare(ctx context.Context, directory string, archives ...string) error {
	if err := Check(); err != nil {
		return err
	}
	whole := filepath.Clean(directory) + ".new" // until it is
	if err := os.RemoveAll(whole); err != nil {
		return err
	}
	if err := prepare(ctx, whole, archives); err != nil {
		return errors.Join(err, os.RemoveAll(whole))
	}
	if err := os.RemoveAll(directory); err != nil {
		return err
	}
	return os.Rename(whole, directory)
}

func prepare(ctx context.Context, directory string, archives []string) (err error) {
	scratch, err := os.MkdirTemp("", "images-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	programs, err := Programs(ctx, os.Stderr)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	server := filepath.Join(directory, preparedServer)
	if err := build(ctx, "internal/lab/cluster/server", server); err != nil {
		return err
	}
	images, err := ownImages(server, filepath.Join(programs, "coredns"))
	if err != nil {
		return err
	}
	var files []string
	var known []archive
	for _, path := range archives {
		a, err := archiveAt(path)
		if err != nil {
			return err
		}
		files, known = append(files, a.Path), append(known, a)
	}
	for i, image := range images {
		path := filepath.Join(scratch, fmt.Sprintf("%d.tar", i))
		if err := image.writeTo(path); err != nil {
			return err
		}
		files = append(files, path)
	}
	if err := keep(ctx, filepath.Join(directory, preparedRoot), scratch, files); err != nil {
		return err
	}
	list, err := json.Marshal(known)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(directory, preparedArchives), list, 0o600)
}

// keep has a containerd of its own keep the images of files at root.
func keep(ctx context.Context, root, scratch string, files []string) error {
	config, socket := filepath.Join(scratch, "config.toml"), filepath.Join(scratch, "sock")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n",
		root, filepath.Join(scratch, "state"), socket, socket+".ttrpc")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	var log strings.Builder
	containerd := exec.CommandContext(ctx, "containerd", "--config", config)
	containerd.Stdout, containerd.Stderr = &log, &log
	containerd.Env = append(os.Environ(), fewCollections)
	containerd.Cancel = func() error { return containerd.Process.Signal(syscall.SIGTERM) } // it closes its files
	if err := containerd.Start(); err != nil {
		return err
	}
	ctr := func(args ...string) error {
		return run("ctr", append([]string{"--address", socket, "--namespace", "k8s.io"}, args...)...)
	}
	err := until(ctx, time.Minute, "containerd answers", func() error { return ctr("version") })
	for _, file := range files {
		if err == nil {
			err = ctr("images", "import", file)
		}
	}
	if e := containerd.Cancel(); e != nil {
		return errors.Join(err, e)
	}
	if e := containerd.Wait(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%w; containerd says:\n%s", err, &log)
	}
	return nil
}

// prepared is the directory that the environment names; empty for none.
func prepared() string { return os.Getenv(PreparedEnv) }

// takePrepared gives a node's containerd, before it starts for the first time, the images that were
// prepared: their files, which nobody changes, under further names, and databases of its own.
func (n *Node) takePrepared() error {
	from, to := filepath.Join(prepared(), preparedRoot), n.cluster.path(n.Name, "var/lib/containerd")
	if !n.cluster.prepared || exists(to) {
		return nil
	}
	if run("cp", "-a", "--link", from, to) != nil { // another file system
		return errors.Join(os.RemoveAll(to), run("cp", "-a", from, to))
	}
	databases, err := filepath.Glob(filepath.Join(from, "*/*.db"))
	if err == nil && len(databases) == 0 {
		err = fmt.Errorf("%s: no databases of containerd's in it", from)
	}
	for _, database := range databases {
		name := strings.TrimPrefix(database, from)
		err = errors.Join(err, run("cp", "-a", "--remove-destination", database, to+name))
	}
	return err
}

// isPrepared says whether the nodes had the images of an archive when they started.
func (c *Cluster) isPrepared(path string) (bool, error) {
	if !c.prepared {
		return false, nil
	}
	b, err := os.ReadFile(filepath.Join(prepared(), preparedArchives))
	if err != nil {
		return false, err
	}
	var known []archive
	if err := json.Unmarshal(b, &known); err != nil {
		return false, err
	}
	a, err := archiveAt(path)
	if err != nil {
		return false, err
	}
	for _, k := range known {
		if k == a {
			return true, nil
		}
	}
	return false, nil
}
