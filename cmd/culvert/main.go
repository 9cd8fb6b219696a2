// Culvert is a VPN that lives in Kubernetes; this is all of it in one program.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/culvert-vpn/culvert/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Run(ctx, os.Args[1:], cli.Streams{Program: os.Args[0], In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	stop()
	os.Exit(code)
}
