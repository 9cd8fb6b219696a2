package bench

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// tailscalePair is two tailscaled that a coordination server beside a tells of each other
// (hack/bench/control), with Tailscale's own firewall, a TUN device, and the MTU of the
// others instead of its 1,280. Packets go directly: a relay's would be no comparison.
func tailscalePair(p *pair) {
	program := func(name string) string { return filepath.Join(peers, name) }
	p.a.Background(program("control"), outerA)
	ends := p.ends()
	for _, e := range ends {
		p.program(e.host, "env", "TS_DEBUG_MTU=1420", "TS_DEBUG_FIREWALL_MODE=nftables",
			program("tailscaled"), "--state="+p.path(e.name+".state"), "--statedir="+p.path(e.name), "--socket="+p.path(e.name+".sock"),
			"--tun=tailscale0", "--port=41641", "--no-logs-no-support", "--verbose=-1")
	}
	client := func(e end, args ...string) (string, error) {
		out, err := exec.Command(program("tailscale"), append([]string{"--socket=" + p.path(e.name+".sock")}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("tailscale %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return string(out), err
	}
	for i, e := range ends {
		labtest.Eventually(p.t, 20*time.Second, "tailscaled is up", func() error {
			_, err := client(e, "up", "--login-server=http://"+outerA+":8080", "--hostname="+e.name, "--accept-dns=false", "--timeout=15s")
			return err
		})
		own, err := client(e, "ip", "-4")
		if err != nil {
			p.t.Fatal(err)
		}
		*[]*string{&p.from, &p.to}[i] = strings.TrimSpace(own)
	}
	p.link = "tailscale0"
	p.proof = func() error { return direct(client(ends[0], "status", "--json")) }
	labtest.Eventually(p.t, 30*time.Second, "a direct path", func() error {
		_, err := p.a.Try("ping", "-c", "1", "-W", "1", p.to) // or nobody looks for one
		if err == nil {
			err = p.proof()
		}
		return err
	})
}

// direct says that the only peer in tailscale's status is reached at its own address.
func direct(status string, err error) error {
	if err != nil {
		return err
	}
	var s struct {
		Peer map[string]struct{ CurAddr, Relay string }
	}
	if err := json.Unmarshal([]byte(status), &s); err != nil {
		return fmt.Errorf("tailscale status: %w", err)
	}
	for _, peer := range s.Peer {
		if peer.CurAddr != outerB+":41641" {
			return fmt.Errorf("packets go by %q, relay %q", peer.CurAddr, peer.Relay)
		}
	}
	if len(s.Peer) != 1 {
		return fmt.Errorf("%d peers", len(s.Peer))
	}
	return nil
}
