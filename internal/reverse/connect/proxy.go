package connect

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/meter"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Proxy serves "GET http://host/…" through the tunnel: Prometheus and others ask an HTTP
// proxy so for targets without TLS.
func Proxy(open Open, m *meter.Meter) http.Handler {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			began := time.Now()
			st, opened, refusal := open(ctx, address)
			if refusal != nil {
				m.Refused(refusal.Reason)
				return nil, refusal
			}
			m.Opened("target", opened.Dial, time.Since(began))
			return &counted{Conn: st, meter: m}, nil
		},
		MaxIdleConnsPerHost:   2,
		IdleConnTimeout:       30 * time.Second,
		ResponseHeaderTimeout: time.Minute,
		DisableCompression:    true,
	}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.Header.Del("Proxy-Authorization")
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			status := http.StatusBadGateway
			if refusal, ok := asRefusal(err); ok {
				w.Header().Set("Culvert-Reason", string(refusal.Reason))
				status = refusal.Reason.Status()
			}
			http.Error(w, wire.Line(err.Error()), status)
		},
		FlushInterval: -1,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !IsAbsolute(r) {
			w.Header().Set("Allow", http.MethodConnect)
			http.Error(w, "this is a proxy: use CONNECT host:port, or GET http://host:port/", http.StatusMethodNotAllowed)
			return
		}
		proxy.ServeHTTP(w, r)
	})
}

func asRefusal(err error) (r *wire.Refusal, ok bool) {
	ok = errors.As(err, &r)
	return r, ok
}

// counted counts the bytes of a stream.
type counted struct {
	net.Conn
	meter *meter.Meter
	in    atomic.Int64
	out   atomic.Int64
	once  sync.Once
}

// Read implements net.Conn.
func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(int64(n))
	return n, err
}

// Write implements net.Conn.
func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(int64(n))
	return n, err
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.once.Do(func() { c.meter.Closed(c.out.Load(), c.in.Load(), nil) })
	return c.Conn.Close()
}
