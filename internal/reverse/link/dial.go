package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"
)

// handshakeTimeout is for dialling, a proxy's answer and the TLS handshake together.
const handshakeTimeout = 8 * time.Second

// Dialer dials hubs: directly, or through the proxy that the environment names
// (HTTPS_PROXY, NO_PROXY). Names are resolved anew each time, so that a load balancer may
// change its address.
type Dialer struct {
	// Proxy says through which proxy to go to a host:port; nil: that of the environment.
	Proxy func(hostPort string) (*url.URL, error)
	// Dial opens connections; nil: net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// EnvironmentProxy is the proxy that HTTPS_PROXY and NO_PROXY give for a host:port.
func EnvironmentProxy(hostPort string) (*url.URL, error) {
	return http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: hostPort}})
}

// DialContext connects to address, "host:port".
func (d *Dialer) DialContext(ctx context.Context, address string) (net.Conn, error) {
	proxyOf, dial := d.Proxy, d.Dial
	if proxyOf == nil {
		proxyOf = EnvironmentProxy
	}
	if dial == nil {
		dial = (&net.Dialer{Timeout: handshakeTimeout, KeepAlive: -1}).DialContext
	}
	proxy, err := proxyOf(address)
	if err != nil {
		return nil, fmt.Errorf("HTTPS_PROXY: %w", err)
	}
	if proxy == nil {
		return dial(ctx, "tcp", address)
	}
	hostPort := proxy.Host
	if proxy.Port() == "" {
		port := "80"
		if proxy.Scheme == "https" {
			port = "443"
		}
		hostPort = net.JoinHostPort(proxy.Hostname(), port)
	}
	conn, err := dial(ctx, "tcp", hostPort)
	if err != nil {
		return nil, fmt.Errorf("proxy %s: %w", hostPort, err)
	}
	tunnelled, err := throughProxy(ctx, conn, proxy, address)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("proxy %s: %w", hostPort, err), conn.Close())
	}
	return tunnelled, nil
}

// throughProxy asks an HTTP proxy for a connection (RFC 9110, section 9.3.6).
func throughProxy(ctx context.Context, conn net.Conn, proxy *url.URL, address string) (net.Conn, error) {
	switch proxy.Scheme {
	case "http":
	case "https":
		t := tls.Client(conn, &tls.Config{ServerName: proxy.Hostname(), MinVersion: tls.VersionTLS12})
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		conn = t
	default:
		return nil, fmt.Errorf("scheme %q is not supported: use http or https", proxy.Scheme)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	request := "CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\n"
	if u := proxy.User; u != nil {
		password, _ := u.Password()
		request += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)) + "\r\n"
	}
	if _, err := conn.Write([]byte(request + "\r\n")); err != nil {
		return nil, err
	}
	reader := bufio.NewReaderSize(conn, 4<<10)
	answer, err := http.ReadResponse(reader, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, err
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answered %s to CONNECT %s", answer.Status, address)
	}
	if reader.Buffered() > 0 { // the hub speaks second
		return nil, errors.New("it sent more than an answer")
	}
	return conn, nil
}
