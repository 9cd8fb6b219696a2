// Package demo is Culvert's main job, shown on one machine: a cluster's network, two
// sites and two devices in network namespaces, real tunnels between them, and a matrix
// of who reached whom.
//
// All traffic stays in the demo's own namespaces; nothing is left behind.
package demo

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab"
)

// DefaultName is the name of the demo that people run.
const DefaultName = "culvert-demo"

// Options say which demo, and what to do with it.
type Options struct {
	// Name starts the names of the demo's namespaces, and is that of its directory in /run
	// (keys, manifests, logs). Demos of different names do not see each other.
	Name string
	Out  io.Writer
	Keep bool // leave it up at the end
}

func dirOf(name string) string { return filepath.Join("/run", name) }

// programs are what the demo needs beside Culvert itself.
var programs = []string{"ip", "nft", "wg", "wireguard-go", "charon-systemd", "swanctl"}

// ErrUnexpected means that a path was not as expected.
var ErrUnexpected = errors.New("not every path is as expected")

// Run builds the demo, prints the matrix, and takes the demo down again unless keep.
func Run(ctx context.Context, opts Options) (err error) {
	if err := check(); err != nil {
		return err
	}
	if err := Down(opts.Name); err != nil {
		return fmt.Errorf("remove an earlier demo: %w", err)
	}
	d := &demo{name: opts.Name, dir: dirOf(opts.Name), out: opts.Out, started: time.Now()}
	defer func() {
		if !opts.Keep {
			d.stop()
			err = errors.Join(err, Down(opts.Name))
		}
	}()
	if err := d.up(ctx); err != nil {
		return err
	}
	good, all, err := d.matrix(ctx)
	if err != nil {
		return err
	}
	if opts.Keep {
		d.lookAround()
	}
	fmt.Fprintf(opts.Out, "demo: %d/%d paths as expected\n", good, all)
	if good != all {
		return ErrUnexpected
	}
	return nil
}

// Down removes a demo that was kept, or that was killed.
func Down(name string) error {
	errs := []error{lab.Remove(name), os.RemoveAll(dirOf(name))}
	for _, device := range []string{"phone", "laptop"} {
		// A wireguard-go that is killed leaves its socket.
		if err := os.Remove("/run/wireguard/" + link(name, device) + ".sock"); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func check() error {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes network namespaces: run it as root")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("the demo needs the program %s: 'make setup' installs it", p)
		}
	}
	return nil
}

type demo struct {
	name    string
	dir     string
	out     io.Writer
	started time.Time
	net     *network
	running []*program
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%5.1fs  %s\n", time.Since(d.started).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) add(p *program, err error) error {
	if p != nil {
		d.running = append(d.running, p)
	}
	return err
}

// link is the name of a device's WireGuard link. It is told apart from other demos':
// wireguard-go answers wg(8) at a path that only has the link's name.
func link(name, device string) string {
	h := fnv.New32a()
	_, _ = io.WriteString(h, name+device)
	return fmt.Sprintf("cvtd%08x", h.Sum32())
}

// stop ends the demo's programs.
func (d *demo) stop() {
	for _, p := range d.running {
		p.stop()
	}
}

// up starts everything and waits until the tunnels stand.
func (d *demo) up(ctx context.Context) error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	l, err := lab.New(d.name)
	if err != nil {
		return err
	}
	d.say("network: internet, a cluster (2 pods, 1 node), 2 sites, 2 devices, a NAT router")
	if d.net, err = build(l); err != nil {
		return err
	}
	n := d.net
	if err := d.answerers(); err != nil {
		return err
	}
	p, err := newParties()
	if err != nil {
		return err
	}
	d.say("gateway: culvert gateway")
	if err := d.add(startGateway(ctx, d.dir, n.gateway, p.Gateway.Private, p, "hosting")); err != nil {
		return err
	}
	d.say("site oslo: culvert gateway, over WireGuard")
	if err := d.add(startGateway(ctx, d.dir, n.oslo, p.Oslo.Private, p, "oslo")); err != nil {
		return err
	}
	d.say("site berlin: unmodified strongSwan behind NAT, over IKEv2")
	if err := d.add(startStrongSwan(ctx, d.dir, n.berlin, p.PSK)); err != nil {
		return err
	}
	d.say("devices phone and laptop: stock wireguard-go, configured by wg")
	const allowed = "10.244.0.0/16,10.96.0.0/16,172.20.0.0/24,10.20.0.0/24,10.99.0.0/24,fd00:10:244::/48,fd00:10:96::/112,fd00:99::/64"
	if err := d.add(startDevice(ctx, d.dir, n.phone, link(d.name, "phone"), p.Phone.Private, p.Gateway.Public, []string{phone + "/32", phoneV6 + "/128"}, allowed)); err != nil {
		return err
	}
	if err := d.add(startDevice(ctx, d.dir, n.laptop, link(d.name, "laptop"), p.Laptop.Private, p.Gateway.Public, []string{laptop + "/32", "fd00:99::3/128"}, allowed)); err != nil {
		return err
	}
	d.settle(ctx)
	return nil
}

