package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// answerPort is where every host of the demo answers.
const answerPort = 8080

// What a client asks a TCP answerer for, as its first byte.
const (
	askWho  = 'w' // the client's address as the server sees it, then the end
	askData = 'd' // data until the client closes
)

// Serve answers on TCP and UDP at the given addresses until ctx ends: it tells every
// client from where it was seen. It is what runs on the hosts of the demo.
func Serve(ctx context.Context, addrs []string) error {
	for _, a := range addrs {
		at := net.JoinHostPort(a, strconv.Itoa(answerPort))
		tcp, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		defer tcp.Close()
		udp, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		defer func() { _ = udp.Close() }()
		go answerTCP(tcp)
		go answerUDP(udp)
	}
	<-ctx.Done()
	return nil
}

func answerTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			ask := make([]byte, 1)
			if _, err := io.ReadFull(c, ask); err != nil {
				return
			}
			if ask[0] == askWho {
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				_, _ = io.WriteString(c, host)
				return
			}
			block := make([]byte, 128<<10)
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
	}
}

func answerUDP(c net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		host, _, _ := net.SplitHostPort(from.String())
		_, _ = c.WriteTo([]byte(host), from)
	}
}

// probe is one row of the matrix.
type probe struct {
	From     *lab.Host
	FromName string
	To       string // what the target is, for people
	Network  string // "tcp" or "udp"
	Address  netip.Addr
	Port     uint16
	// Seen is the client address that the target must see; zero: the path must not exist.
	Seen netip.Addr
}

// outcome is what a probe found.
type outcome struct {
	Reached bool
	Seen    string
	Latency time.Duration // median round trip, connection set-up included for TCP
	Gbits   float64       // TCP only
	Why     string        // what went wrong
}

// asExpected compares an outcome with what the probe expects.
func (p probe) asExpected(o outcome) bool {
	if !p.Seen.IsValid() {
		return !o.Reached
	}
	return o.Reached && o.Seen == p.Seen.String()
}

const (
	probeTimeout = 1500 * time.Millisecond
	udpTries     = 3
	probeRounds  = 5
	bulkTime     = 300 * time.Millisecond
)

// run makes the probe's connections from inside its host.
func (p probe) run(ctx context.Context) outcome {
	var o outcome
	err := p.From.Do(func() error {
		var times []time.Duration
		for range probeRounds {
			start := time.Now()
			seen, err := p.who(ctx)
			if err != nil {
				return err
			}
			times = append(times, time.Since(start))
			o.Seen = seen
		}
		slices.Sort(times)
		o.Latency = times[len(times)/2]
		return nil
	})
	if err != nil {
		o.Why = err.Error()
		return o
	}
	o.Reached = true
	if p.Network == "tcp" {
		err = p.From.Do(func() (err error) { o.Gbits, err = p.bulk(ctx); return err })
		if err != nil {
			o.Reached, o.Why = false, err.Error()
		}
	}
	return o
}

func (p probe) dial(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: probeTimeout}
	return d.DialContext(ctx, p.Network, net.JoinHostPort(p.Address.String(), strconv.Itoa(int(p.Port))))
}

func (p probe) who(ctx context.Context) (string, error) {
	c, err := p.dial(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	tries := 1
	if p.Network == "udp" {
		tries = udpTries // a datagram may be lost on a busy machine
	}
	buf := make([]byte, 64)
	for range tries {
		if err = c.SetDeadline(time.Now().Add(probeTimeout / time.Duration(tries))); err != nil {
			return "", err
		}
		if _, err = c.Write([]byte{askWho}); err != nil {
			return "", err
		}
		var n int
		if n, err = c.Read(buf); err == nil {
			return string(buf[:n]), nil
		}
	}
	return "", err
}

// bulk measures how much arrives in a short while.
func (p probe) bulk(ctx context.Context) (float64, error) {
	c, err := p.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(bulkTime + probeTimeout)); err != nil {
		return 0, err
	}
	if _, err := c.Write([]byte{askData}); err != nil {
		return 0, err
	}
	buf := make([]byte, 256<<10)
	var total int64
	start := time.Now()
	for time.Since(start) < bulkTime {
		n, err := c.Read(buf)
		total += int64(n)
		if err != nil {
			return 0, fmt.Errorf("after %d bytes: %w", total, err)
		}
	}
	return float64(total) * 8 / time.Since(start).Seconds() / 1e9, nil
}
