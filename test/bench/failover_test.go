package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// victim is something that is killed and comes back, as under a supervisor.
type victim struct {
	name string
	// strike kills it, without a word, and sees to it that it comes back.
	strike func()
	// works tries once whether the way carries.
	works func() error
}

// kills is how often each victim is killed in all rounds together.
const kills = 20

func failover(brief bool) *suite {
	times := max(1, (kills+rounds()-1)/rounds())
	if brief {
		times = 1
	}
	start := func(name string, needs func() string, up func(*testing.T, *labtest.Lab, *victim)) contender {
		return contender{name: name, ours: true, absent: needs, start: func(t *testing.T, l *labtest.Lab) candidate {
			v := &victim{name: name}
			up(t, l, v)
			labtest.Eventually(t, 30*time.Second, name+": a way that works", v.works)
			return v
		}}
	}
	return &suite{
		name: "failover", title: "Failover: from kill -9 to the first packet or connection that arrives", against: "gateway, WireGuard",
		metrics: []metric{
			{name: "median", of: "back", unit: "ms", less: true},
			{name: "worst", of: "back", unit: "ms", less: true, show: slices.Max[[]float64]},
			{name: "kills", of: "back", show: func(v []float64) float64 { return float64(len(v)) }},
		},
		turns: max(1, times),
		contenders: []contender{
			start("gateway, WireGuard", nil, killGateway),
			start("strongSwan under a gateway", needs("charon-systemd"), killDaemon),
			start("the only hub", nil, killHub),
			start("the only spoke", nil, killSpoke),
		},
	}
}

func (v *victim) measure(t *testing.T) figures {
	t.Helper()
	begin := time.Now()
	v.strike()
	for {
		err := v.works()
		if err == nil {
			break
		}
		if time.Since(begin) > 60*time.Second {
			t.Fatalf("%s: not back within a minute: %v", v.name, err)
		}
	}
	took := time.Since(begin)
	time.Sleep(300 * time.Millisecond)
	return figures{"back": took.Seconds() * 1e3}
}

// echoes answers UDP on b; the returned function asks from a, and waits for 10 ms.
func (p *pair) echoes() func() error {
	p.t.Helper()
	var server net.PacketConn
	p.b.Do(func() (err error) {
		server, err = net.ListenPacket("udp", innerB+":7000")
		return err
	})
	p.t.Cleanup(func() { _ = server.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := server.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = server.WriteTo(b[:n], from)
			}
		}
	}()
	var c net.Conn
	p.a.Do(func() (err error) {
		c, err = net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(innerA)}, &net.UDPAddr{IP: net.ParseIP(innerB), Port: 7000})
		return err
	})
	p.t.Cleanup(func() { _ = c.Close() })
	number := byte(0)
	return func() error {
		number++
		if _, err := c.Write([]byte{number}); err != nil {
			time.Sleep(time.Millisecond)
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		var b [64]byte
		for { // answers to earlier questions do not count
			n, err := c.Read(b[:])
			if err != nil {
				return err
			}
			if n == 1 && b[0] == number {
				return nil
			}
		}
	}
}

func killGateway(t *testing.T, l *labtest.Lab, v *victim) {
	p := newPair(t, l, 0, culvertPair("wireguard"))
	pid := p.pids[1]
	v.works = p.echoes()
	v.strike = func() {
		slay(pid)
		pid = p.again("b").Process.Pid
		p.b.IP("route", "replace", innerB+"/32", "dev", "lo") // so that the host stays what it was
	}
}

// again starts the gateway of an end anew.
func (p *pair) again(name string) *exec.Cmd {
	cmd, _ := p.b.Background(culvert, "gateway", "--manifests", p.path(name+"/manifests"), "--state", p.path(name+"/state"), "--http", "127.0.0.1:9586", "--log-level", "warn")
	return cmd
}

func killDaemon(t *testing.T, l *labtest.Lab, v *victim) {
	p := newPair(t, l, 0, culvertPair("ipsec"))
	v.works = p.echoes()
	v.strike = func() { // the gateway starts another one
		pid := charonIn(p.b)
		if pid == 0 {
			t.Fatal("no charon to kill")
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// killed is a reversed tunnel of which one process is killed and started again.
func killed(t *testing.T, l *labtest.Lab, v *victim, what int) {
	r := newReversal(t, l, v.name, true, culvertReversal)
	v.works = func() error {
		c, err := r.open()
		if err == nil {
			err = c.Close()
		}
		return err
	}
	pid := r.pids[what]
	args, host := r.started[what], r.a
	if what == 2 {
		host = r.b
	}
	v.strike = func() {
		slay(pid)
		cmd, _ := host.Background(args[0], args[1:]...)
		pid = cmd.Process.Pid
	}
}

// The order in which culvertReversal starts its processes: front, hub, spoke, egress.
func killHub(t *testing.T, l *labtest.Lab, v *victim)   { killed(t, l, v, 1) }
func killSpoke(t *testing.T, l *labtest.Lab, v *victim) { killed(t, l, v, 2) }

// slay kills a process and waits until it is gone, as its supervisor does.
func slay(pid int) {
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for range 1000 {
		if err := syscall.Kill(pid, 0); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// stopProcess ends a program as a service manager does, and waits for it.
func stopProcess(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	for range 500 {
		if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	_ = cmd.Process.Kill()
}

// shortDir is a directory for Unix sockets, too.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cvb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// replace puts a file in place, completely or not at all.
func (p *pair) replace(name, text string) {
	p.t.Helper()
	p.write(name+".new", text)
	if err := os.Rename(p.path(name+".new"), p.path(name)); err != nil {
		p.t.Fatal(fmt.Errorf("replace %s: %w", name, err))
	}
}

// quantile is the value that so many are not above.
func quantile(v []float64, q float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[min(int(float64(len(v))*q), len(v)-1)]
}
