package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// What TLS connections are for, as application protocols (RFC 7301). A client that offers
// none speaks HTTP CONNECT.
const (
	ALPNSpoke  = "culvert-spoke/1"  // a spoke's session at a hub
	ALPNClient = "culvert-client/1" // an egress's session at a hub
	ALPNJoin   = "culvert-join/1"   // one request for a certificate
	ALPNHTTP   = "http/1.1"
)

// StreamKind says what a stream is opened for.
type StreamKind byte

// The kinds.
const (
	StreamTarget StreamKind = 'T' // a TCP connection to Open.Target
	StreamExport StreamKind = 'E' // a TCP connection to the export named Open.Target
	StreamHello  StreamKind = 'H' // the session's own: Hello messages follow
)

// Open is the header of a stream.
type Open struct {
	Kind StreamKind
	// Timeout is how long the dial may take, to the millisecond; zero for StreamHello.
	Timeout time.Duration
	// Target is "host:port" (StreamTarget), a name (StreamExport) or empty. It is not
	// checked here.
	Target string
}

// MaxTarget is the longest Target: a DNS name, a port, and something to spare.
const MaxTarget = 300

// ErrMessage is a message that breaks the protocol.
var ErrMessage = errors.New("broken message")

// Append adds the encoded header to b.
func (o Open) Append(b []byte) []byte {
	b = append(b, byte(o.Kind))
	b = binary.BigEndian.AppendUint32(b, uint32(o.Timeout.Milliseconds()))
	return append(b, o.Target...)
}

// ParseOpen reads a header.
func ParseOpen(b []byte) (Open, error) {
	const fixed = 5
	if len(b) < fixed || len(b) > fixed+MaxTarget {
		return Open{}, fmt.Errorf("%w: a stream's header of %d bytes", ErrMessage, len(b))
	}
	o := Open{Kind: StreamKind(b[0]), Timeout: time.Duration(binary.BigEndian.Uint32(b[1:fixed])) * time.Millisecond, Target: string(b[fixed:])}
	switch o.Kind {
	case StreamTarget, StreamExport:
		if o.Target == "" {
			return Open{}, fmt.Errorf("%w: a stream without a target", ErrMessage)
		}
	case StreamHello:
		if o.Target != "" {
			return Open{}, fmt.Errorf("%w: a hello with a target", ErrMessage)
		}
	default:
		return Open{}, fmt.Errorf("%w: a stream of kind %d", ErrMessage, b[0])
	}
	return o, nil
}

// Opened is the answer to StreamTarget and StreamExport.
type Opened struct {
	// Dial is how long the last dial took, to the microsecond.
	Dial time.Duration
}

// Append adds the encoded answer to b.
func (o Opened) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(o.Dial.Microseconds()))
}

// ParseOpened reads an answer. Bytes that a later version adds are passed over.
func ParseOpened(b []byte) (Opened, error) {
	if len(b) < 4 {
		return Opened{}, fmt.Errorf("%w: an answer of %d bytes", ErrMessage, len(b))
	}
	return Opened{Dial: time.Duration(binary.BigEndian.Uint32(b)) * time.Microsecond}, nil
}

// Reason classes refusals, for metrics and for retrying; it is a word that never changes.
type Reason string

// The reasons.
const (
	ReasonMalformed   Reason = "malformed"    // the request cannot be read
	ReasonDenied      Reason = "denied"       // policy
	ReasonNoSpoke     Reason = "no-spoke"     // none is connected
	ReasonNoHub       Reason = "no-hub"       // none is reachable
	ReasonLost        Reason = "lost"         // a connection between hub, spoke and egress was lost
	ReasonUnresolved  Reason = "unresolved"   // the name has no address
	ReasonRefused     Reason = "refused"      // the target refused
	ReasonUnreachable Reason = "unreachable"  // no route to the target
	ReasonTimeout     Reason = "timeout"      // the target did not answer in time
	ReasonBusy        Reason = "busy"         // too much at once
	ReasonCancelled   Reason = "cancelled"    // the client went away
	ReasonCut         Reason = "cut"          // one end cut a stream that was open
	ReasonOther       Reason = "other"        // anything else
	ReasonNotAllowed  Reason = "bad-method"   // not CONNECT
	ReasonTooLarge    Reason = "head-too-big" // a request head without end
)

