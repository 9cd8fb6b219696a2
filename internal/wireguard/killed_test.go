package wireguard

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/secret"
)

const killedEnv = "WIREGUARD_TEST_KILLED"

// killedDevice is what the process that is killed and its successor desire.
func killedDevice(private wgtypes.Key, peer netstate.Key) netstate.WireGuard {
	return netstate.WireGuard{
		Link: "cvtwg0", PrivateKey: secret.New(private[:]), PublicKey: netstate.Key(private.PublicKey()), ListenPort: 51820,
		Peers: []netstate.WireGuardPeer{{Name: "device default/a", PublicKey: peer, AllowedIPs: ips("10.9.0.2/32")}},
	}
}

// TestKilled: the process is killed and another one starts. In user space the link goes with
// the process, the new one starts afresh and is first to greet: traffic is back within 5 s.
// In the kernel the new one finds nothing to change, and no ping is lost.
func TestKilled(t *testing.T) {
	if v := os.Getenv(killedEnv); v != "" {
		killedProcess(t, v)
		return
	}
	onEveryDatapath(t, func(t *testing.T, kind Datapath) {
		l := labtest.New(t, "ping", "wg")
		h, far := l.Host("gw"), l.Host("far")
		l.Connect(h, "eth0", "192.0.2.1/24", far, "eth0", "192.0.2.2/24")
		own, s := newKeys(t), newStock(t, far, "10.9.0.2/24")
		const port = 51821
		s.wg("listen-port", fmt.Sprint(port))
		s.peer(own.public, gatewayAt, "10.9.0.0/24")
		d := killedDevice(own.private, s.public)
		t.Setenv(killedEnv, fmt.Sprintf("%s %s %s", kind, own.private, s.public))
		cmd, log := h.Background(os.Args[0], "-test.run=^TestKilled$", "-test.v")
		labtest.Eventually(t, 20*time.Second, "the first process", func() error {
			b, err := os.ReadFile(log)
			if err == nil && !strings.Contains(string(b), "first process is ready") {
				err = fmt.Errorf("it said %q", b)
			}
			return err
		})
		up := func() {
			if err := h.Up("cvtwg0", "10.9.0.1/24"); err != nil {
				t.Fatal(err)
			}
		}
		up()
		labtest.Eventually(t, 10*time.Second, "ping", func() error { return s.ping("10.9.0.1") })
		pings := make(chan string, 1)
		go func() {
			out, _ := s.Try("ping", "-q", "-i0.05", "-c60", "-W1", "10.9.0.1")
			pings <- out
		}()

		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if kind == UserSpace {
			labtest.Eventually(t, 5*time.Second, "the link to go", func() error {
				if out, err := h.Try("ip", "link", "show", "cvtwg0"); err == nil {
					return fmt.Errorf("there is %s", out)
				}
				return nil
			})
			d.Peers[0].Endpoint, d.Peers[0].Initiate = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), port), true
		}
		w := newWireGuard(t, h, kind)
		began := time.Now()
		if kind == Kernel {
			set(t, w, 0, d)
			if out := <-pings; !strings.Contains(out, " 0% packet loss") {
				t.Error(out)
			}
			return
		}
		set(t, w, 4, d) // the link, its key and port, the peer
		set(t, w, 0, d)
		up()
		labtest.Eventually(t, 5*time.Second, "ping after the restart", func() error { return s.ping("10.9.0.1") })
		t.Logf("traffic is back %s after the restart", time.Since(began).Round(time.Millisecond))
		<-pings
	})
}

func killedProcess(t *testing.T, v string) {
	var kind, private, peer string
	if _, err := fmt.Sscan(v, &kind, &private, &peer); err != nil {
		t.Fatal(err)
	}
	own, err := wgtypes.ParseKey(private)
	if err != nil {
		t.Fatal(err)
	}
	far, err := wgtypes.ParseKey(peer)
	if err != nil {
		t.Fatal(err)
	}
	w, err := New(Options{Datapath: Datapath(kind)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Set(context.Background(), []netstate.WireGuard{killedDevice(own, netstate.Key(far))}); err != nil {
		t.Fatal(err)
	}
	fmt.Println("first process is ready")
	time.Sleep(time.Minute)
}
