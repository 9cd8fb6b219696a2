package preamble

import "encoding/binary"

// Of the TLS record and handshake protocols (RFC 8446, RFC 6066, RFC 9849).
const (
	recordHandshake      = 22
	maxFragment          = 1 << 14
	handshakeClientHello = 1
	extensionServerName  = 0
	extensionECH         = 0xfe0d
	nameTypeHost         = 0
	maxExtensions        = 64
)

// Hello is what the front needs of a ClientHello.
type Hello struct {
	// ServerName is the server name indication in lower case, never empty. With encrypted
	// client hello it is the outer name: that is the one meant for whoever routes.
	ServerName string
	// ECH says that there is an encrypted client hello, or what looks like one (GREASE).
	ECH bool
}

// ParseHello reads the ClientHello that b begins with; it may be spread over several
// records. Errors are ErrShort and *Error. What follows it in b is not looked at.
func ParseHello(b []byte) (Hello, error) {
	message, err := handshake(b)
	if err != nil {
		return Hello{}, err
	}
	r := reader{b: message}
	r.skip(2 + 32)                // legacy_version, random
	if len(r.vector(1, 0)) > 32 { // legacy_session_id
		r.bad = true
	}
	if len(r.vector(2, 2))%2 != 0 { // cipher_suites
		r.bad = true
	}
	r.vector(1, 1) // legacy_compression_methods
	if r.bad {
		return Hello{}, refuse(Malformed, "malformed TLS ClientHello")
	}
	if len(r.b) == 0 {
		return Hello{}, refuse(NoServerName, "the TLS ClientHello has no server name")
	}
	extensions := reader{b: r.vector(2, 0)}
	if r.bad || len(r.b) != 0 {
		return Hello{}, refuse(Malformed, "malformed TLS ClientHello: length of the extensions")
	}
	return extensions.hello()
}

// hello reads the extensions.
func (r *reader) hello() (Hello, error) {
	var h Hello
	var seen [maxExtensions]uint16
	for n := 0; len(r.b) > 0; n++ {
		kind := r.number(2)
		data := r.vector(2, 0)
		if r.bad {
			return Hello{}, refuse(Malformed, "malformed TLS ClientHello: length of an extension")
		}
		if n == maxExtensions {
			return Hello{}, refuse(Oversized, "the TLS ClientHello has more than %d extensions", maxExtensions)
		}
		for _, k := range seen[:n] {
			if int(k) == kind {
				return Hello{}, refuse(Malformed, "malformed TLS ClientHello: extension %d comes twice", kind)
			}
		}
		seen[n] = uint16(kind)
		switch kind {
		case extensionServerName:
			name, err := serverName(data)
			if err != nil {
				return Hello{}, err
			}
			h.ServerName = name
		case extensionECH:
			h.ECH = true
		}
	}
	if h.ServerName == "" {
		return Hello{}, refuse(NoServerName, "the TLS ClientHello has no server name")
	}
	return h, nil
}

// serverName reads the extension: a list that holds one host name.
func serverName(data []byte) (string, error) {
	outer := reader{b: data}
	list := reader{b: outer.vector(2, 1)}
	kind := list.number(1)
	name := list.vector(2, 1)
	if outer.bad || len(outer.b) != 0 || list.bad || len(list.b) != 0 || kind != nameTypeHost {
		return "", refuse(Malformed, "malformed TLS ClientHello: the server name extension must hold one host name")
	}
	return Name(string(name))
}

// handshake returns the body of the handshake message of type ClientHello that the
// records in b begin with. When it lies in one record it is part of b, else a copy.
func handshake(b []byte) ([]byte, error) {
	// How much there is comes first, so that a hello that arrives byte by byte is not put
	// together for every byte.
	var header [4]byte
	need, have, first, records := len(header), 0, 0, 0
	for pos := 0; have < need; records++ {
		fragment, err := record(b, pos)
		if err != nil {
			return nil, err
		}
		if pos == 0 {
			first = len(fragment)
		}
		copy(header[min(have, 4):], fragment)
		have += len(fragment)
		pos += 5 + len(fragment)
		if header[0] != handshakeClientHello {
			return nil, refuse(Malformed, "malformed TLS: handshake message %d where a ClientHello should be", header[0])
		}
		if have >= len(header) {
			size := int(binary.BigEndian.Uint32(header[:]) & 0xffffff)
			if need = len(header) + size; need > MaxSize {
				return nil, refuse(Oversized, "the TLS ClientHello has %d bytes, more than %d", size, MaxSize)
			}
		}
		if have < need && len(fragment) < recordLength(b, pos-5-len(fragment)) {
			return nil, ErrShort
		}
	}
	if first >= need {
		return b[5+4 : 5+need], nil
	}
	message := make([]byte, 0, need)
	for pos := 0; len(message) < need; {
		fragment, err := record(b, pos)
		if err != nil {
			return nil, err
		}
		message = append(message, fragment...)
		pos += 5 + len(fragment)
	}
	return message[4:need], nil
}

// recordLength is what the header of the record at pos says; the header must be there.
func recordLength(b []byte, pos int) int { return int(binary.BigEndian.Uint16(b[pos+3:])) }

// record returns what has arrived of the fragment of the record at pos.
func record(b []byte, pos int) ([]byte, error) {
	h := b[min(pos, len(b)):]
	switch {
	case len(h) > 0 && h[0] != recordHandshake:
		return nil, refuse(Malformed, "malformed TLS: a record of type %d where the ClientHello should be", h[0])
	case len(h) > 1 && h[1] != 3:
		return nil, refuse(Malformed, "malformed TLS: version %d of the record protocol", h[1])
	case len(h) < 5:
		return nil, ErrShort
	}
	size := recordLength(b, pos)
	if size == 0 || size > maxFragment {
		return nil, refuse(Malformed, "malformed TLS: a record of %d bytes", size)
	}
	if len(h) == 5 {
		return nil, ErrShort
	}
	return h[5:min(len(h), 5+size)], nil
}

// reader takes values off the front of b; bad stays set after b was too short.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) skip(n int) []byte {
	if n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) number(bytes int) int {
	n := 0
	for _, c := range r.skip(bytes) {
		n = n<<8 | int(c)
	}
	return n
}

// vector takes a length of so many bytes and as much as it says, at least least.
func (r *reader) vector(bytes, least int) []byte {
	v := r.skip(r.number(bytes))
	if len(v) < least {
		r.bad = true
	}
	return v
}
