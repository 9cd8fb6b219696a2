// Kubectl is Kubernetes' own, by itself: in one binary with the servers, each call would get them ready,
// too, and tests call it thousands of times.
package main

import (
	"os"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // its ways to log in
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
)

func main() {
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)) // an unreadable -v is reported by the flag itself
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err)
	}
}
