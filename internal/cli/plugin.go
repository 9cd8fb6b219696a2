package cli

import (
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// pluginName is the program's name as a plug-in of kubectl: "kubectl culvert" runs it.
const pluginName = "kubectl-culvert"

// asPlugin makes the help of a program that is called kubectl-culvert speak of "kubectl
// culvert".
func asPlugin(root *cobra.Command, program string) {
	if name := strings.TrimSuffix(filepath.Base(program), ".exe"); name != pluginName {
		return
	}
	root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl culvert"}
	rename(root)
}

func rename(cmd *cobra.Command) {
	for _, text := range []*string{&cmd.Long, &cmd.Example} {
		*text = strings.ReplaceAll(*text, "  culvert ", "  kubectl culvert ")
		*text = strings.ReplaceAll(*text, "'culvert ", "'kubectl culvert ")
	}
	for _, sub := range cmd.Commands() {
		rename(sub)
	}
}

// isPlugin reports whether kubectl runs the program.
func isPlugin(cmd *cobra.Command) bool {
	return cmd.Root().Annotations[cobra.CommandDisplayNameAnnotation] != ""
}

// command is how people write a command: "culvert device", or "kubectl culvert device".
func command(cmd *cobra.Command, rest string) string {
	if isPlugin(cmd) {
		return "kubectl culvert " + rest
	}
	return "culvert " + rest
}
