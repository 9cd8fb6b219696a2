package vici

import (
	"encoding/binary"
	"fmt"
	"io"
)

// The packet types on the wire.
const (
	cmdRequest      = 0
	cmdResponse     = 1
	cmdUnknown      = 2
	eventRegister   = 3
	eventUnregister = 4
	eventConfirm    = 5
	eventUnknown    = 6
	event           = 7
)

// packet is one packet; name is set for requests, registrations and events only.
type packet struct {
	kind    byte
	name    string
	message []byte // encoded
}

func named(kind byte) bool {
	return kind == cmdRequest || kind == eventRegister || kind == eventUnregister || kind == event
}

// encode returns the packet with its length in front.
func (p packet) encode() ([]byte, error) {
	b := make([]byte, 4, 4+2+len(p.name)+len(p.message))
	b = append(b, p.kind)
	if named(p.kind) {
		if p.name == "" || len(p.name) > MaxName {
			return nil, fmt.Errorf("packet name of %d bytes: 1 to %d are allowed", len(p.name), MaxName)
		}
		b = append(b, byte(len(p.name)))
		b = append(b, p.name...)
	}
	b = append(b, p.message...)
	if len(b)-4 > MaxMessage {
		return nil, fmt.Errorf("packet of %d bytes: at most %d are allowed", len(b)-4, MaxMessage)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b, nil
}

// readPacket reads one packet. The declared length is checked before memory is taken.
func readPacket(r io.Reader) (packet, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return packet{}, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > MaxMessage {
		return packet{}, fmt.Errorf("%w: packet of %d bytes", ErrMalformed, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return packet{}, err
	}
	return decodePacket(b)
}

func decodePacket(b []byte) (packet, error) {
	if len(b) == 0 {
		return packet{}, fmt.Errorf("%w: empty packet", ErrMalformed)
	}
	p := packet{kind: b[0], message: b[1:]}
	if p.kind > event {
		return packet{}, fmt.Errorf("%w: packet type %d", ErrMalformed, p.kind)
	}
	if named(p.kind) {
		d := decoder{rest: p.message}
		name, err := d.name()
		if err != nil {
			return packet{}, fmt.Errorf("%w: packet name: %w", ErrMalformed, err)
		}
		p.name, p.message = name, d.rest
	}
	return p, nil
}
