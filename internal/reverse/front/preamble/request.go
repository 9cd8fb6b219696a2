package preamble

import (
	"bytes"
	"net/netip"
	"strconv"
	"strings"
)

// maxHeaders bounds the header fields of a request.
const maxHeaders = 64

// Request is an HTTP CONNECT request.
type Request struct {
	Name string // of the target, in lower case
	Port uint16 // of the target
}

// ParseRequest reads the CONNECT request (RFC 9112, RFC 9110 section 9.3.6) that b begins
// with, and returns also how many bytes it takes: what follows is for the target. Errors
// are ErrShort and *Error.
//
// The target must be a DNS name and a port. A Host field must name the same; HTTP/1.1
// demands one.
func ParseRequest(b []byte) (Request, int, error) {
	if err := method(b); err != nil {
		return Request{}, 0, err
	}
	end := bytes.Index(b, []byte("\r\n\r\n"))
	// A line that ends otherwise would end the head for one reader and not for another.
	head := b
	if end >= 0 {
		head = b[:end+2]
	}
	if err := lineEnds(head); err != nil {
		return Request{}, 0, err
	}
	switch {
	case end < 0 && len(b) >= MaxSize, end > MaxSize:
		return Request{}, 0, refuse(Oversized, "the request's head has more than %d bytes", MaxSize)
	case end < 0:
		return Request{}, 0, ErrShort
	}
	first, fields, _ := strings.Cut(string(head), "\r\n")
	r, minor, err := requestLine(first)
	if err != nil {
		return Request{}, 0, err
	}
	if err := r.fields(fields, minor); err != nil {
		return Request{}, 0, err
	}
	return r, end + 4, nil
}

// method refuses other methods as soon as they can be told.
func method(b []byte) error {
	const want = "CONNECT "
	n := min(len(b), len(want))
	if string(b[:n]) == want[:n] {
		return nil
	}
	token, _, _ := bytes.Cut(b[:min(len(b), 32)], []byte(" "))
	for _, c := range token {
		if c < 'A' || c > 'Z' {
			return refuse(Malformed, "malformed HTTP request")
		}
	}
	return refuse(Method, "method %s is not served here: use CONNECT", token)
}

// lineEnds refuses CR and LF that do not come as a pair, and NUL. A CR at the end may be
// followed by its LF yet.
func lineEnds(head []byte) error {
	for i, c := range head {
		bad := c == 0 ||
			c == '\n' && (i == 0 || head[i-1] != '\r') ||
			c == '\r' && i+1 < len(head) && head[i+1] != '\n'
		if bad {
			return refuse(Malformed, "malformed HTTP request: lines must end with CR LF")
		}
	}
	return nil
}

func requestLine(line string) (r Request, minor byte, err error) {
	parts := strings.Split(line, " ")
	if len(parts) != 3 || len(parts[2]) != len("HTTP/1.1") || parts[2][:7] != "HTTP/1." || parts[2][7] != '0' && parts[2][7] != '1' {
		return Request{}, 0, refuse(Malformed, "malformed HTTP request line: want CONNECT name:port HTTP/1.1")
	}
	name, port, err := authority(parts[1])
	if err != nil {
		return Request{}, 0, err
	}
	if port == 0 {
		return Request{}, 0, refuse(Malformed, "the target %q has no port: want name:port", clip(parts[1]))
	}
	return Request{name, port}, parts[2][7], nil
}

// authority splits name:port; without a port that is 0.
func authority(s string) (name string, port uint16, err error) {
	host, digits, found := strings.Cut(s, ":")
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil || strings.HasPrefix(host, "[") {
		return "", 0, refuse(NotAName, "%q is an address: targets are known by name", clip(s))
	}
	if name, err = Name(host); err != nil {
		return "", 0, err
	}
	if !found {
		return name, 0, nil
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != digits {
		return "", 0, refuse(Malformed, "%q is no port: want 1 to 65535", clip(digits))
	}
	return name, uint16(n), nil
}

// fields checks the header fields against the target.
func (r Request) fields(text string, minor byte) error {
	lines := strings.Split(strings.TrimSuffix(text, "\r\n"), "\r\n")
	if text == "" {
		lines = nil
	}
	if len(lines) > maxHeaders {
		return refuse(Oversized, "the request has more than %d header fields", maxHeaders)
	}
	hosts, lengths := 0, 0
	for _, line := range lines {
		name, value, found := strings.Cut(line, ":")
		if !found || !token(name) || !fieldValue(value) {
			return refuse(Malformed, "malformed HTTP header field %q", clip(line))
		}
		value = strings.Trim(value, " \t")
		switch strings.ToLower(name) {
		case "host":
			if hosts++; hosts > 1 {
				return refuse(Malformed, "the request has more than one Host field")
			}
			if err := r.host(value); err != nil {
				return err
			}
		case "content-length":
			if lengths++; lengths > 1 || value != "0" {
				return refuse(Malformed, "a CONNECT request has no content, and so no Content-Length but 0")
			}
		case "transfer-encoding":
			return refuse(Malformed, "a CONNECT request has no content, and so no Transfer-Encoding")
		}
	}
	if hosts == 0 && minor == '1' {
		return refuse(Malformed, "the request has no Host field, which HTTP/1.1 demands")
	}
	return nil
}

// host checks the Host field: the target's name, with its port or without one.
func (r Request) host(value string) error {
	name, port, err := authority(value)
	if err != nil || name != r.Name || port != 0 && port != r.Port {
		return refuse(Mismatch, "Host is %q, but the target is %s:%d", clip(value), r.Name, r.Port)
	}
	return nil
}

// token reports whether s is a token (RFC 9110 section 5.6.2).
func token(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

// fieldValue reports whether s has no control characters but tabs.
func fieldValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
