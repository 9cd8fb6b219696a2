// Culvert is a VPN that lives in Kubernetes; this is all of it in one program.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/culvert-vpn/culvert/internal/cli"
)

// The first thread is the process to others (/proc/PID/ns, /proc/PID/net), and the only one that a goroutine which
// enters another namespace cannot take with it when it ends: nothing may run there but main.
func init() { runtime.LockOSThread() }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := make(chan int)
	go func() {
		code <- cli.Run(ctx, os.Args[1:], cli.Streams{Program: os.Args[0], In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	}()
	outcome := <-code
	stop()
	os.Exit(outcome)
}
