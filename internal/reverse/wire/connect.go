package wire

import (
	"bytes"
	"strings"
)

const (
	// MaxHead is the largest head of a request.
	MaxHead = 8 << 10
	// maxHeaders is the largest number of header fields.
	maxHeaders = 64
)

// HeadEnd returns how many bytes of b are the head of an HTTP request: up to and with the
// empty line. Zero: it is not complete yet.
func HeadEnd(b []byte) int {
	if i := bytes.Index(b, []byte("\r\n\r\n")); i >= 0 {
		return i + 4
	}
	return 0
}

// IsConnect reports whether a request that begins with b can be a CONNECT.
func IsConnect(b []byte) bool {
	const method = "CONNECT "
	return bytes.HasPrefix(b, []byte(method)) || len(b) < len(method) && strings.HasPrefix(method, string(b))
}

// ParseConnect reads the complete head of a CONNECT request (RFC 9112, section 3.2.3; RFC
// 9110, section 9.3.6) and returns its target as it stands there, "host:port". The Host
// field must be there at most once and is otherwise ignored: kube-apiserver always sends
// 127.0.0.1. A body is not allowed, nor is anything that parsers may read in two ways.
func ParseConnect(head []byte) (target string, refusal *Refusal) {
	text, ok := strings.CutSuffix(string(head), "\r\n\r\n")
	if !ok || len(head) > MaxHead {
		return "", Refuse(ReasonMalformed, "the request has no end: send CONNECT host:port HTTP/1.1 and an empty line")
	}
	lines := strings.Split(text, "\r\n")
	if len(lines) > maxHeaders+1 {
		return "", Refuse(ReasonTooLarge, "the request has %d header fields, allowed are %d", len(lines)-1, maxHeaders)
	}
	for _, l := range lines {
		if strings.ContainsAny(l, "\r\n\x00") {
			return "", Refuse(ReasonMalformed, "the request has a stray CR, LF or NUL")
		}
	}
	method, rest, _ := strings.Cut(lines[0], " ")
	target, version, _ := strings.Cut(rest, " ")
	switch {
	case version != "HTTP/1.1" && version != "HTTP/1.0":
		return "", Refuse(ReasonMalformed, "the request line is not METHOD TARGET HTTP/1.1")
	case method != "CONNECT":
		return "", Refuse(ReasonNotAllowed, "only CONNECT is served here")
	case target == "" || len(target) > MaxTarget:
		return "", Refuse(ReasonMalformed, "the target of CONNECT has %d bytes, allowed are 1 to %d", len(target), MaxTarget)
	}
	return target, checkFields(lines[1:])
}

func checkFields(lines []string) *Refusal {
	hosts := 0
	for _, l := range lines {
		name, value, ok := strings.Cut(l, ":")
		if !ok || !isToken(name) {
			return Refuse(ReasonMalformed, "a header field is not NAME: VALUE")
		}
		if strings.IndexFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) >= 0 {
			return Refuse(ReasonMalformed, "header field %s has a control character", name)
		}
		switch strings.ToLower(name) {
		case "host":
			if hosts++; hosts > 1 {
				return Refuse(ReasonMalformed, "there are two Host fields")
			}
		case "content-length":
			if strings.Trim(value, " \t") != "0" {
				return Refuse(ReasonMalformed, "CONNECT has no body: leave out Content-Length")
			}
		case "transfer-encoding":
			return Refuse(ReasonMalformed, "CONNECT has no body: leave out Transfer-Encoding")
		}
	}
	return nil
}

// isToken: RFC 9110, section 5.6.2.
func isToken(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return true
}
