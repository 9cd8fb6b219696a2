package labtest

import (
	"net"
)

// Listen opens a TCP socket on a host; it is closed at the end of the test.
func (h *Host) Listen(address string) (l net.Listener) {
	h.t.Helper()
	h.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	h.t.Cleanup(func() { _ = l.Close() })
	return l
}

// Serve hands each connection of a listener to handle, in a goroutine of its own, and closes
// it afterwards; it ends with the listener. It returns at once.
func Serve(l net.Listener, handle func(net.Conn)) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
}
