package mux

import (
	"io"
	"net"
)

// writevChunks is how many received chunks are written at once.
const writevChunks = 8

// WriteTo implements io.WriterTo: what has been received goes to w without another copy.
func (st *Stream) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		st.mu.Lock()
		err := st.awaitData()
		var list []*chunk
		size := 0
		if err == nil {
			if list, size = st.in.take(writevChunks); list == nil {
				st.readable.Wait() // the only one is being filled
			}
		}
		st.mu.Unlock()
		if err == io.EOF { //nolint:errorlint // awaitData's own
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := writeChunks(w, list)
		total += n
		if err != nil {
			return total, &writeError{err}
		}
		st.mu.Lock()
		st.consume(size)
		st.mu.Unlock()
	}
}

// writeChunks writes chunks and frees them.
func writeChunks(w io.Writer, list []*chunk) (total int64, err error) {
	if st, ok := w.(*Stream); ok {
		for i, c := range list {
			n := len(c.bytes())
			if err := st.writeChunk(c); err != nil {
				freeAll(list[i+1:])
				return total, err
			}
			total += int64(n)
		}
		return total, nil
	}
	defer freeAll(list)
	if h, ok := w.(*Held); ok {
		w = h.UnixConn
	}
	switch w := w.(type) {
	case *target:
		if len(list) > 1 {
			return w.writeAll(buffers(list))
		}
	case *net.TCPConn, *net.UnixConn:
		if len(list) > 1 {
			b := buffers(list)
			return b.WriteTo(w)
		}
	case net.Conn:
		if k := corkOf(w); k != nil && len(list) > 1 {
			k.cork()
			defer func() {
				if e := k.uncork(); err == nil {
					err = e
				}
			}()
		}
	}
	for _, c := range list {
		n, err := w.Write(c.bytes())
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// buffers are the bytes of chunks.
func buffers(list []*chunk) net.Buffers {
	b := make(net.Buffers, len(list))
	for i, c := range list {
		b[i] = c.bytes()
	}
	return b
}

func freeAll(list []*chunk) {
	for _, c := range list {
		c.free()
	}
}
