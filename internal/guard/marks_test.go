package guard

import (
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
)

// Cilium writes a pod's identity into the mark of what it sends: one whose number looks like a
// mark of ours must not open the guard.
func TestMarksOfOthers(t *testing.T) {
	h, x := open(t, "")
	if err := h.Up("lo", "10.9.9.9/32"); err != nil {
		t.Fatal(err)
	}
	h.IP("link", "add", "eth0", "type", "bridge")
	h.IP("link", "set", "eth0", "up")
	h.IP("route", "add", "10.244.0.0/16", "dev", "eth0", "src", "10.9.9.9")
	h.IP("neigh", "add", "10.244.7.7", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
	set(t, h, x, example(2))
	want := uint64(0)
	for _, c := range []struct {
		mark    int
		dropped bool
	}{
		{netstate.MarkExempt, false},
		{netstate.MarkExempt | 0x4000, false}, // of kube-proxy
		{netstate.MarkExempt | ciliumHost, false},
		{netstate.MarkExempt | 0x30000f00, true},
		{netstate.MarkExempt | 0xff000200, true},
		{0, true},
	} {
		if c.dropped {
			want++
		}
		h.Do(func() error {
			d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
				_ = raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, c.mark) })
				return err
			}}
			conn, err := d.Dial("udp", "10.244.7.7:9")
			if err != nil {
				return err
			}
			_, _ = conn.Write([]byte("x"))
			return conn.Close()
		})
		if n := counted(t, h, x, "out_pods"); n != want {
			t.Errorf("after a packet with the mark %#x %d are dropped, want %d", c.mark, n, want)
		}
	}
}

// An overlay's packets that come from the wire are dropped, whoever sends them.
func TestOverlayFromTheWire(t *testing.T) {
	labtest.Require(t, "nft")
	lab := labtest.New(t)
	h, stranger := lab.Host("node"), lab.Host("stranger")
	var x *Guard
	h.Do(func() (err error) { x, err = New(Options{}); return err })
	lab.Connect(stranger, "eth0", "172.31.0.66/24", h, "eth0", "172.31.0.1/24")
	g := example(2)
	for i, port := range []uint16{0, 8472} {
		g.Overlay = port
		set(t, h, x, g)
		stranger.Do(func() error {
			for _, to := range []int{8472, 8473} {
				c, err := net.Dial("udp", fmt.Sprintf("172.31.0.1:%d", to))
				if err != nil {
					return err
				}
				_, _ = c.Write([]byte("x"))
				_ = c.Close()
			}
			return nil
		})
		if n := counted(t, h, x, "in_overlay"); n != uint64(i) {
			t.Errorf("overlay at UDP %d: %d packets are dropped, want %d", port, n, i)
		}
	}
}

// An overlay's packets leave in the clear for nobody: the network plugin may have a node's address that the guard
// does not know yet, or any more. A pod's own packets to the same port of the world leave.
func TestOverlayToStrangers(t *testing.T) {
	labtest.Require(t, "nft")
	lab := labtest.New(t)
	h, stranger, pod := lab.Host("node"), lab.Host("stranger"), lab.Host("pod")
	lab.Connect(stranger, "eth0", "172.31.0.66/24", h, "eth0", "172.31.0.1/24")
	lab.Connect(pod, "eth0", "10.244.1.7/24", h, "cni0", "10.244.1.1/24")
	stranger.IP("route", "add", "10.244.1.0/24", "via", "172.31.0.1")
	pod.IP("route", "add", "default", "via", "10.244.1.1")
	var x *Guard
	h.Do(func() (err error) { x, err = New(Options{}); return err })
	h.Sysctl("net/ipv4/ip_forward", "1")
	say := func(from *labtest.Host, name, to string) {
		from.Do(func() error {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			_, _ = c.Write([]byte(name)) // refused: dropped on its way out
			return c.Close()
		})
	}
	g := example(2)
	for i, c := range []struct {
		port  uint16
		heard []string
	}{{0, []string{"host", "pod"}}, {8472, []string{"pod"}}} {
		var ear net.PacketConn
		stranger.Do(func() (err error) { ear, err = net.ListenPacket("udp4", "172.31.0.66:8472"); return err })
		g.Overlay = c.port
		set(t, h, x, g)
		say(h, "host", "172.31.0.66:8472")
		say(h, "host", "172.31.0.66:8473")
		say(h, "host", "10.244.1.7:8472") // on this node
		say(pod, "pod", "172.31.0.66:8472")
		for _, want := range c.heard {
			b := make([]byte, 16)
			_ = ear.SetReadDeadline(time.Now().Add(5 * time.Second))
			if n, _, err := ear.ReadFrom(b); err != nil || string(b[:n]) != want {
				t.Errorf("overlay at UDP %d: heard %q, %v; want the %s's", c.port, b[:n], err, want)
			}
		}
		_ = ear.Close()
		if n := counted(t, h, x, "out_overlay"); n != uint64(i) {
			t.Errorf("overlay at UDP %d: %d packets are dropped, want %d", c.port, n, i)
		}
	}
}

func counted(t *testing.T, h *labtest.Host, x *Guard, kind string) (n uint64) {
	t.Helper()
	h.Do(func() error {
		o, err := x.Observe()
		n = o.Dropped[kind]
		return err
	})
	return n
}
