package bench

import (
	"testing"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// apart is what Culvert's IPsec costs beside a plain strongSwan with the same data path, in
// parts: Culvert's own rules are loaded beside the plain one, and taken from Culvert's.
func apart(brief bool) *suite {
	s := &suite{
		name: "ipsec", title: "IPsec in parts: strongSwan's data path in user space, and what stands around it", against: "strongSwan",
		metrics: []metric{{name: "TCP", unit: "Gbit/s"}, {name: "RTT", unit: "ms", less: true}, {name: "CPU", unit: "s/GB", less: true}},
		turns:   3,
	}
	if brief {
		return s
	}
	var ours *pair
	add := func(name string, isOurs bool, up func(*pair)) {
		s.contenders = append(s.contenders, contender{name, isOurs, needs("charon-systemd"), func(t *testing.T, l *labtest.Lab) candidate {
			p := newPair(t, l, 2, up)
			if name == "Culvert" {
				ours = p
			}
			return stream{p, name == "Culvert, without its rules"}
		}})
	}
	add("Culvert", true, culvertPair("ipsec"))
	add("strongSwan", false, strongswanPair)
	add("strongSwan, connection tracking", false, func(p *pair) {
		strongswanPair(p)
		for _, h := range []*labtest.Host{p.a, p.b} {
			h.Run("nft", "table inet x { chain c { type filter hook forward priority 0; ct state invalid drop; }; }")
		}
	})
	add("strongSwan, Culvert's rules", false, func(p *pair) {
		strongswanPair(p)
		for h, from := range map[*labtest.Host]*labtest.Host{p.a: ours.a, p.b: ours.b} {
			file := p.write(h.Name+".nft", from.Run("nft", "-s", "list", "table", "inet", "culvert"))
			h.Run("nft", "-f", file)
		}
	})
	add("Culvert, without its rules", true, culvertPair("ipsec"))
	return s
}

// stream measures a pair by one TCP stream.
type stream struct {
	*pair
	bare bool // its gateways' rules are deleted first
}

func (s stream) measure(t *testing.T) figures {
	t.Helper()
	if s.bare {
		for _, h := range []*labtest.Host{s.a, s.b} {
			_, _ = h.Try("nft", "delete", "table", "inet", "culvert") // the gateway may have put it up again
		}
	}
	out := figures{"RTT": s.ping(t, 50)}
	before, cpu := s.received(t), s.cpu()
	sum, err := s.iperf(s.seconds)
	if err != nil {
		t.Fatal(err)
	}
	out["TCP"], out["CPU"] = sum.bits/1e9, (s.cpu()-cpu)/(sum.bytes/1e9)
	if moved := s.received(t) - before; moved < sum.bytes*0.9 {
		t.Errorf("iperf3 says %.0f bytes, through %s came %.0f", sum.bytes, s.link, moved)
	}
	if s.bare {
		if _, err := s.b.Try("nft", "list", "table", "inet", "culvert"); err == nil {
			t.Log("the gateway's rules came back meanwhile")
		}
	}
	return out
}
