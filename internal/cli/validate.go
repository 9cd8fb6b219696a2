package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source"
)

func newValidate() *cobra.Command {
	var files []string
	var out output
	cmd := &cobra.Command{
		Use:   "validate -f FILE…",
		Short: "Check manifests: every error, with its field path",
		Long: `Reads manifests (files, directories, or - for standard input) and says everything that is
wrong with them: in one object alone, and between objects. It runs the very code that the
gateway and the operator run. Exit code 1 when anything is refused.`,
		Example: `  culvert validate -f manifests/
  culvert validate -f gateway.yaml -f site.yaml
  kubectl get vgw,sites,devices -o yaml | culvert validate -f -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			objects, problems, err := load(cmd, files)
			if err != nil {
				return err
			}
			problems = append(problems, model.Parse(objects, model.ParseOptions{}).Problems...)
			return reportProblems(cmd, &out, problems, objects.Count())
		},
	}
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file or directory with manifests, - for standard input; may be repeated")
	out.flag(cmd)
	return cmd
}

// load reads the manifests that the -f flags name.
func load(cmd *cobra.Command, files []string) (model.Objects, []model.Problem, error) {
	if len(files) == 0 {
		return model.Objects{}, nil, usagef("no manifests: give them with -f FILE")
	}
	return source.Load(files, cmd.InOrStdin())
}

// problemLine is how a problem reads in a terminal.
func problemLine(p model.Problem) string {
	line := p.Message
	if p.Field != "" {
		line = p.Field + ": " + line
	}
	if p.Kind != "" {
		line = p.Kind + " " + p.Object.String() + ": " + line
	}
	if p.Origin != "" {
		line = p.Origin + ": " + line
	}
	return line
}

func reportProblems(cmd *cobra.Command, out *output, problems []model.Problem, count int) error {
	type item struct {
		Object, Origin, Field, Reason, Message string
		Pending                                bool
	}
	items := []item{}
	refused := 0
	for _, p := range problems {
		items = append(items, item{p.Kind + " " + p.Object.String(), p.Origin, p.Field, p.Reason, p.Message, p.Pending})
		if !p.Pending {
			refused++
		}
	}
	err := out.print(cmd.OutOrStdout(), items, func(w io.Writer) error {
		for _, p := range problems {
			note := ""
			if p.Pending && p.Reason != model.ReasonIgnored {
				note = " (may still come)"
			}
			if _, err := fmt.Fprintln(w, problemLine(p)+note); err != nil {
				return err
			}
		}
		_, err := fmt.Fprintf(w, "%d objects, %d errors\n", count, refused)
		return err
	})
	if err != nil {
		return err
	}
	if refused > 0 {
		return errNo
	}
	return nil
}
