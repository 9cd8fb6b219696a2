package tcpconn

import (
	"math"

	"golang.org/x/sys/unix"
)

// unknown is no number of bytes that were read: whatever comes, the other end has said that it ends.
const unknown = math.MaxUint64 / 2

// saidEnd reports whether the other end of a connection, of which so many bytes were read and then an end, has
// said that it ends. The kernel counts what comes in order, and an end (FIN) as one byte more, as it has a sequence
// number (RFC 9293, section 3.4; tcp_info, tcpi_bytes_received). Urgent data that was not read looks like an end.
// So does every end of a connection of several paths (RFC 8684): there the count is of the first one.
func saidEnd(fd int, read uint64) bool {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil || info.Bytes_received != read {
		return true
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err != nil || protocol != unix.IPPROTO_TCP
}

// readUntilNow is how many bytes of a connection have been read, from what came in order and what of it is
// still there; or unknown.
func readUntilNow(fd int) uint64 {
	for range 10 { // until nothing comes between the two
		before, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return unknown
		}
		if before.State != unix.BPF_TCP_ESTABLISHED && before.State != unix.BPF_TCP_FIN_WAIT1 && before.State != unix.BPF_TCP_FIN_WAIT2 {
			return unknown // it has ended; whether by an end is not known any more
		}
		unread, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
		if err != nil {
			return unknown
		}
		after, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return unknown
		}
		if before.Bytes_received == after.Bytes_received && before.State == after.State {
			return before.Bytes_received - uint64(unread)
		}
	}
	return unknown
}
