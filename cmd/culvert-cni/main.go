// Culvert-cni is a plug-in for container runtimes (CNI), the last one in a node's chain: pods
// get no network from it until the guard of the encryption between nodes stands. The node's
// agent installs it, see internal/cni.
package main

import (
	"os"
	"path/filepath"
	"time"

	"github.com/culvert-vpn/culvert/internal/cni"
	"github.com/culvert-vpn/culvert/internal/guard"
)

// patience is less than kubelets give a plug-in (two to four minutes), and enough for a node
// that boots: a pod that waits has its network as soon as the guard stands, one that was
// refused is tried again ten to fifteen seconds later.
const patience = 100 * time.Second

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
