package model

import (
	"net/netip"
	"strconv"
	"strings"
	"unicode"
)

// longest is the number of bytes of a value that a message repeats.
const longest = 80

// quote repeats a value in a message: in quotes, escaped, and not too much of it.
func quote(s string) string {
	if len(s) > longest {
		return strconv.Quote(strings.ToValidUTF8(s[:longest], "")) + "…"
	}
	return strconv.Quote(s)
}

// oneLine replaces what would break or hide a line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, s)
}

// isDNSLabel: RFC 1123, lower case, as Kubernetes has it.
func isDNSLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// isDNSName: labels joined by dots, lower case, at most 253 bytes.
func isDNSName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isDNSLabel(label) {
			return false
		}
	}
	return true
}

// isHostName is a DNS name in any case that no resolver takes for an address (a last label
// of digits, or of "0x" and hexadecimal digits).
func isHostName(s string) bool {
	s = strings.ToLower(s)
	if !isDNSName(s) {
		return false
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	if strings.Trim(last, "0123456789") == "" {
		return false
	}
	hex, ok := strings.CutPrefix(last, "0x")
	return !ok || strings.Trim(hex, "0123456789abcdef") != ""
}

// parseHost reads an IP address or DNS name; problem completes "field: ".
func parseHost(s string) (host, problem string) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" || a.Is4In6() {
			_, problem := parseAddr(s)
			return "", problem
		}
		if why := unusableHost(a); why != "" {
			return "", quote(s) + " " + why + ": write the address where the far side can be reached"
		}
		return a.String(), ""
	}
	if !isHostName(s) {
		return "", quote(s) + " is neither an IP address nor a DNS name: write one such as 192.0.2.1 or vpn.example.com"
	}
	return strings.ToLower(s), ""
}

// splitHostPort reads host:port with a host that parseHost knows, or, with anyHost, also
// the addresses that mean "any"; problem completes "field: ".
func splitHostPort(s string, anyHost bool) (e Endpoint, problem string) {
	const want = ": write host:port, such as vpn.example.com:51820, 192.0.2.1:51820 or [2001:db8::1]:51820"
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.HasSuffix(s, "]") {
		return Endpoint{}, quote(s) + " has no port" + want
	}
	host, port := s[:i], s[i+1:]
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] == '+' || port[0] == '0' {
		return Endpoint{}, quote(port) + " is not a port (1 to 65535)" + want
	}
	bare, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		bare, bracketed = strings.CutSuffix(bare, "]")
		if a, err := netip.ParseAddr(bare); !bracketed || err != nil || !a.Is6() {
			return Endpoint{}, quote(host) + " is not an IPv6 address in brackets" + want
		}
	} else if strings.ContainsAny(host, ":[]") {
		return Endpoint{}, quote(s) + " has colons in its host" + want
	}
	if a, err := netip.ParseAddr(bare); err == nil && anyHost && a.IsUnspecified() && a.Zone() == "" {
		return Endpoint{a.String(), uint16(n)}, ""
	}
	bare, problem = parseHost(bare)
	if problem != "" {
		return Endpoint{}, problem
	}
	return Endpoint{bare, uint16(n)}, ""
}