// Status is the HTTP status that goes with a reason.
func (r Reason) Status() int {
	switch r {
	case ReasonMalformed:
		return 400
	case ReasonDenied:
		return 403
	case ReasonNotAllowed:
		return 405
	case ReasonTooLarge:
		return 431
	case ReasonNoSpoke, ReasonNoHub, ReasonBusy:
		return 503
	case ReasonTimeout:
		return 504
	}
	return 502
}

// reasons are all that may come over the wire.
var reasons = map[Reason]bool{
	ReasonMalformed: true, ReasonDenied: true, ReasonNoSpoke: true, ReasonNoHub: true, ReasonLost: true, ReasonUnresolved: true, ReasonRefused: true,
	ReasonUnreachable: true, ReasonTimeout: true, ReasonBusy: true, ReasonCancelled: true, ReasonCut: true, ReasonOther: true, ReasonNotAllowed: true, ReasonTooLarge: true,
}

// Refusal is why a stream was not opened: an error that goes over the wire.
type Refusal struct {
	Reason  Reason
	Message string // one line for the user
}

// Refuse makes a Refusal.
func Refuse(r Reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: r, Message: Line(fmt.Sprintf(format, args...))}
}

func (r *Refusal) Error() string { return r.Message }

// Append adds the encoded refusal to b.
func (r *Refusal) Append(b []byte) []byte {
	b = append(b, string(r.Reason)...)
	b = append(b, ' ')
	return append(b, Line(r.Message)...)
}

// ParseRefusal reads what Append wrote. Anything else is a refusal for another reason: the
// other end may be newer, or broken.
func ParseRefusal(b []byte) *Refusal {
	word, text, ok := strings.Cut(string(b[:min(len(b), 2*maxLine)]), " ")
	if r := Reason(word); ok && reasons[r] {
		return &Refusal{Reason: r, Message: Line(text)}
	}
	if len(b) == 0 {
		return &Refusal{Reason: ReasonCancelled, Message: "the other end ended the stream"}
	}
	return &Refusal{Reason: ReasonOther, Message: Line(string(b))}
}

// maxLine is the longest message in bytes.
const maxLine = 400

// Line makes text fit for a status line and a log: printable ASCII, one line, not long.
func Line(s string) string {
	if len(s) > maxLine {
		s = s[:maxLine-3] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// Hello is the first message of a spoke or an egress on its StreamHello.
type Hello struct {
	// Name is what the other end calls itself, for people; not trusted.
	Name string `json:"name,omitempty"`
	// Version of the program, for people.
	Version string `json:"version,omitempty"`
}

// Welcome is the hub's answer, and is sent again when something in it changes.
type Welcome struct {
	Version string `json:"version,omitempty"`
	// Hubs are all replicas, this one too, by number.
	Hubs []HubAddress `json:"hubs"`
	// Exports are the listeners that the spoke is to open; for a spoke only.
	Exports []Listener `json:"exports,omitempty"`
}

// HubAddress is where a hub is reached.
type HubAddress struct {
	Address    string `json:"address"`    // host:port to dial: the front's, or the hub's own
	ServerName string `json:"serverName"` // for SNI and in the hub's certificate
}

// Listener is one export.
type Listener struct {
	Name   string `json:"name"`
	Listen string `json:"listen"` // address:port
}

// JoinRequest asks for a certificate: with a token the first time, with the certificate of
// the connection from then on.
type JoinRequest struct {
	Token string `json:"token,omitempty"`
	CSR   []byte `json:"csr"` // DER (PKCS #10)
}

// JoinReply is the answer: Error, or the rest.
type JoinReply struct {
	Error string `json:"error,omitempty"`
	// Certificate chain, DER, the leaf first.
	Certificates [][]byte `json:"certificates,omitempty"`
	// Authorities are those that the other side's certificates may be from, DER.
	Authorities [][]byte `json:"authorities,omitempty"`
	// Hubs are all replicas.
	Hubs []HubAddress `json:"hubs,omitempty"`
}

// maxJSON is the largest JSON message.
const maxJSON = 256 << 10

// WriteJSON writes a message: its length (4 bytes) and JSON.
func WriteJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxJSON {
		return fmt.Errorf("%w: %d bytes, allowed are %d", ErrMessage, len(b), maxJSON)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// ReadJSON reads what WriteJSON wrote. Fields that are not known are passed over: the
// other end may be newer.
func ReadJSON(r io.Reader, v any) error {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxJSON {
		return fmt.Errorf("%w: %d bytes, allowed are %d", ErrMessage, n, maxJSON)
	}
	var b strings.Builder
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(b.String()), v); err != nil {
		return fmt.Errorf("%w: %w", ErrMessage, err)
	}
	return nil
}
