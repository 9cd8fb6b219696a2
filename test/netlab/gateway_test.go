package netlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// gateway is a "culvert gateway" on a host, with a directory of manifests.
type gateway struct {
	t      *testing.T
	host   *labtest.Host
	public wgtypes.Key

	dir, manifests, state, log string
	args                       []string // of the last start
	source                     []string // arguments that say where the objects are; nil: manifests
	env                        []string // further environment

	cmd  *exec.Cmd
	done chan struct{}
}

// newGateway prepares a gateway: it has a key and no manifests, and does not run.
func newGateway(t *testing.T, h *labtest.Host) *gateway {
	t.Helper()
	dir, err := os.MkdirTemp("", "cvtgw") // short: it holds Unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	g := &gateway{
		t: t, host: h, dir: dir,
		manifests: filepath.Join(dir, "manifests"), state: filepath.Join(dir, "state"), log: filepath.Join(dir, "gateway.log"),
	}
	for _, d := range []string{g.manifests, g.state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	key := newKey(t)
	g.public = key.PublicKey()
	if err := os.WriteFile(filepath.Join(g.state, "wireguard.key"), []byte(key.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the gateway on %s:\n%s", h.Name, tail(g.log, 40))
			if log := tail(filepath.Join(g.state, "run", "ipsec", "charon.log"), 60); log != "" {
				t.Logf("log of its IKE daemon:\n%s", log)
			}
		}
		g.kill()
	})
	return g
}

func newKey(t testing.TB) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// write puts a manifest in place, completely or not at all, as editors do.
func (g *gateway) write(name, text string) {
	g.t.Helper()
	tmp := filepath.Join(g.manifests, "."+name)
	if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o600), os.Rename(tmp, filepath.Join(g.manifests, name))); err != nil {
		g.t.Fatal(err)
	}
}

// remove takes a manifest away.
func (g *gateway) remove(name string) {
	g.t.Helper()
	if err := os.Remove(filepath.Join(g.manifests, name)); err != nil {
		g.t.Fatal(err)
	}
}

// start starts the program, as a supervisor does, and does not wait for it.
func (g *gateway) start(args ...string) {
	g.t.Helper()
	f, err := os.OpenFile(g.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		g.t.Fatal(err)
	}
	defer f.Close()
	g.args = args
	source := g.source
	if source == nil {
		source = []string{"--manifests", g.manifests}
	}
	cmd := g.host.Command(context.Background(), program,
		slices.Concat([]string{"gateway"}, source, []string{"--state", g.state, "--http", "127.0.0.1:9586"}, args)...)
	cmd.Env = append(os.Environ(), g.env...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := g.host.Start(cmd); err != nil {
		g.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	g.cmd, g.done = cmd, done
}

// run starts the program and waits until it has applied its manifests.
func (g *gateway) run(args ...string) {
	g.t.Helper()
	g.start(args...)
	g.await("the gateway has applied its manifests", 15*time.Second, func(r *culvert.Report) error {
		if r.Applied.IsZero() || r.Gateway == "" || len(r.Errors) > 0 {
			return fmt.Errorf("gateway %q, errors %v, problems %v", r.Gateway, r.Errors, r.Problems)
		}
		return nil
	})
}

// kill ends the program without a chance to tidy up.
func (g *gateway) kill() {
	if g.cmd == nil {
		return
	}
	_ = g.cmd.Process.Kill()
	<-g.done
	g.cmd = nil
}

// stop ends the program as a service manager does.
func (g *gateway) stop() {
	g.t.Helper()
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		g.t.Fatal(err)
	}
	select {
	case <-g.done:
	case <-time.After(15 * time.Second):
		g.t.Fatal("the gateway does not end within 15 s of SIGTERM")
	}
	if code := g.cmd.ProcessState.ExitCode(); code != 0 {
		g.t.Errorf("the gateway's exit code after SIGTERM is %d, want 0", code)
	}
	g.cmd = nil
}

// culvert runs another command of the program on the gateway's host and returns both
// streams and the exit code.
func (g *gateway) culvert(args ...string) (stdout, stderr string, code int) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	cmd := g.host.Command(ctx, program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := g.host.Start(cmd); err != nil {
		g.t.Fatal(err)
	}
	_ = cmd.Wait()
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// report is what "culvert status" says; an error while no gateway answers.
func (g *gateway) report() (*culvert.Report, error) {
	stdout, stderr, code := g.culvert("status", "--state", g.state, "-o", "json")
	r := &culvert.Report{}
	if err := json.Unmarshal([]byte(stdout), r); err != nil {
		return nil, fmt.Errorf("culvert status: exit code %d, %s: %w", code, strings.TrimSpace(stderr), err)
	}
	if bad := len(r.Problems)+len(r.Errors) > 0; bad != (code == 1) {
		return nil, fmt.Errorf("culvert status: exit code %d with %d problems and %d errors", code, len(r.Problems), len(r.Errors))
	}
	return r, nil
}

// await asks for the status until f is content, and returns how long that took.
func (g *gateway) await(what string, timeout time.Duration, f func(*culvert.Report) error) time.Duration {
	g.t.Helper()
	return eventually(g.t, timeout, what, func() error {
		r, err := g.report()
		if err != nil {
			return err
		}
		return f(r)
	})
}

// problem finds the problem of an object ("Site default/berlin") in a report.
func problem(r *culvert.Report, object string) *culvert.ProblemReport {
	for i, p := range r.Problems {
		if p.Object == object {
			return &r.Problems[i]
		}
	}
	return nil
}

// peer finds a site or device ("default/berlin") in a report.
func peer(r *culvert.Report, name string) *culvert.PeerReport {
	for _, list := range [][]culvert.PeerReport{r.Sites, r.Devices} {
		for i, p := range list {
			if p.Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// awaitNoProblems waits until the status says that nothing is refused.
func (g *gateway) awaitNoProblems() {
	g.t.Helper()
	g.await("no problems", 5*time.Second, func(r *culvert.Report) error {
		if len(r.Problems)+len(r.Errors) > 0 {
			return fmt.Errorf("problems %+v, errors %v", r.Problems, r.Errors)
		}
		return nil
	})
}

// awaitProblem waits for the problem of an object that f, unless nil, is content with.
func (g *gateway) awaitProblem(object string, f func(*culvert.ProblemReport) error) time.Duration {
	g.t.Helper()
	return g.await("the problem of "+object, 5*time.Second, func(r *culvert.Report) error {
		p := problem(r, object)
		if p == nil {
			return fmt.Errorf("no problem of %s in %+v", object, r.Problems)
		}
		if f == nil {
			return nil
		}
		return f(p)
	})
}
