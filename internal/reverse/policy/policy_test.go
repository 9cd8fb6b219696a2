package policy

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:443":             "10.0.0.1:443",
		"[2001:db8::1]:443":        "[2001:db8::1]:443",
		"[::ffff:10.0.0.1]:443":    "10.0.0.1:443",
		"[0:0:0:0:0:ffff:a00:1]:1": "10.0.0.1:1",
		"API.Example.com:8443":     "api.example.com:8443",
		"api.example.com.:8443":    "api.example.com:8443",
		"_sip._tcp.example.com:1":  "_sip._tcp.example.com:1",
		"node-1:10250":             "node-1:10250",
		"0xg.example:1":            "0xg.example:1",
	} {
		if got, refusal := ParseTarget(in); refusal != nil || got.String() != want {
			t.Errorf("%s: %s, %v", in, got, refusal)
		}
	}
	for _, in := range []string{
		"", ":", ":80", "a", "a:", "a:0", "a:65536", "a:080", "a:+80", "a:-1", "a: 80", "a:8O", "[::1]", "[::1", "::1:80", "[10.0.0.1]:80", "[fe80::1%eth0]:80",
		"127.1:80", "0x7f.1:80", "0x7f000001:80", "2130706433:80", "0177.0.0.1:80", "127.0.0.1.:80", "1.2.3.4.5:80", "1.2.3:80", "a..b:80", "..:80", ".a:80", "-a:80", "a-:80", "a b:80", "a/b:80",
		"a@b:80", "ä:80", "a\x00:80", "a\n:80", "[[::1]]:80", "[::1]x:80", strings.Repeat("a", 64) + ":80", strings.Repeat("a.", 127) + "com:80",
	} {
		if got, refusal := ParseTarget(in); refusal == nil {
			t.Errorf("%q: accepted as %s", in, got)
		} else if refusal.Reason.Status() != 400 {
			t.Errorf("%q: %d", in, refusal.Reason.Status())
		}
	}
}

func TestForbidden(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1": "loopback", "127.255.0.1": "loopback", "::1": "loopback", "::ffff:127.0.0.1": "loopback", "::127.0.0.1": "loopback",
		"0.0.0.0": "unspecified", "0.1.2.3": "unspecified", "::": "unspecified",
		"169.254.1.1": "link-local", "fe80::1": "link-local", "febf::1": "link-local", "fe80::1%eth0": "bound to a link",
		"224.0.0.1": "multicast", "239.1.1.1": "multicast", "ff02::1": "multicast", "255.255.255.255": "reserved", "240.0.0.1": "reserved",
		"168.63.129.16": "metadata", "100.100.100.200": "metadata", "192.0.0.192": "metadata", "fd00:ec2::254": "metadata", "fd20:ce::254": "metadata",
		"64:ff9b::169.254.169.254": "link-local", "64:ff9b::7f00:1": "loopback", "64:ff9b:1::7f00:1": "loopback",
		"64:ff9b:1:a9fe:a9:fe00::": "link-local", "64:ff9b:1:a9:fe:a9fe::": "link-local", "64:ff9b:1:0:a9:fea9:fe00:0": "link-local",
		"2002:7f00:1::": "loopback", "2002:a9fe:a9fe::1": "link-local",
		"2001:0:7f00:1::": "loopback", "2001:0:102:304:0:0:80ff:fffe": "loopback", // Teredo: server, client (inverted)
		"2001:db8::5efe:169.254.169.254": "link-local", "2001:db8::200:5efe:127.0.0.1": "loopback", // ISATAP
		"::ffff:0:127.0.0.1": "loopback",
	} {
		got := Forbidden(netip.MustParseAddr(in))
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
	for _, in := range []string{
		"10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "1.1.1.1", "2001:db8::1", "fd00::1", "fc00:1::", "64:ff9b::10.0.0.1", "2002:a00:1::1", "::ffff:10.0.0.1", "2001:1::1",
	} {
		if got := Forbidden(netip.MustParseAddr(in)); got != "" {
			t.Errorf("%s: %s", in, got)
		}
	}
	if Forbidden(netip.Addr{}) == "" {
		t.Error("no address is an address")
	}
}

func TestCheck(t *testing.T) {
	p := Policy{Rules: []Rule{
		{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}, Ports: []Ports{{443, 443}, {10250, 10259}}},
		{Names: []string{"api.example.com", "*.svc.example.com"}, Ports: []Ports{{6443, 6443}}},
		{CIDRs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}, Ports: []Ports{{53, 53}}},
	}}
	for in, want := range map[string]string{
		"10.1.2.3:443": "", "10.1.2.3:10255": "", "[::ffff:10.1.2.3]:443": "", "[2001:db8::1]:443": "", "API.example.com:6443": "", "a.svc.example.com:6443": "", "a.b.svc.example.com:6443": "", "8.8.8.8:53": "",
		"10.1.2.3:444": "port 444", "11.0.0.1:443": "port 443 of 11.0.0.1", "svc.example.com:6443": "not allowed", "xsvc.example.com:6443": "not allowed", "api.example.com:443": "port 443 of api.example.com",
		"api.example.com.evil.com:6443": "not allowed", "127.0.0.1:53": "loopback", "169.254.169.254:53": "link-local", "[64:ff9b::a9fe:a9fe]:53": "link-local", "localhost:53": "loopback", "x.localhost:53": "loopback",
	} {
		target, refusal := ParseTarget(in)
		if refusal != nil {
			t.Fatal(refusal)
		}
		got := p.Check(target)
		if want == "" && got != nil || want != "" && (got == nil || !strings.Contains(got.Message, want) || got.Reason.Status() != 403) {
			t.Errorf("%s: %v, want %q", in, got, want)
		}
	}
	if (&Policy{}).Check(Target{Name: "a", Port: 1}) == nil {
		t.Error("an empty policy allows something")
	}
}

// asNumber is a name whose last part inet_aton reads as a number.
var asNumber = regexp.MustCompile(`(^|\.)([0-9]+|0x[0-9a-f]*)$`)

// FuzzTarget: what is accepted reads the same again, and what may be dialled is never on
// the list, however it is written.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{"10.0.0.1:443", "[::ffff:127.0.0.1]:80", "a.example.com:1", "127.1:80", "[64:ff9b::7f00:1]:1", "[fe80::1%eth0]:1"} {
		f.Add(s)
	}
	everything := Policy{Rules: []Rule{{CIDRs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}, Ports: []Ports{{1, 65535}}}}}
	f.Fuzz(func(t *testing.T, s string) {
		target, refusal := ParseTarget(s)
		if refusal != nil {
			return
		}
		again, refusal := ParseTarget(target.String())
		if refusal != nil || again != target {
			t.Errorf("%q: %v, %v", s, again, refusal)
		}
		if target.Addr.IsValid() == (target.Name != "") || target.Port == 0 {
			t.Errorf("%q: %+v", s, target)
		}
		if a := target.Addr; a.IsValid() && everything.Check(target) == nil {
			if a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Is4In6() || a.Zone() != "" {
				t.Errorf("%q may be dialled", s)
			}
		}
		// No resolver may take a name for an address.
		if asNumber.MatchString(target.Name) {
			t.Errorf("%q is a name that reads as a number", s)
		}
	})
}