// answerers start a server on every host that is a target.
func (d *demo) answerers() error {
	n := d.net
	for _, a := range []struct {
		host  *lab.Host
		addrs []string
	}{
		{n.web1, []string{web1, web1v6}}, {n.web2, []string{web2, web2v6}}, {n.node, []string{node}},
		{n.berlinPC, []string{berlinPC}}, {n.osloPC, []string{osloPC, osloPCv6}},
		// The devices' addresses come and go with their tunnels.
		{n.phone, []string{"0.0.0.0"}}, {n.laptop, []string{"0.0.0.0"}},
	} {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		if err := d.add(start(d.dir, a.host, nil, self, append([]string{"demo", "serve"}, a.addrs...)...)); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until every tunnel has carried a packet.
func (d *demo) settle(ctx context.Context) {
	n := d.net
	for _, h := range []*lab.Host{n.osloPC, n.phone, n.laptop, n.berlinPC} {
		first := probe{From: h, Network: "tcp", Address: netip.MustParseAddr(web1), Port: answerPort}
		err := waitFor(ctx, func() error {
			return h.Do(func() error { _, err := first.who(ctx); return err })
		})
		if err != nil {
			d.say("%s: NO TUNNEL: %v%s", h.Name, err, d.logs())
			continue
		}
		d.say("%s: tunnel is up", h.Name)
	}
}

// logs collects the last lines of all logs, since they are removed with the demo.
func (d *demo) logs() string {
	var b strings.Builder
	for _, p := range d.running {
		data, _ := os.ReadFile(p.log)
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&b, "\n== %s\n%s", p.log, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
	return b.String()
}

// matrix runs all probes and prints them.
func (d *demo) matrix(ctx context.Context) (good, all int, err error) {
	d.say("matrix")
	t := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\n\tFROM\tTO\tOVER\tRESULT\tSEEN AS\tROUND TRIP\tGBIT/S")
	probes := d.net.probes()
	outcomes := runAll(ctx, probes)
	for i, p := range probes {
		o := outcomes[i]
		mark := "ok"
		if p.asExpected(o) {
			good++
		} else {
			mark = "WRONG"
		}
		all++
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", mark, p.FromName, p.To, o.row(p))
	}
	if err := t.Flush(); err != nil {
		return 0, 0, err
	}
	_, err = fmt.Fprintln(d.out)
	return good, all, err
}

// runAll runs the probes: those that measure one after the other, and those that must
// time out together.
func runAll(ctx context.Context, probes []probe) []outcome {
	out := make([]outcome, len(probes))
	var blocked sync.WaitGroup
	for i, p := range probes {
		if p.Seen.IsValid() {
			out[i] = p.run(ctx)
			continue
		}
		blocked.Go(func() { out[i] = p.run(ctx) })
	}
	blocked.Wait()
	return out
}

// row is the part of a matrix row that tells what was found.
func (o outcome) row(p probe) string {
	if !o.Reached {
		result := "blocked"
		if p.Seen.IsValid() {
			result = "NOT REACHED: " + o.Why
		}
		return fmt.Sprintf("%s\t%s\t-\t-\t-", p.Network, result)
	}
	gbits := "-"
	if p.Network == "tcp" {
		gbits = fmt.Sprintf("%.2f", o.Gbits)
	}
	return fmt.Sprintf("%s\treached\t%s\t%.2f ms\t%s", p.Network, o.Seen, float64(o.Latency.Microseconds())/1000, gbits)
}

func (d *demo) lookAround() {
	fmt.Fprintf(d.out, `The demo stays up. Look around:
  ip netns list | grep %[1]s
  bin/culvert status --state %[2]s/hosting/state
  bin/culvert plan gateway -f %[2]s/hosting/manifests --state %[2]s/hosting/state --diff
  ip netns exec %[1]s-phone ping -c3 %[3]s
  ip netns exec %[1]s-gateway nft list table inet culvert
  edit a file in %[2]s/hosting/manifests: the gateway follows
Remove it with: make demo-down
`, d.name, d.dir, web1)
}
