// Package usage is what the command trees of both programs have in common: how a wrong
// command line is told from work that failed, and what the exit codes are.
//
// It stands apart from internal/cli so that the small program links no more than its own
// commands.
package usage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// ErrNo ends a command with exit code 1 after it has said everything itself.
var ErrNo = errors.New("the answer is no")

// Error is a wrong command line.
type Error struct{ Err error }

func (e Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e Error) Unwrap() error { return e.Err }

// Wrap makes err a wrong command line.
func Wrap(err error) error { return Error{err} }

// Errorf makes an Error.
func Errorf(format string, args ...any) error { return Error{fmt.Errorf(format, args...)} }

// Run runs one command line and returns the exit code: 0 done or "yes", 1 the answer is
// "no" or the work failed, 2 the command line is wrong. What went wrong is written to
// stderr, after the program's name.
func Run(ctx context.Context, root *cobra.Command, args []string, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Error{err} })
	cmd, err := root.ExecuteContextC(ctx)
	var wrong Error
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ErrNo):
		return 1
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "%s: %v\nSee '%s --help'.\n", root.Name(), err, cmd.CommandPath())
		return 2
	}
	fmt.Fprintf(stderr, "%s: %v\n", root.Name(), err)
	return 1
}

// NoArgs refuses positional arguments; on a command with subcommands it names them.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if !cmd.HasAvailableSubCommands() {
		return Errorf("%q is one argument too many", args[0])
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return Errorf("there is no command %q; did you mean %q?", args[0], near[0])
	}
	return Errorf("there is no command %q", args[0])
}

// Exactly takes the named positional arguments, all of them.
func Exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return Errorf("%s is missing", strings.Join(names[len(args):], " "))
		}
		if len(args) > len(names) {
			return Errorf("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}
