// Package preamble reads what a connection to the front begins with: a PROXY protocol
// header, then a TLS ClientHello or an HTTP CONNECT request.
//
// It is pure: bytes in, meaning out. Every parser takes all bytes that have arrived so
// far, however they were cut into packets, and says with ErrShort that more are needed;
// calling it again with more must give the same meaning in the end. What is not exactly
// as the protocol says is refused: a front that is lenient where its backend is strict,
// or the other way round, is how a connection gets where it should not.
package preamble

import (
	"errors"
	"fmt"
	"strings"
)

// MaxSize is the most that a ClientHello or a CONNECT request with all that surrounds it
// may take, in bytes. A hello with a hybrid key share (X25519MLKEM768) has about 1.7 KiB,
// one with ECH or a large session ticket a few more.
const MaxSize = 16 << 10

// ErrShort says that what has arrived is good so far, and that more is needed.
var ErrShort = errors.New("more bytes are needed")

// Reason says why a preamble is refused; it is fit for a metric's label.
type Reason string

// Why a preamble is refused.
const (
	Malformed    Reason = "malformed"      // not what the protocol says
	Oversized    Reason = "oversized"      // more than MaxSize, or a field of it too large
	Unknown      Reason = "unknown"        // neither TLS nor HTTP
	NoServerName Reason = "no-server-name" // a hello without one
	Method       Reason = "method"         // an HTTP request other than CONNECT
	NotAName     Reason = "not-a-name"     // a target that is an address or no DNS name
	Mismatch     Reason = "name-mismatch"  // names that should be one and are not
)

// Error is a refused preamble.
type Error struct {
	Reason Reason
	text   string
}

func (e *Error) Error() string { return e.text }

func refuse(reason Reason, format string, args ...any) error {
	return &Error{reason, fmt.Sprintf(format, args...)}
}

// Kind is what a connection speaks, told from its first byte.
type Kind int

// The kinds.
const (
	Neither Kind = iota
	TLS
	HTTP
)

// KindOf tells from the first byte what follows. A TLS record of type handshake begins
// with 22; an HTTP request with a method, which is in capital letters.
func KindOf(first byte) Kind {
	switch {
	case first == recordHandshake:
		return TLS
	case first >= 'A' && first <= 'Z':
		return HTTP
	}
	return Neither
}

// Name returns the normal form, in lower case, of a DNS name as hosts have (RFC 1123, and
// underscores): labels of letters, digits, hyphens, no dot at the end, 253 bytes at most,
// nothing that some resolver takes for an address ("127.1", "0x7f.1").
func Name(s string) (string, error) {
	if s == "" || len(s) > 253 {
		return "", refuse(NotAName, "a DNS name has 1 to 253 characters, this one has %d", len(s))
	}
	s = strings.ToLower(s)
	last := s
	for rest, more := s, true; more; {
		last, rest, more = strings.Cut(rest, ".")
		if !label(last) {
			return "", refuse(NotAName, "%q is no DNS name", clip(s))
		}
	}
	if number(last) {
		return "", refuse(NotAName, "%q is an address or looks like one: use a DNS name", clip(s))
	}
	return s, nil
}

func label(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// number reports whether a last label makes a name an address to some resolver.
func number(s string) bool {
	digits := strings.TrimPrefix(s, "0x")
	if digits != s {
		return strings.Trim(digits, "0123456789abcdef") == ""
	}
	return strings.Trim(s, "0123456789") == ""
}

// clip shortens what comes from outside for an error message.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
