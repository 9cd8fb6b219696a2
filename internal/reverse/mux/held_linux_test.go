package mux

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"time"
)

// heldPair makes a connection of which the second end is a Held.
func heldPair(t *testing.T) (client *net.UnixConn, h *Held) {
	t.Helper()
	a, b := unixPair(t)
	client, h = a.(*net.UnixConn), Hold(b).(*Held)
	t.Cleanup(func() { _, _ = client.Close(), h.Close() })
	for _, c := range []net.Conn{client, h} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return client, h
}

// Whatever comes, in whatever pieces, is read as it is, at once and to its end.
func TestHeldReadsEverything(t *testing.T) {
	client, h := heldPair(t)
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	go func() {
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(1<<rand.IntN(18)))
			if _, err := client.Write(rest[:n]); err != nil {
				t.Error(err)
			}
			rest = rest[n:]
		}
		_ = client.CloseWrite()
	}()
	var got []byte
	for {
		b := make([]byte, 1+rand.IntN(1<<rand.IntN(18)))
		n, err := h.Read(b)
		got = append(got, b[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || n == 0 {
			t.Fatalf("after %d bytes: %d, %v", len(got), n, err)
		}
	}
	if !bytes.Equal(got, data) {
		t.Errorf("%d bytes were read, others than the %d that were written", len(got), len(data))
	}
	if _, err := h.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

// A line and its answer, many times: nobody waits for a byte that is held.
func TestHeldAnswersLines(t *testing.T) {
	client, h := heldPair(t)
	go func() { _, _ = io.Copy(h.UnixConn, h) }()
	for i := range 2000 {
		line := bytes.Repeat([]byte{byte(i)}, 1+i%5)
		if _, err := client.Write(line); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(line))
		if _, err := io.ReadFull(client, got); err != nil || !bytes.Equal(got, line) {
			t.Fatalf("line %d: %q, %v", i, got, err)
		}
	}
}

// Closed, it is a cut for the other end, behind all that was written; released before, an end.
func TestHeldIsACut(t *testing.T) {
	for name, x := range map[string]struct {
		before  func(client *net.UnixConn)
		release bool
		want    error
	}{
		"cut":                          {func(*net.UnixConn) {}, false, syscall.ECONNRESET},
		"cut, the other end had ended": {func(c *net.UnixConn) { _ = c.CloseWrite() }, false, syscall.ECONNRESET},
		"ended":                        {func(*net.UnixConn) {}, true, io.EOF},
		"both ended":                   {func(c *net.UnixConn) { _ = c.CloseWrite() }, true, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			client, h := heldPair(t)
			if _, err := client.Write([]byte("a question")); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			if n, err := h.Read(b); err != nil || string(b[:n]) != "a question" {
				t.Fatalf("%q, %v", b[:n], err)
			}
			x.before(client)
			if _, err := h.Write([]byte("an answer")); err != nil {
				t.Fatal(err)
			}
			if x.release {
				Release(h)
			}
			_ = h.Close()
			got, err := io.ReadAll(client)
			if err == nil {
				err = io.EOF
			}
			if string(got) != "an answer" || !errors.Is(err, x.want) {
				t.Errorf("%q, %v, want %v", got, err, x.want)
			}
		})
	}
}

// One that goes away with something unread is not taken for one that has ended.
func TestHeldSeesACut(t *testing.T) {
	client, h := heldPair(t)
	if _, err := client.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write([]byte("what nobody reads")); err != nil {
		t.Fatal(err)
	}
	_ = client.Close()
	if n, err := h.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%d, %v", n, err)
	}
}
