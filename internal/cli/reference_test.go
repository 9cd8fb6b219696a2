package cli

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "write docs/reference/cli.md anew")

// The command reference is generated from the commands themselves.
func TestReferenceIsCurrent(t *testing.T) {
	var b strings.Builder
	b.WriteString("# Commands\n\nGenerated from the commands' own help (`go test ./internal/cli -update`). Exit codes: 0 done or\n\"yes\", 1 the answer is \"no\" or the work failed, 2 the command line is wrong.\n")
	describe(&b, newRoot(Streams{}))
	const path = "../../docs/reference/cli.md"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Error("docs/reference/cli.md is not current: go test ./internal/cli -update")
	}
}

func describe(b *strings.Builder, c *cobra.Command) {
	if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
		return
	}
	text := c.Long
	if text == "" {
		text = c.Short
	}
	fmt.Fprintf(b, "\n## %s\n\n```text\n%s\n```\n", c.CommandPath(), strings.TrimSpace(text))
	if c.Example != "" {
		fmt.Fprintf(b, "\nExamples:\n\n```sh\n%s\n```\n", strings.TrimSpace(strings.ReplaceAll(c.Example, "\n  ", "\n")))
	}
	if flags := strings.TrimRight(c.LocalFlags().FlagUsages(), "\n"); flags != "" {
		fmt.Fprintf(b, "\nUsage: `%s`\n\n```text\n%s\n```\n", c.UseLine(), flags)
	}
	for _, sub := range c.Commands() {
		describe(b, sub)
	}
}
