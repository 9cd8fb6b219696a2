package wireguard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// What the kernel segments at once (UDP_SEGMENT) at most, in packets and in bytes with the
// headers of UDP and IPv4.
const (
	segmentsMax = 64
	segmentedTo = 1<<16 - 1 - 20 - 8
)

// batch is the messages of one Send, for use again.
type batch struct {
	packets  [][]byte
	messages []ipv6.Message
	control  []byte
}

var batches = sync.Pool{New: func() any {
	return &batch{
		packets:  make([][]byte, 0, conn.IdealBatchSize),
		messages: make([]ipv6.Message, 0, conn.IdealBatchSize),
	}
}}

// release forgets the packets.
func (b *batch) release() {
	clear(b.packets)
	clear(b.messages)
	b.packets, b.messages, b.control = b.packets[:0], b.messages[:0], b.control[:0]
	batches.Put(b)
}

// Send sends packets, which begin at offset of each of bufs, to one peer.
func (s *sockets) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	e, ok := to.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	u := s.v6.Load()
	if e.to.Addr().Is4() {
		u = s.v4.Load()
	}
	switch {
	case u != nil:
	case s.v4.Load() == nil && s.v6.Load() == nil:
		return net.ErrClosed
	default:
		return fmt.Errorf("send to %s: the host has no such addresses: %w", e.to, unix.EAFNOSUPPORT)
	}
	err := u.send(bufs, e, offset)
	if err == nil || e.source() == nil || errors.Is(err, net.ErrClosed) {
		return err
	}
	// The remembered source address may be gone. Of what was sent already the peer drops the
	// second copy.
	e.ClearSrc()
	return u.send(bufs, e, offset)
}

func (u *udp) send(bufs [][]byte, to *endpoint, offset int) error {
	if len(bufs) == 1 {
		_, _, err := u.WriteMsgUDPAddrPort(bufs[0][offset:], to.source(), to.to)
		return err
	}
	if u.segments.Load() {
		err := u.sendBatch(bufs, to, offset, segmentsMax)
		switch {
		case errors.Is(err, unix.EIO): // a link that makes no checksums, udp(7)
			u.segments.Store(false)
		case !tooLong(err):
			return err
		}
	}
	return u.sendBatch(bufs, to, offset, 1)
}

// tooLong: the packets cannot be handed over in one piece, since the kernel segments only
// into what needs no fragments: EINVAL, since Linux 6.13 EMSGSIZE.
func tooLong(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE)
}

// sendBatch sends packets with few system calls, those of one size that follow each other in
// messages of up to so many.
func (u *udp) sendBatch(bufs [][]byte, to *endpoint, offset, most int) error {
	b := batches.Get().(*batch)
	defer b.release()
	b.fill(bufs, to, offset, most)
	for rest := b.messages; len(rest) > 0; {
		n, err := u.messages.WriteBatch(rest, 0)
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

func (b *batch) fill(bufs [][]byte, to *endpoint, offset, most int) {
	for _, p := range bufs {
		b.packets = append(b.packets, p[offset:])
	}
	source, address := to.source(), net.UDPAddrFromAddrPort(to.to)
	for from := 0; from < len(b.packets); {
		n := sameSize(b.packets[from:], most)
		m := ipv6.Message{Buffers: b.packets[from : from+n], OOB: source, Addr: address}
		if n > 1 {
			at := len(b.control)
			b.control = appendSegmentSize(append(b.control, source...), len(b.packets[from]))
			m.OOB = b.control[at:]
		}
		b.messages = append(b.messages, m)
		from += n
	}
}

// sameSize counts the packets at the beginning that the kernel can make from one piece: all of
// one size, but the last, which may be shorter.
func sameSize(packets [][]byte, most int) int {
	size := len(packets[0])
	total := size
	for n := 1; n < min(len(packets), most); n++ {
		total += len(packets[n])
		switch {
		case len(packets[n]) > size || total > segmentedTo:
			return n
		case len(packets[n]) < size:
			return n + 1
		}
	}
	return min(len(packets), most)
}

// appendSegmentSize appends a control message that tells the kernel how to cut (UDP_SEGMENT,
// a uint16): a struct cmsghdr, whose first field is a word, and the size.
func appendSegmentSize(b []byte, size int) []byte {
	at := len(b)
	b = append(b, make([]byte, unix.CmsgSpace(2))...)
	c, word := b[at:], unix.SizeofCmsghdr-8
	if length := unix.CmsgLen(2); word == 8 {
		binary.NativeEndian.PutUint64(c, uint64(length))
	} else {
		binary.NativeEndian.PutUint32(c, uint32(length))
	}
	binary.NativeEndian.PutUint32(c[word:], unix.SOL_UDP)
	binary.NativeEndian.PutUint32(c[word+4:], unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(c[unix.CmsgLen(0):], uint16(size))
	return b
}
