package process

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Time limits of the HTTP servers.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 30 * time.Second
	writeTimeout      = time.Minute // pprof asks for more by itself
	idleTimeout       = 2 * time.Minute
	shutdownTimeout   = time.Second // well within a gateway pod's grace period: another pod waits
	maxHeaderBytes    = 64 << 10
)

// ServeTCP starts a server on a TCP address ("127.0.0.1:9586", ":9586") as a part of the
// group. It fails at once when the address is not to be had.
func ServeTCP(g *Group, address string, h http.Handler) error {
	var c net.ListenConfig
	l, err := c.Listen(g.ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve HTTP on %s: %w", address, err)
	}
	Serve(g, l, h)
	return nil
}

// ServeUnix starts a server on a Unix socket that only its owner can use, as a part of
// the group. See ListenUnix for when it fails.
func ServeUnix(g *Group, path string, h http.Handler) error {
	l, err := ListenUnix(g.ctx, path, 0o600)
	if err != nil {
		return err
	}
	Serve(g, l, h)
	return nil
}

// Serve starts a server on l as a part of the group. When the group ends, requests in
// flight get 5 s to end, then they are cut off. It closes l.
func Serve(g *Group, l net.Listener, h http.Handler) {
	name := fmt.Sprintf("serve HTTP on %s", l.Addr())
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
	g.Go(name, func(ctx context.Context) error {
		failed := make(chan error, 1)
		go func() { failed <- server.Serve(l) }()
		select {
		case err := <-failed:
			return err
		case <-ctx.Done():
		}
		// The group's context has ended already.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		err := server.Shutdown(grace)
		if err != nil {
			err = errors.Join(err, server.Close())
		}
		if serveErr := <-failed; !errors.Is(serveErr, http.ErrServerClosed) {
			err = errors.Join(err, serveErr)
		}
		return err
	})
}
