package front

import (
	"fmt"
	"net/http"

	"github.com/culvert-vpn/culvert/internal/reverse/front/preamble"
)

// Reason says why a connection was not relayed, or why it ended; it is fit for a metric's
// label. Those of package preamble are Reasons too.
type Reason string

// Why a connection was not relayed.
const (
	UnknownName   Reason = "unknown-name"   // not in the table
	Port          Reason = "port"           // a CONNECT request for another port
	HeaderTimeout Reason = "header-timeout" // did not say in time where to
	Closed        Reason = "closed"         // by the client, before it said where to
	Displaced     Reason = "displaced"      // newer ones came while it did not say where to
	Limit         Reason = "limit"          // too many connections in total
	SourceLimit   Reason = "source-limit"   // too many from this source
	SourceRate    Reason = "source-rate"    // too many new ones from this source
	TenantLimit   Reason = "tenant-limit"   // too many of this tenant
	TenantRate    Reason = "tenant-rate"    // too many new ones of this tenant
	NoBackend     Reason = "no-backend"     // none could be connected to
)

// Why a connection that was relayed has ended.
const (
	Done             Reason = "done"              // both sides said their last
	Reset            Reason = "reset"             // one side broke off
	IdleTimeout      Reason = "idle-timeout"      // nothing moved
	HandshakeTimeout Reason = "handshake-timeout" // the client never answered the backend
	Stopped          Reason = "stopped"           // the front was
)

// Of the TLS alert protocol (RFC 8446 section 6, RFC 6066 section 3).
const (
	alertDecodeError      = 50
	alertInternalError    = 80
	alertUnrecognizedName = 112
)

// alert is the fatal TLS alert that tells a client the reason.
func (r Reason) alert() byte {
	switch r {
	case UnknownName, Reason(preamble.NoServerName), Reason(preamble.NotAName), Reason(preamble.Mismatch):
		return alertUnrecognizedName
	case Reason(preamble.Malformed), Reason(preamble.Oversized):
		return alertDecodeError
	}
	return alertInternalError
}

// status is the HTTP status that tells a client the reason.
func (r Reason) status() int {
	switch r {
	case UnknownName:
		return http.StatusNotFound
	case Port, Reason(preamble.NotAName):
		return http.StatusForbidden
	case Reason(preamble.Method):
		return http.StatusMethodNotAllowed
	case Reason(preamble.Oversized):
		return http.StatusRequestHeaderFieldsTooLarge
	case SourceLimit, SourceRate, TenantLimit, TenantRate:
		return http.StatusTooManyRequests
	case Limit:
		return http.StatusServiceUnavailable
	case NoBackend:
		return http.StatusBadGateway
	case HeaderTimeout:
		return http.StatusRequestTimeout
	}
	return http.StatusBadRequest
}

// tlsAlert is a record with a fatal alert.
func tlsAlert(description byte) []byte {
	return []byte{21, 3, 3, 0, 2, 2, description}
}

// httpRefusal is a response whose status line says why: many clients show nothing else.
func httpRefusal(r Reason, why string) []byte {
	status := r.status()
	extra := ""
	if status == http.StatusMethodNotAllowed {
		extra = "Allow: CONNECT\r\n"
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\n%sContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n",
		status, ascii(why), extra, len(why)+1, why)
}

// ascii replaces what has no place in a status line.
func ascii(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
