package netlab

import (
	"fmt"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// TestScaleSites: sites of both kinds, most of which never call. Ten times as many of them
// cost about ten times as much, and an edit of one costs little.
func TestScaleSites(t *testing.T) {
	labtest.Require(t, "charon-systemd")
	type cost struct{ start, cpu, edit time.Duration }
	costs := map[int]cost{}
	counts := []int{10, 100, 400}
	for _, count := range counts {
		t.Run(fmt.Sprintf("%d sites", count), func(t *testing.T) {
			n := newScaleNet(t)
			g := newGateway(t, n.gateway)
			g.write("gateway.yaml", scaleGateway())
			for i := range count {
				name := fmt.Sprintf("site-%03d", i)
				ranges := fmt.Sprintf("10.%d.%d.0/24", 10+i>>8, i&255)
				if i%2 == 0 {
					g.write(name+".yaml", siteYAML(name, ranges, "wireguard: {publicKey: "+anyKey().String()+"}"))
				} else {
					g.write(name+".yaml", pskSiteYAML(name, ranges, "a pre-shared key of "+name))
				}
			}
			c := cost{start: time.Hour}
			for range 2 {
				g.kill()
				wall, cpu := startScaled(t, g)
				t.Logf("%d sites: ready after %s, %s of processor time (load %s)", count, ms(wall), ms(cpu), load())
				c.start, c.cpu = min(c.start, wall), cpu
			}
			g.await("all sites are there", 5*time.Second, func(r *culvert.Report) error {
				if len(r.Sites) != count || len(r.Problems)+len(r.Errors) > 0 {
					return fmt.Errorf("%d sites, problems %v, errors %v", len(r.Sites), r.Problems, r.Errors)
				}
				return nil
			})
			// One IPsec site's ranges change; in effect when the kernel has the route.
			var took []time.Duration
			for i := range 5 {
				time.Sleep(200 * time.Millisecond)
				began := time.Now()
				want := fmt.Sprintf("10.200.%d.0/24", i)
				g.write("site-001.yaml", pskSiteYAML("site-001", want, "a pre-shared key of site-001"))
				for {
					out := n.gateway.Run("ip", "route", "show", "table", "all", want)
					if out != "" {
						break
					}
					if time.Since(began) > 10*time.Second {
						t.Fatalf("no route to %s", want)
					}
					time.Sleep(2 * time.Millisecond)
				}
				took = append(took, time.Since(began))
			}
			c.edit = scaleMedian(took)
			costs[count] = c
			t.Logf("%d sites: an edit is in effect after %s; RSS %d MiB; %d files, %d goroutines (load %s)",
				count, ms(c.edit), g.rss()>>20, g.fds(), g.goroutines(), load())
			if count == 100 {
				used := g.cpu()
				time.Sleep(5 * time.Second)
				idle := float64(g.cpu()-used) / float64(5*time.Second)
				t.Logf("%d sites: idle %.1f %% of a core", count, 100*idle)
				withinBound(t, "start with 100 sites", c.start, 3*time.Second)
				withinBound(t, "an edit of one of 100 sites", c.edit, 500*time.Millisecond)
				withinBound(t, "idle processor time with 100 sites, cores", idle, 0.05)
			}
		})
	}
	// Not the square: 4 times the sites, at most 4 times the time, and as much again for noise.
	if a, b := costs[100].cpu, costs[400].cpu; a > 0 && b > 8*a {
		t.Errorf("100 sites take %s of processor time to start, 400 take %s", a, b)
	}
}
