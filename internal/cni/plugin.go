package cni

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Call is one call of our plug-in by a container runtime: the protocol of
// containernetworking's SPEC.md 1.1, in the role of a chained plug-in.
type Call struct {
	Command string // CNI_COMMAND
	Stdin   io.Reader
	Stdout  io.Writer
	// Strict tells whether the state directory asks for a guard that drops.
	Strict func(stateDirectory string) (bool, error)
	// Standing tells whether one stands.
	Standing func() (bool, error)
	// Patience is how long a pod waits for it before it is refused; the runtime tries again.
	Patience time.Duration
}

// Error codes of SPEC.md.
const (
	codeVariable = 4  // invalid environment
	codeDecode   = 6  // the configuration cannot be read
	codeInvalid  = 7  // the configuration is not what it should be
	codeLater    = 11 // try again later
)

// versions of the protocol in which a chained plug-in is called in the same way.
var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const askEvery = 100 * time.Millisecond

type failure struct {
	code int
	text string
}

// Run answers the call and returns the exit code.
func (c Call) Run() int {
	var config struct {
		Version        string         `json:"cniVersion"`
		StateDirectory string         `json:"stateDirectory"`
		Previous       map[string]any `json:"prevResult"`
	}
	input, err := io.ReadAll(c.Stdin)
	if err == nil && len(input) > 0 {
		err = json.Unmarshal(input, &config)
	}
	if err != nil {
		return c.fail(versions[len(versions)-1], &failure{codeDecode, "network configuration: " + err.Error()})
	}
	switch c.Command {
	case "VERSION":
		return c.print(map[string]any{"cniVersion": versions[len(versions)-1], "supportedVersions": versions})
	case "DEL", "CHECK", "GC", "STATUS":
		return 0
	case "ADD":
		if config.Previous == nil {
			return c.fail(config.Version, &failure{codeInvalid, Plugin + " must come after another plug-in: there is no prevResult"})
		}
		if f := c.wait(config.StateDirectory); f != nil {
			return c.fail(config.Version, f)
		}
		config.Previous["cniVersion"] = config.Version
		return c.print(config.Previous)
	}
	return c.fail(config.Version, &failure{codeVariable, fmt.Sprintf("CNI_COMMAND %q is not known", c.Command)})
}

// wait returns nil when a pod may have a network. What cannot be found out counts as no.
func (c Call) wait(dir string) *failure {
	deadline := time.Now().Add(c.Patience)
	for {
		strict, err := c.Strict(dir)
		if err == nil && !strict {
			return nil
		}
		standing, err := c.Standing()
		if err == nil && standing {
			return nil
		}
		if time.Now().After(deadline) {
			why := "the guard of the encryption between nodes does not stand yet"
			if err != nil {
				why += " (" + err.Error() + ")"
			}
			return &failure{codeLater, why + ": this node's culvert-agent puts it up; see its log"}
		}
		time.Sleep(askEvery)
	}
}

func (c Call) print(o any) int {
	if err := json.NewEncoder(c.Stdout).Encode(o); err != nil {
		return 1
	}
	return 0
}

func (c Call) fail(version string, f *failure) int {
	c.print(map[string]any{"cniVersion": version, "code": f.code, "msg": f.text})
	return 1
}
