package front

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

// childVariable holds the options of a front that runs in a process of its own, so that
// its memory and descriptors are its own too.
const childVariable = "CULVERT_TEST_FRONT"

type childOptions struct {
	Routes, Listen, HTTP, Access string
	DrainTimeout                 time.Duration
}

// runChild runs the front that the variable describes, until SIGTERM.
func runChild(options string) error {
	var o childOptions
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	run := RunOptions{
		Routes: o.Routes, Listen: []string{o.Listen}, HTTP: o.HTTP, DrainTimeout: o.DrainTimeout,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if o.Access != "" {
		f, err := os.Create(o.Access)
		if err != nil {
			return err
		}
		run.AccessLog = f
	}
	return Run(ctx, run)
}

// child is a front in a process of its own.
type child struct {
	*exec.Cmd
	done chan error
}

// startChild starts a front and waits until it listens.
func startChild(t testing.TB, o childOptions) *child {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{exec.Command(os.Args[0]), make(chan error, 1)}
	c.Env = append(os.Environ(), childVariable+"="+string(text))
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.done <- c.Wait(); close(c.done) }()
	t.Cleanup(func() {
		_ = c.Process.Kill()
		for range c.done { // until it is closed
		}
	})
	eventually(t, 10*time.Second, "the front listens", func() error {
		conn, err := net.Dial("tcp", o.Listen)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return c
}

// freePort is an address on which nobody listens.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
