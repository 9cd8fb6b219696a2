package netlab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	culvert "github.com/culvert-vpn/culvert/internal/gateway"
)

// A device that is removed, suspended or expired is silent within 5 s, in both
// directions, and is let in again when that is undone (FAULTS 11).
func TestDevicesAreLockedOut(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	names := []string{"removed", "suspended", "expired", "other"}
	devices := map[string]*device{}
	addrs := map[string]string{}
	for i, name := range names {
		devices[name], _ = n.dialIn(g, name, 2+i)
		addrs[name] = fmt.Sprintf("addresses: [10.99.0.%d, \"fd00:99::%x\"]", 2+i, 2+i)
	}
	up, down := map[string]*probe{}, map[string]*probe{}
	for i, name := range names {
		reaches(t, devices[name].Host, "udp", at(web1, port), "web-1", 8*time.Second)
		up[name] = watch(t, devices[name].Host, at(web1, port), 10*time.Millisecond)
		down[name] = watch(t, n.web2, at(fmt.Sprintf("10.99.0.%d", 2+i), port), 10*time.Millisecond)
	}
	yaml := func(name string, extra ...string) {
		g.write("device-"+name+".yaml", deviceYAML(name, devices[name].key(), append(extra, addrs[name])...))
	}
	expiry := time.Now().Add(2 * time.Second).Truncate(time.Second)
	event := map[string]time.Time{}
	g.remove("device-removed.yaml")
	event["removed"] = time.Now()
	yaml("suspended", "suspend: true")
	event["suspended"] = time.Now()
	yaml("expired", "expirationTime: "+expiry.UTC().Format(time.RFC3339))
	event["expired"] = expiry
	time.Sleep(time.Until(expiry.Add(5500 * time.Millisecond)))
	for _, name := range names[:3] {
		for _, p := range []*probe{up[name], down[name]} {
			after := p.lastAnswer().Sub(event[name])
			t.Logf("%s: %s: last answer %d ms after", name, p.what, after.Milliseconds())
			if after > 5*time.Second || after < -time.Second {
				t.Errorf("%s: %s: last answer %s after, want silence within 5 s", name, p.what, after)
			}
			p.stop()
		}
	}
	g.await("the status says why", 5*time.Second, func(r *culvert.Report) error {
		for name, want := range map[string]string{"suspended": "suspend", "expired": "expirationTime"} {
			if p := peer(r, "default/"+name); p == nil || p.Connected || !strings.Contains(p.Message, want) {
				return fmt.Errorf("%s: %+v", name, p)
			}
		}
		if p := peer(r, "default/removed"); p != nil {
			return fmt.Errorf("removed: %+v", p)
		}
		return nil
	})
	for _, name := range names[:3] {
		yaml(name)
	}
	for _, name := range names[:3] {
		// The stock device tries a handshake every 5 s while it has something to say.
		took := reaches(t, devices[name].Host, "udp", at(web1, port), "web-1", 12*time.Second)
		t.Logf("%s: let in again after %d ms", name, took.Milliseconds())
	}
	up["other"].unharmed()
	down["other"].unharmed()
}

// A thousand devices without addresses appear at once: everyone gets one address of each
// family, nobody the same; a restart changes none; what does not fit is named, and
// nothing else breaks (FAULTS 14).
func TestThousandDevices(t *testing.T) {
	n := newNetwork(t)
	g := newGateway(t, n.gateway)
	g.write("gateway.yaml", gatewayYAML())
	g.run()
	phone, _ := n.dialIn(g, "phone", 200)
	reaches(t, phone.Host, "udp", at(web1, port), "web-1 10.99.0.200", 8*time.Second)
	p := watch(t, phone.Host, at(web1, port), 10*time.Millisecond)
	many := func(prefix string, count int) string {
		var b strings.Builder
		for i := range count {
			b.WriteString(deviceYAML(fmt.Sprintf("%s-%d", prefix, i), newKey(t).PublicKey().String()))
		}
		return b.String()
	}
	const count = 1000
	g.write("many.yaml", many("many", count))
	var given map[string]string
	took := g.await("1,000 devices are configured", 10*time.Second, func(r *culvert.Report) (err error) {
		if given, err = devicesOf(r); err != nil || len(given) != count+1 || len(r.Problems)+len(r.Errors) > 0 {
			return fmt.Errorf("%d devices, %d problems, errors %v, %w", len(given), len(r.Problems), r.Errors, err)
		}
		for _, d := range r.Devices {
			if len(d.Addresses) != 2 || d.Reason == "NotConfigured" || d.Reason == "Waiting" {
				return fmt.Errorf("%+v", d)
			}
		}
		return nil
	})
	t.Logf("1,000 devices configured after %d ms", took.Milliseconds())
	p.unharmed()

	// 4,093 addresses are for devices: 1,001 are taken, so 10 of these go away empty.
	g.write("more.yaml", many("more", 3102))
	took = g.await("the surplus is named", 20*time.Second, func(r *culvert.Report) error {
		now, err := devicesOf(r)
		if err != nil {
			return err
		}
		for name, a := range given {
			if now[name] != a {
				return fmt.Errorf("%s had %s and has %s", name, a, now[name])
			}
		}
		named := 0
		for _, x := range r.Problems {
			if strings.HasPrefix(x.Object, "Device default/more-") && x.Reason == "NoAddress" && strings.Contains(x.Message, "deviceCIDRs") {
				named++
			}
		}
		if named != 10 || len(r.Problems) != 10 {
			return fmt.Errorf("%d devices named, %d problems, want 10", named, len(r.Problems))
		}
		return nil
	})
	t.Logf("the surplus is named after %d ms", took.Milliseconds())
	reaches(t, phone.Host, "udp", at(web1, port), "web-1 10.99.0.200", 2*time.Second)
	g.remove("more.yaml")
	g.await("they are gone", 10*time.Second, func(r *culvert.Report) error {
		if len(r.Devices) != count+1 {
			return fmt.Errorf("%d devices", len(r.Devices))
		}
		return nil
	})
	g.kill()
	g.start()
	g.await("the same addresses after a restart", 10*time.Second, func(r *culvert.Report) error {
		now, err := devicesOf(r)
		if err != nil {
			return err
		}
		for name, a := range given {
			if now[name] != a {
				return fmt.Errorf("%s had %s and has %s", name, a, now[name])
			}
		}
		return nil
	})
}

// devicesOf lists the addresses by device, and fails on one that is given twice.
func devicesOf(r *culvert.Report) (map[string]string, error) {
	owner, out := map[netip.Prefix]string{}, map[string]string{}
	for _, d := range r.Devices {
		out[d.Name] = fmt.Sprint(d.Addresses)
		for _, a := range d.Addresses {
			if other, ok := owner[a]; ok {
				return nil, fmt.Errorf("%s and %s both have %s", other, d.Name, a)
			}
			owner[a] = d.Name
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no devices")
	}
	return out, nil
}
