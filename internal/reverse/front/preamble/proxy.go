package preamble

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	proxyproto "github.com/pires/go-proxyproto"
)

// Of the PROXY protocol (haproxy.org, proxy-protocol.txt).
const (
	maxProxyV1    = 107
	proxyV2Header = 16
	proxyV2Length = 14 // where in the header the length of the rest stands
	maxProxyV2    = 2048
)

// Proxied is what a PROXY protocol header says of the connection. Both are invalid when
// the proxy speaks for itself (LOCAL, UNKNOWN): then the connection's own addresses are
// meant.
type Proxied struct {
	Source, Destination netip.AddrPort
}

// ParseProxy reads the PROXY protocol header, version 1 or 2, that b begins with, and
// returns also how many bytes it takes. Errors are ErrShort and *Error; no header is one.
func ParseProxy(b []byte) (Proxied, int, error) {
	size, err := proxySize(b)
	if err != nil {
		return Proxied{}, 0, err
	}
	header, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(b[:size])))
	if err != nil {
		return Proxied{}, 0, refuse(Malformed, "malformed PROXY protocol header: %v", err)
	}
	if header.Command.IsLocal() {
		return Proxied{}, size, nil
	}
	source, destination, ok := header.TCPAddrs()
	if !ok {
		return Proxied{}, 0, refuse(Malformed, "the PROXY protocol header is not one of a TCP connection")
	}
	p := Proxied{unmapped(source), unmapped(destination)}
	if !p.Source.Addr().IsValid() || p.Source.Addr().IsUnspecified() || p.Source.Addr().IsMulticast() {
		return Proxied{}, 0, refuse(Malformed, "the PROXY protocol header names %s as source", p.Source)
	}
	return p, size, nil
}

func unmapped(a *net.TCPAddr) netip.AddrPort {
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// proxySize is the size of the header; it is ErrShort until all of it is there.
func proxySize(b []byte) (int, error) {
	v1, v2 := prefix(b, append(bytes.Clone(proxyproto.SIGV1), ' ')), prefix(b, proxyproto.SIGV2)
	switch {
	case !v1 && !v2:
		return 0, refuse(Malformed, "no PROXY protocol header, which this source must send")
	case v1:
		line := b[:min(len(b), maxProxyV1)]
		if end := bytes.Index(line, []byte("\r\n")); end >= 0 {
			return end + 2, nil
		}
		if len(line) == maxProxyV1 {
			return 0, refuse(Oversized, "the PROXY protocol header has more than %d bytes", maxProxyV1)
		}
		return 0, ErrShort
	case len(b) < proxyV2Header:
		return 0, ErrShort
	}
	size := proxyV2Header + int(binary.BigEndian.Uint16(b[proxyV2Length:]))
	if size > maxProxyV2 {
		return 0, refuse(Oversized, "the PROXY protocol header has %d bytes, more than %d", size, maxProxyV2)
	}
	if len(b) < size {
		return 0, ErrShort
	}
	return size, nil
}

// prefix reports whether b begins as signature does, as far as it goes.
func prefix(b, signature []byte) bool {
	n := min(len(b), len(signature))
	return bytes.Equal(b[:n], signature[:n])
}

// AppendProxy appends a PROXY protocol header of version 1 or 2. Version 2 also carries
// the server name (PP2_TYPE_AUTHORITY) unless that is empty. Addresses of two families,
// which a header cannot hold, are sent as unknown.
func AppendProxy(b []byte, version int, p Proxied, serverName string) ([]byte, error) {
	header := proxyproto.HeaderProxyFromAddrs(byte(version), nil, nil)
	if p.Source.Addr().Is4() == p.Destination.Addr().Is4() {
		header = proxyproto.HeaderProxyFromAddrs(byte(version), net.TCPAddrFromAddrPort(p.Source), net.TCPAddrFromAddrPort(p.Destination))
	}
	if version == 2 && serverName != "" {
		if err := header.SetTLVs([]proxyproto.TLV{{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(serverName)}}); err != nil {
			return nil, fmt.Errorf("write the PROXY protocol header: %w", err)
		}
	}
	text, err := header.Format()
	if err != nil {
		return nil, fmt.Errorf("write the PROXY protocol header: %w", err)
	}
	return append(b, text...), nil
}
