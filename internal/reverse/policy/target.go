// Package policy decides what may be dialled through the reversed tunnel. Both ends run
// it: the hub over what a client asks for, the spoke over that again, and over every
// address that it is about to dial.
//
// Targets are read strictly: what two parsers could read in two ways ("127.1", "0x7f.1",
// zones) is refused. Some addresses are refused whatever the rules say, also when they
// are wrapped into IPv6. The package resolves nothing and dials nothing.
package policy

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Target is what a client asks for: an address or a name, and a port. Make it with
// ParseTarget.
type Target struct {
	Addr netip.Addr // invalid: Name is set
	Name string     // DNS name in lower case, without a dot at its end
	Port uint16     // never zero
}

// String is "host:port".
func (t Target) String() string {
	if t.Addr.IsValid() {
		return netip.AddrPortFrom(t.Addr, t.Port).String()
	}
	return t.Name + ":" + strconv.Itoa(int(t.Port))
}

// ParseTarget reads "host:port", as CONNECT has it: an IPv4 address, an IPv6 address in
// brackets, or a DNS name. An IPv4 address that is written as IPv6 is the IPv4 address.
func ParseTarget(s string) (Target, *wire.Refusal) {
	if len(s) > wire.MaxTarget {
		return Target{}, malformed("the target has %d bytes, allowed are %d", len(s), wire.MaxTarget)
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, "]") {
		return Target{}, malformed("target %q has no port: ask for host:port", s)
	}
	host, port := s[:i], s[i+1:]
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] < '1' || port[0] > '9' {
		return Target{}, malformed("%q is not a port (1 to 65535)", port)
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, closed := strings.CutSuffix(inner, "]")
		a, err := netip.ParseAddr(inner)
		if !closed || err != nil || !a.Is6() || a.Zone() != "" {
			return Target{}, malformed("%q is not an IPv6 address in brackets, without a zone", host)
		}
		return Target{Addr: a.Unmap(), Port: uint16(n)}, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if !a.Is4() {
			return Target{}, malformed("IPv6 address %q needs brackets", host)
		}
		return Target{Addr: a, Port: uint16(n)}, nil
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if !isName(name) {
		return Target{}, malformed("%q is neither an address nor a DNS name", host)
	}
	return Target{Name: name, Port: uint16(n)}, nil
}

func malformed(format string, args ...any) *wire.Refusal {
	return wire.Refuse(wire.ReasonMalformed, format, args...)
}

// isName: a DNS name in lower case that no resolver takes for an address. Underscores are
// allowed, as SRV-like names of services have them.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	var last string
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return false
		}
		last = label
	}
	// inet_aton reads a last part of digits, or of 0x and hexadecimal digits, as a number.
	if strings.Trim(last, "0123456789") == "" {
		return false
	}
	hex, ok := strings.CutPrefix(last, "0x")
	return !ok || strings.Trim(hex, "0123456789abcdef") != ""
}

func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}
