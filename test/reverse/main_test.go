package reverse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// insideEnv says that this process is in a namespace of its own already.
const insideEnv = "CULVERT_REVERSE_INSIDE"

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(insideEnv) != "" {
		os.Exit(m.Run())
	}
	code, err := inside()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// inside runs the tests in a network namespace, with the TCP congestion control that Linux has by itself, or one
// that paces as little: a machine may have BBR, whose timers cost a path of several connections more than a direct one.
func inside() (code int, err error) {
	l, err := lab.NewUnique("reverse")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	l.Congestion = []string{"cubic", "reno"}
	h, err := l.Host("here")
	if err != nil {
		return 0, err
	}
	cmd := h.Command(context.Background(), os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := h.Start(cmd); err != nil {
		return 0, err
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}
