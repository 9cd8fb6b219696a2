package mux

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

const benchBlock = 64 << 10

func cpu() time.Duration {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// bulk measures one stream from w to r, with both ends in this process.
func bulk(b *testing.B, w io.WriteCloser, r io.Reader) {
	b.Helper()
	b.SetBytes(benchBlock)
	block := make([]byte, benchBlock)
	done := make(chan int64, 1)
	go func() {
		buf := make([]byte, benchBlock)
		var n int64
		for {
			k, err := r.Read(buf)
			n += int64(k)
			if err != nil {
				break
			}
		}
		done <- n
	}()
	start := cpu()
	b.ResetTimer()
	for range b.N {
		if _, err := w.Write(block); err != nil {
			b.Fatal(err)
		}
	}
	_ = w.Close()
	if n := <-done; n != int64(b.N)*benchBlock {
		b.Fatalf("%d of %d bytes arrived", n, int64(b.N)*benchBlock)
	}
	b.ReportMetric((cpu()-start).Seconds()/(float64(b.N)*benchBlock/1e9), "cpu-s/GB")
}

type closeWriter struct{ Conn }

func (c closeWriter) Close() error { return c.CloseWrite() }

func BenchmarkBulk(b *testing.B) {
	b.Run("tls", func(b *testing.B) {
		c, s := tlsPair(b, false)
		bulk(b, closeWriter{c}, s)
	})
	b.Run("culvert", func(b *testing.B) {
		c, s := tlsPair(b, true)
		accepted := make(chan *Stream, 1)
		server := New(s, Config{Accept: func(st *Stream) { _ = st.Accept(nil); accepted <- st }})
		client := New(c, Config{Dialer: true})
		defer server.Close()
		defer client.Close()
		st, err := client.Open(nil)
		if err != nil {
			b.Fatal(err)
		}
		bulk(b, closeWriter{st}, <-accepted)
	})
	b.Run("yamux", func(b *testing.B) {
		c, s := tlsPair(b, false)
		client, server := yamuxPair(b, c, s)
		st, err := client.Open()
		if err != nil {
			b.Fatal(err)
		}
		peer, err := server.Accept()
		if err != nil {
			b.Fatal(err)
		}
		bulk(b, st, peer)
	})
}

func yamuxPair(b *testing.B, c, s net.Conn) (client, server *yamux.Session) {
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = 4 << 20
	config.LogOutput = io.Discard
	server, err := yamux.Server(s, config)
	if err != nil {
		b.Fatal(err)
	}
	client, err = yamux.Client(c, config)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _ = server.Close(), client.Close() })
	return client, server
}

// BenchmarkOpen opens a stream, gets its answer and a byte each way, and closes it.
func BenchmarkOpen(b *testing.B) {
	b.Run("culvert", func(b *testing.B) {
		c, s := tlsPair(b, true)
		server := New(s, Config{Accept: func(st *Stream) {
			_ = st.Accept(nil)
			_, _ = st.WriteTo(st)
			_ = st.CloseWrite()
			_ = st.Close()
		}})
		client := New(c, Config{Dialer: true})
		defer server.Close()
		defer client.Close()
		for b.Loop() {
			st, err := client.Open(nil)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := st.Answer(context.Background()); err != nil {
				b.Fatal(err)
			}
			echo(b, st)
		}
	})
	b.Run("yamux", func(b *testing.B) {
		c, s := tlsPair(b, false)
		client, server := yamuxPair(b, c, s)
		go func() {
			for {
				st, err := server.Accept()
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(st, st); _ = st.Close() }()
			}
		}()
		for b.Loop() {
			st, err := client.Open()
			if err != nil {
				b.Fatal(err)
			}
			echo(b, st)
		}
	})
}

func echo(b *testing.B, c net.Conn) {
	var one [1]byte
	if _, err := c.Write(one[:]); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(c, one[:]); err != nil {
		b.Fatal(err)
	}
	_ = c.Close()
}
