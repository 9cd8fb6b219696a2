// Server is the program of the cluster's test pods: it says and logs who calls.
//
//	server                         HTTP on TCP 8080, an echo on TCP and UDP 8081, until it is ended
//	server tls CERTIFICATE KEY     a webhook and an aggregated API on TCP 8443 (files), until it is ended
//	server pause                   nothing, until it is ended
//	server get URL                 prints what an HTTP server answers
//	server hash URL                prints "bytes=N sha256=HEX" of it
//	server send URL N              posts N bytes of the pattern and prints the answer
//	server echo tcp|udp ADDR:PORT TEXT   sends the text and prints what comes back
//	server lookup NAME ADDRESS     prints the addresses that a DNS server knows, over UDP
//
// HTTP: / answers with a line "client=ADDRESS pod=NAME node=NODE" (the names from the
// variables POD_NAME, or the host's name, and NODE_NAME); /bytes?n=N with N bytes of the
// pattern (see type pattern); a POST to /sink with a line "bytes=N sha256=HEX" of what
// was sent. The echo on 8081 sends back, for TCP, a line "client=ADDRESS" and then what
// it gets; for UDP "client=ADDRESS " and the packet. Each call is logged as such a line.
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	var err error
	switch {
	case len(os.Args) < 2:
		err = serve()
	case os.Args[1] == "tls" && len(os.Args) == 4:
		err = serveTLS(os.Args[2], os.Args[3])
	case os.Args[1] != "pause":
		if err = call(os.Args[1:]); err == nil {
			return
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
	<-stop
}

func serve() error {
	web, err := net.Listen("tcp", ":8080")
	if err != nil {
		return err
	}
	streams, err := net.Listen("tcp", ":8081")
	if err != nil {
		return err
	}
	packets, err := net.ListenPacket("udp", ":8081")
	if err != nil {
		return err
	}
	s := &http.Server{Handler: handler(), ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(web) }()
	go echoStreams(streams)
	go echoPackets(packets)
	return nil
}

func handler() http.Handler {
	pod := os.Getenv("POD_NAME")
	if pod == "" {
		pod, _ = os.Hostname()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "client=%s pod=%s node=%s\n", host(r.RemoteAddr), pod, os.Getenv("NODE_NAME"))
	})
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "want ?n=BYTES", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.CopyN(w, &pattern{}, n)
	})
	mux.HandleFunc("/sink", func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, err := io.Copy(hash, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, _ = fmt.Fprintf(w, "bytes=%d sha256=%x\n", n, hash.Sum(nil))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		slog.Info("http", "client", host(r.RemoteAddr), "method", r.Method, "path", r.URL.Path)
		mux.ServeHTTP(w, r)
	})
}

// pattern is an endless stream of bytes in which every 8 differ from those before: the
// number of the word, big endian, times an odd constant.
type pattern struct {
	word uint64
	rest []byte
}

func (p *pattern) Read(b []byte) (int, error) {
	for n := 0; n < len(b); {
		if len(p.rest) == 0 {
			v := p.word * 0x9E3779B97F4A7C15
			p.word++
			p.rest = []byte{byte(v >> 56), byte(v >> 48), byte(v >> 40), byte(v >> 32), byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
		}
		k := copy(b[n:], p.rest)
		n, p.rest = n+k, p.rest[k:]
	}
	return len(b), nil
}

func echoStreams(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		slog.Info("tcp", "client", host(c.RemoteAddr().String()))
		go func() {
			defer c.Close()
			_, _ = fmt.Fprintf(c, "client=%s\n", host(c.RemoteAddr().String()))
			_, _ = io.Copy(c, c)
		}()
	}
}

func echoPackets(c net.PacketConn) {
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		slog.Info("udp", "client", host(from.String()), "bytes", n)
		_, _ = c.WriteTo(append([]byte("client="+host(from.String())+" "), b[:n]...), from)
	}
}

// host is the address without the port; IPv4 in its own notation.
func host(address string) string {
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip := net.ParseIP(h); ip != nil {
		return ip.String()
	}
	return h
}
