package netlab

import (
	"fmt"
	"testing"
	"time"
)

// bounds is what so many devices may cost.
type bounds struct {
	devices int
	start   time.Duration
	rss     int64
	idle    float64 // of a core
}

var deviceBounds = []bounds{
	{1000, 300 * time.Millisecond, 80 << 20, 0.02},
	{10000, 3 * time.Second, 350 << 20, 0.10},
}

// TestScaleStart: from the start of the process until all devices are peers, with all in
// one manifest and with a manifest each; then the memory of the idle process.
func TestScaleStart(t *testing.T) {
	for _, b := range deviceBounds {
		for _, each := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d devices, %s", b.devices, map[bool]string{false: "one file", true: "a file each"}[each]), func(t *testing.T) {
				n := newScaleNet(t)
				g := newGateway(t, n.gateway)
				g.write("gateway.yaml", scaleGateway())
				someDevices(g, b.devices, each)
				best, leastCPU := time.Hour, time.Hour
				for try := 0; try < 3 || best > b.start && try < 6; try++ {
					wall, cpu := startScaled(t, g)
					t.Logf("start %d: ready after %s, %s of processor time (load %s)", try+1, ms(wall), ms(cpu), load())
					best, leastCPU = min(best, wall), min(leastCPU, cpu)
					g.configured(b.devices)
					g.kill()
				}
				withinTime(t, "start", best, leastCPU, b.start)
			})
		}
	}
}

// TestScaleIdle: what a gateway costs whose devices are silent: memory, processor time,
// files and goroutines, which all stay as they are.
func TestScaleIdle(t *testing.T) {
	for _, b := range deviceBounds {
		t.Run(fmt.Sprintf("%d devices", b.devices), func(t *testing.T) {
			t.Parallel() // both are silent
			n := newScaleNet(t)
			g := newGateway(t, n.gateway)
			g.write("gateway.yaml", scaleGateway())
			someDevices(g, b.devices, false)
			startScaled(t, g)
			g.configured(b.devices)
			time.Sleep(3 * time.Second)
			const window = 10 * time.Second
			fds, goroutines := g.fds(), g.goroutines()
			used := g.cpu()
			g.profileLater(fmt.Sprintf("idle-%d.prof", b.devices), "profile?seconds=9")
			time.Sleep(window)
			idle := float64(g.cpu()-used) / float64(window)
			t.Logf("idle: %.1f %% of a core, RSS %d MiB, %d files, %d goroutines (load %s)", 100*idle, g.rss()>>20, fds, goroutines, load())
			g.profile(fmt.Sprintf("heap-%d.prof", b.devices), "heap")
			withinBound(t, "idle processor time, cores", idle, b.idle)
			withinBound(t, "RSS", g.rss(), b.rss)
			if f, r := g.fds(), g.goroutines(); f > fds || r > goroutines+2 {
				t.Errorf("after %s idle: %d files (were %d), %d goroutines (were %d)", window, f, fds, r, goroutines)
			}
		})
	}
}

// TestScaleAdd: one device more, among many, in one manifest of its own: how long until
// its handshake is answered, while another device's packets, one every 10 ms, lose none.
func TestScaleAdd(t *testing.T) {
	for _, b := range deviceBounds {
		t.Run(fmt.Sprintf("to %d devices", b.devices), func(t *testing.T) {
			n := newScaleNet(t)
			g := newGateway(t, n.gateway)
			g.write("gateway.yaml", scaleGateway())
			someDevices(g, b.devices, false)
			bystander := newDevice(t, n.far)
			next := b.devices
			g.write("bystander.yaml", scaleDevice(next, bystander.private.PublicKey()))
			startScaled(t, g)
			bystander.up(g.public, public+":51820", []string{scaleAddress(next).String()})
			reaches(t, bystander.Host, "udp", at(scalePod, port), "pod "+scaleAddress(next).String(), 5*time.Second)

			probe := watch(t, bystander.Host, at(scalePod, port), 10*time.Millisecond)
			time.Sleep(200 * time.Millisecond)
			g.profileLater(fmt.Sprintf("add-%d.prof", b.devices), "profile?seconds=2")
			bestRound(t, g, "one device added, until its handshake is answered", 100*time.Millisecond, func() (took []time.Duration) {
				for range 7 {
					next++
					c := newHerdClient(t, n.far, g.public, scaleAddress(next))
					time.Sleep(200 * time.Millisecond)
					began := time.Now()
					g.write(fmt.Sprintf("new-%d.yaml", next), scaleDevice(next, c.Private.PublicKey()))
					took = append(took, c.Knock(t, 10*time.Second).Sub(began))
				}
				return took
			})
			probe.unharmed()
		})
	}
}

// TestScaleComeAndGo: after 200 devices came, called and went, nothing of them is left in
// the process.
func TestScaleComeAndGo(t *testing.T) {
	const cycles = 200
	n := newScaleNet(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", scaleGateway())
	someDevices(g, 1000, false)
	startScaled(t, g)
	g.configured(1000)
	cycle := func() {
		c := newHerdClient(t, n.far, g.public, scaleAddress(2000))
		defer c.Close()
		g.write("guest.yaml", scaleDevice(2000, c.Private.PublicKey()))
		c.Knock(t, 10*time.Second)
		g.remove("guest.yaml")
	}
	cycle()
	g.configured(1000)
	fds, goroutines, used, began := g.fds(), g.goroutines(), g.cpu(), time.Now()
	for range cycles {
		cycle()
	}
	t.Logf("%d devices came and went in %s, %s of processor time each (load %s)", cycles, ms(time.Since(began)), ms((g.cpu()-used)/cycles), load())
	g.configured(1000)
	eventually(t, 5*time.Second, "files and goroutines are back", func() error {
		if f, r := g.fds(), g.goroutines(); f > fds || r > goroutines {
			return fmt.Errorf("%d files (were %d), %d goroutines (were %d)", f, fds, r, goroutines)
		}
		return nil
	})
	before := g.rss()
	g.fetch("/debug/pprof/heap?gc=1") // what is garbage by now is nothing of theirs
	eventually(t, 10*time.Second, "the memory is back", func() error {
		if rss := g.rss(); rss > deviceBounds[0].rss {
			return fmt.Errorf("RSS %d MiB", rss>>20)
		}
		return nil
	})
	t.Logf("%d files, %d goroutines, RSS %d MiB, with its garbage %d", g.fds(), g.goroutines(), g.rss()>>20, before>>20)
}
