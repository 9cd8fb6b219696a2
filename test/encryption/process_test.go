package encryption

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/model"
)

// programEnv names the file that says what a process of this test is to do: keep one node as
// it should be, so that it can be killed.
const programEnv = "CULVERT_TEST_ENCRYPTION"

type program struct {
	Node      string
	File      string
	Key       string
	Model     model.Model
	PodRanges []netip.Prefix
	Once      bool // and then leave it alone
}

func TestMain(m *testing.M) {
	if file := os.Getenv(programEnv); file != "" {
		fmt.Fprintln(os.Stderr, runProgram(file))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func runProgram(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var p program
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	n := &node{c: &cluster{model: p.Model, podRanges: p.PodRanges}, file: p.File, enforced: true}
	if n.key, err = wgtypes.ParseKey(p.Key); err != nil {
		return err
	}
	i := slices.IndexFunc(p.Model.Nodes, func(m model.Node) bool { return m.Name == p.Node })
	n.model = p.Model.Nodes[i]
	for {
		if _, err := n.set(); err != nil {
			return err
		}
		if p.Once {
			select {}
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// process starts a process that keeps the node as it should be; with "once" it makes it so, and
// keeps the WireGuard device in user space going.
func (n *node) process(how ...string) *exec.Cmd {
	n.c.t.Helper()
	data, err := json.Marshal(program{n.model.Name, n.file, n.key.String(), n.c.model, n.c.podRanges, slices.Contains(how, "once")})
	if err != nil {
		n.c.t.Fatal(err)
	}
	file := filepath.Join(n.c.t.TempDir(), "program.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		n.c.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), programEnv+"="+file)
	cmd.Stderr = os.Stderr
	if err := n.Start(cmd); err != nil {
		n.c.t.Fatal(err)
	}
	n.c.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}
