// Package wire is what goes over the reversed tunnel's connections, as values: frames of
// the multiplexer, messages in them, the head of an HTTP CONNECT request, server names.
//
// It encodes and decodes and does nothing else: no socket, no clock, no policy. Every
// parser is bounded, refuses what it does not know, and is fuzzed.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// FrameType says what a frame is.
type FrameType uint8

// The frames. Each belongs to a stream, except Ping, Pong and GoAway (stream 0).
const (
	FrameOpen   FrameType = 1 + iota // begins a stream; payload: an opaque header
	FrameAnswer                      // accepts a stream; payload: opaque
	FrameData                        // payload: bytes of the stream
	FrameFin                         // no more data in this direction; no payload
	FrameReset                       // ends the stream in both directions; payload: opaque reason
	FrameCredit                      // the other side may send more; payload: 4 bytes, how many
	FramePing                        // payload: 8 bytes, to be sent back
	FramePong                        // payload: those of the ping
	FrameGoAway                      // the sender wants no new streams; no payload
)

const (
	// FrameHeader is the size of a frame's header: type (1 byte), length of the payload (3),
	// stream (4), in network byte order.
	FrameHeader = 8
	// MaxData is the largest payload of FrameData. With its header such a frame fills four
	// TLS records.
	MaxData = 64<<10 - FrameHeader
	// MaxControl is the largest payload of FrameOpen, FrameAnswer and FrameReset.
	MaxControl = 16 << 10
)

// ErrFrame is a frame that breaks the protocol.
var ErrFrame = errors.New("broken frame")

// Frame is the header of a frame.
type Frame struct {
	Type   FrameType
	Length int // of the payload, in bytes
	Stream uint32
}

// Append adds the encoded header to b.
func (f Frame) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(f.Type)<<24|uint32(f.Length)&0xffffff)
	return binary.BigEndian.AppendUint32(b, f.Stream)
}

// ParseFrame reads a header of FrameHeader bytes. ErrFrame: unknown type, or a length or
// stream that the type does not allow.
func ParseFrame(b [FrameHeader]byte) (Frame, error) {
	first := binary.BigEndian.Uint32(b[:4])
	f := Frame{FrameType(first >> 24), int(first & 0xffffff), binary.BigEndian.Uint32(b[4:])}
	low, high, session := 0, 0, false
	switch f.Type {
	case FrameOpen, FrameAnswer, FrameReset:
		high = MaxControl
	case FrameData:
		low, high = 1, MaxData
	case FrameFin:
	case FrameCredit:
		low, high = 4, 4
	case FramePing, FramePong:
		low, high, session = 8, 8, true
	case FrameGoAway:
		session = true
	default:
		return Frame{}, fmt.Errorf("%w: type %d is not known", ErrFrame, f.Type)
	}
	if f.Length < low || f.Length > high {
		return Frame{}, fmt.Errorf("%w: type %d of %d bytes, allowed are %d to %d", ErrFrame, f.Type, f.Length, low, high)
	}
	if session != (f.Stream == 0) {
		return Frame{}, fmt.Errorf("%w: type %d for stream %d", ErrFrame, f.Type, f.Stream)
	}
	return f, nil
}
