// Culvert-tunnel is the reversed tunnel alone: hub, spoke, egress and front, without the
// Kubernetes client, so that ten thousand hubs stay small.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/culvert-vpn/culvert/internal/cli/tunnel"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := tunnel.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
