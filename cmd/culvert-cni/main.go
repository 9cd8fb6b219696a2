// Culvert-cni is a plug-in for container runtimes (CNI), the last one in a node's chain: it
// refuses pods a network until the guard of the encryption between nodes stands. The
// node's agent installs it, see internal/cni.
package main

import (
	"os"
	"path/filepath"
	"time"

	"github.com/culvert-vpn/culvert/internal/cni"
	"github.com/culvert-vpn/culvert/internal/guard"
)

// patience is much less than runtimes give a plug-in, and enough for an agent that is just
// starting.
const patience = 5 * time.Second

func main() {
	os.Exit(cni.Call{
		Command: os.Getenv("CNI_COMMAND"), Stdin: os.Stdin, Stdout: os.Stdout, Patience: patience,
		Strict: func(dir string) (bool, error) {
			g, err := guard.Load(filepath.Join(dir, guard.FileName))
			return g != nil && g.Strict, err
		},
		Standing: guard.Standing,
	}.Run())
}
