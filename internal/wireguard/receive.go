package wireguard

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

const (
	// messagesMax is how many messages one system call fetches. Each may hold many packets of
	// one sender (UDP_GRO), so that more are fetched only where many peers speak at once.
	messagesMax = 8
	messageSize = 1 << 16
)

// controlSize has room for a source address and a segment size, in bytes.
var controlSize = unix.CmsgSpace(unix.SizeofInet6Pktinfo) + unix.CmsgSpace(4)

// receiver fetches the packets of one socket, for one goroutine.
type receiver struct {
	from     batcher
	messages []ipv6.Message
	waiting  []ipv6.Message // of messages: fetched, not all given out

	// Of the first that waits:
	rest    []byte // what is left of it
	segment int    // size of its packets, of which the last may be shorter
	peer    *endpoint
}

func newReceiver(u *udp) *receiver {
	r := &receiver{from: u.messages, messages: make([]ipv6.Message, messagesMax)}
	for i := range r.messages {
		r.messages[i].Buffers = [][]byte{make([]byte, messageSize)}
		r.messages[i].OOB = make([]byte, controlSize)
	}
	return r
}

// receive is a conn.ReceiveFunc: it waits for packets, and returns as many as have come and
// bufs has room for.
func (r *receiver) receive(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	if len(r.waiting) == 0 {
		n, err := r.from.ReadBatch(r.messages, 0)
		if err != nil {
			return 0, err
		}
		r.waiting = r.messages[:n]
	}
	n := 0
	for len(r.waiting) > 0 {
		if r.peer == nil {
			r.look()
		}
		for len(r.rest) > 0 {
			if n == len(bufs) {
				return n, nil
			}
			size := min(r.segment, len(r.rest))
			sizes[n], eps[n] = copy(bufs[n], r.rest[:size]), r.peer
			r.rest = r.rest[size:]
			n++
		}
		r.waiting, r.peer = r.waiting[1:], nil
	}
	return n, nil
}

// look takes up the first message that waits.
func (r *receiver) look() {
	m := &r.waiting[0]
	r.rest, r.segment = m.Buffers[0][:m.N], m.N
	r.peer = &endpoint{to: m.Addr.(*net.UDPAddr).AddrPort()}
	for control := m.OOB[:m.NN]; len(control) >= unix.SizeofCmsghdr; {
		h, data, more, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			return
		}
		whole := control[:len(control)-len(more)]
		control = more
		switch {
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 2:
			if size := int(binary.NativeEndian.Uint16(data)); size > 0 {
				r.segment = size
			}
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			r.peer.src, r.peer.control = netip.AddrFrom4([4]byte(data[4:8])), append([]byte(nil), whole...) // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			r.peer.src, r.peer.control = netip.AddrFrom16([16]byte(data[:16])), append([]byte(nil), whole...)
		}
	}
}
