package reverse

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/mux"
)

// One of each, and a connection through all of them.
func TestThrough(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("s")
	e := n.startEgress()
	to := serve(t, echo)
	for _, address := range []string{to, "good.example.com:" + port(to), "both.example.com:" + port(to), "[::ffff:" + target + "]:" + port(to)} {
		c, err := e.connect(address)
		if err != nil {
			t.Fatalf("%s: %v", address, err)
		}
		exchange(t, c)
	}
}

func port(hostPort string) string {
	_, p, _ := net.SplitHostPort(hostPort)
	return p
}

// exchange sends a megabyte each way, half closes, and reads to the end.
func exchange(t testing.TB, c net.Conn) {
	t.Helper()
	defer c.Close()
	data := make([]byte, 1<<20)
	_, _ = rand.Read(data)
	go func() {
		_, _ = c.Write(data)
		_ = c.(mux.Conn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
	}
}

// Everything that may never be dialled is refused with a reason, and nothing is dialled.
func TestRefused(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("s")
	e := n.startEgress()
	to := serve(t, echo)
	p := port(to)
	dialled.Clear()
	for address, want := range map[string]string{
		"127.0.0.1:" + p:                  "403 127.0.0.1 is loopback",
		"[::1]:" + p:                      "403 ::1 is loopback",
		"[::ffff:127.0.0.1]:" + p:         "403 127.0.0.1 is loopback",
		"169.254.169.254:80":              "403 169.254.169.254 is link-local",
		"[fe80::1]:80":                    "403 fe80::1 is link-local",
		"[64:ff9b::a9fe:a9fe]:80":         "403 64:ff9b::a9fe:a9fe is link-local (169.254.169.254 inside)",
		"[64:ff9b:1:7f00:0:100::]:80":     "403 64:ff9b:1:7f00:0:100:: is loopback",
		"[2002:7f00:1::]:80":              "403 2002:7f00:1:: is loopback",
		"[fd00:ec2::254]:80":              "403 fd00:ec2::254 is a metadata address",
		"0.0.0.0:" + p:                    "403 0.0.0.0 is unspecified",
		"[::]:" + p:                       "403 :: is unspecified",
		"224.0.0.1:80":                    "403 224.0.0.1 is multicast",
		"255.255.255.255:80":              "403 255.255.255.255 is reserved",
		"localhost:" + p:                  "403 localhost is loopback",
		"metadata.example.com:80":         "403 metadata.example.com resolves to 169.254.169.254",
		"mapped.example.com:80":           "403 mapped.example.com resolves to 127.0.0.1",
		"nowhere.example.com:80":          "502 nowhere.example.com has no address",
		"other.example.org:80":            "403 target other.example.org is not allowed",
		"127.1:80":                        "400 \"127.1\" is neither",
		"0x7f.1:80":                       "400 \"0x7f.1\" is neither",
		"2130706433:80":                   "400 \"2130706433\" is neither",
		"0177.0.0.1:80":                   "400 \"0177.0.0.1\" is neither",
		"[fe80::1%25eth0]:80":             "400",
		"10.9.8.7":                        "400 target \"10.9.8.7\" has no port",
		"10.9.8.7:0":                      "400 \"0\" is not a port",
		"10.9.8.7:http":                   "400 \"http\" is not a port",
		net.JoinHostPort(target, "1"):     "502 " + net.JoinHostPort(target, "1") + " refused the connection",
		"10.9.8.7:80:80":                  "400",
		"2001:db8::1:80":                  "400",
		"[10.9.8.7]:80":                   "400",
		strings.Repeat("a.", 200) + "b:1": "400",
	} {
		c, err := e.connect(address)
		if err == nil {
			_ = c.Close()
			t.Errorf("%s: connected", address)
			continue
		}
		if !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %q, want %q", address, err, want)
		}
	}
	dialled.Range(func(address, _ any) bool {
		if host, _, _ := net.SplitHostPort(address.(string)); host != target {
			t.Errorf("%s was dialled", address)
		}
		return true
	})
}

// 100 connections at once, each with its own bytes.
func TestManyAtOnceAreExact(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(2)
	n.startSpoke("a")
	n.startSpoke("b")
	e := n.startEgress()
	to := serve(t, echo)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			c, err := e.connect(to)
			if err != nil {
				t.Error(err)
				return
			}
			exchange(t, c)
		})
	}
	wg.Wait()
}

// A big transfer is exact, and the target's end of it is seen as an end.
func TestBulkIsExact(t *testing.T) {
	const size = 100 << 20
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	sum := make(chan [32]byte, 1)
	to := serve(t, func(c *net.TCPConn) {
		h := sha256.New()
		_, _ = io.CopyN(io.MultiWriter(c, h), rand.Reader, size)
		sum <- [32]byte(h.Sum(nil))
		_ = c.Close()
	})
	c, err := e.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := sha256.New()
	got, err := io.Copy(h, c)
	if err != nil || got != size || [32]byte(h.Sum(nil)) != <-sum {
		t.Errorf("%d bytes, %v", got, err)
	}
}

// What is cut on one side is not taken for an end on the other one.
func TestCutIsNoEnd(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	s := n.startSpoke("a")
	e := n.startEgress()
	accepted := make(chan *net.TCPConn, 4)
	to := serve(t, func(c *net.TCPConn) { accepted <- c })
	open := func() (mux.Conn, *net.TCPConn) {
		t.Helper()
		st, _, refusal := e.Open(context.Background(), to)
		if refusal != nil {
			t.Fatal(refusal)
		}
		t.Cleanup(func() { _ = st.Close() })
		return st, <-accepted
	}
	cut := func(what string, c io.Reader) {
		t.Helper()
		if _, err := io.ReadAll(c); err == nil {
			t.Errorf("%s: it looks like an end", what)
		}
	}
	client, server := open()
	_, _ = server.Write([]byte("half of"))
	_ = server.SetLinger(0)
	_ = server.Close()
	cut("target reset", client)

	client, server = open()
	_ = client.Close()
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, err := server.Read(make([]byte, 1))
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("client gone: %v", err)
	}

	client, server = open()
	defer server.Close()
	s.kill()
	began := time.Now()
	cut("spoke killed", client)
	if took := time.Since(began); took > time.Second {
		t.Errorf("the end of a killed spoke's streams took %s", took)
	}
}

// Half closing works in both directions.
func TestHalfClose(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c) // to the client's end
		_, _ = fmt.Fprintf(c, "%d bytes", len(b))
		_ = c.Close()
	})
	c, err := e.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write([]byte("hello"))
	time.Sleep(20 * time.Millisecond)
	_ = c.(*net.UnixConn).CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "5 bytes" {
		t.Errorf("%q, %v", b, err)
	}
}

// A connection that outlives every time limit of opening it, idle and busy.
func TestLongLived(t *testing.T) {
	n := newTenant(t, "u1")
	n.startHubs(1)
	n.startSpoke("a")
	e := n.startEgress()
	to := serve(t, func(c *net.TCPConn) { // slowly, for 12 s
		for range 120 {
			if _, err := c.Write(make([]byte, 100<<10)); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		_ = c.Close()
	})
	idle, err := e.connect(serve(t, echo))
	if err != nil {
		t.Fatal(err)
	}
	c, err := e.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.Copy(io.Discard, c); err != nil || got != 120*100<<10 {
		t.Errorf("%d bytes, %v", got, err)
	}
	exchange(t, idle)
}
