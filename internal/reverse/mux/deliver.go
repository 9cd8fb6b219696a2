package mux

import (
	"io"
	"net"
)

// writevChunks is how many received chunks are written at once.
const writevChunks = 8

// WriteTo implements io.WriterTo: what has been received goes to w without another copy.
//
// As long as w takes it at once the session's reader gives it on by itself, see giveOn, and this
// waits: waking somebody for each piece takes longer than sending it.
func (st *Stream) WriteTo(w io.Writer) (int64, error) {
	st.mu.Lock()
	if onward, ok := w.(*Stream); ok {
		st.onward = onward
	} else {
		st.out = direct(w)
	}
	st.mu.Unlock()
	n, err := st.deliver(w)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.onward, st.out = nil, nil
	return n + st.passed, err
}

// deliver writes what the session's reader does not give on.
func (st *Stream) deliver(w io.Writer) (int64, error) {
	var total int64
	for {
		list, size, err := st.awaitChunks()
		if err == io.EOF { //nolint:errorlint // awaitData's own
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := writeChunks(w, list)
		total += n
		if onward, ok := w.(*Stream); ok {
			onward.session.flush()
		}
		if credit := st.putDown(nil, size, err); credit {
			st.session.flush()
		}
		if err != nil {
			return total, &writeError{err}
		}
	}
}

// awaitChunks waits for the first chunks and takes them.
func (st *Stream) awaitChunks() (list []*chunk, size int, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		if st.taken {
			st.waits = true
			st.readable.Wait()
			continue
		}
		err := st.awaitData()
		if st.taken { // meanwhile
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if list, size = st.in.take(writevChunks); list != nil {
			st.taken = true
			return list, size, nil
		}
		st.readable.Wait() // the only one is being filled
	}
}

// take is awaitChunks for the session's reader, who may not wait for anybody, and says where they go.
// None: there is nothing, or somebody else is at it.
func (st *Stream) take() (list []*chunk, onward *Stream, out func([]*chunk) (int, error)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.taken || st.onward == nil && st.out == nil || st.broken != nil {
		return nil, nil, nil
	}
	list, _ = st.in.take(writevChunks)
	st.taken = list != nil
	return list, st.onward, st.out
}

// putDown ends what take or awaitChunks began: rest goes back, n bytes have been written, err is why no
// more will be. It reports whether there is credit to send.
func (st *Stream) putDown(rest []*chunk, n int, err error) (credit bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.taken = false
	if st.closed || st.deaf { // and the queue cleared
		freeAll(rest)
	} else {
		st.in.putBack(rest)
	}
	if st.broken = err; err != nil {
		st.readable.Broadcast()
		return false
	}
	return st.consume(n)
}

// giveOn gives what has come to where it goes, as far as that does not wait. It reports which session has
// something to flush now, and whether the stream's own has credit to.
func (st *Stream) giveOn() (flush *Session, credit bool) {
	for {
		list, onward, out := st.take()
		if list == nil {
			return flush, credit
		}
		var n int
		var err error
		if onward != nil {
			flush = onward.session
			list, n = pass(onward, list)
		} else {
			list, n, err = write(out, list)
		}
		credit = st.gaveOn(list, n, err) || credit
		if len(list) > 0 || err != nil {
			return flush, credit
		}
	}
}

// pass gives chunks to a stream.
func pass(onward *Stream, list []*chunk) (rest []*chunk, n int) {
	for len(list) > 0 {
		k := len(list[0].bytes())
		if !onward.tryChunk(list[0]) {
			break
		}
		n, list = n+k, list[1:]
	}
	return list, n
}

// write writes chunks to a connection.
func write(out func([]*chunk) (int, error), list []*chunk) (rest []*chunk, n int, err error) {
	n, err = out(list)
	left := n
	for len(list) > 0 && left >= len(list[0].bytes()) {
		left -= len(list[0].bytes())
		list[0].free()
		list = list[1:]
	}
	if len(list) > 0 {
		list[0].off += left
	}
	return list, n, err
}

// gaveOn is putDown for the session's reader: if something is left, the one who waits in WriteTo is to go on.
func (st *Stream) gaveOn(rest []*chunk, n int, err error) (credit bool) {
	credit = st.putDown(rest, n, err)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.passed += int64(n)
	if len(rest) > 0 || st.waits {
		st.waits = false
		st.readable.Broadcast()
	}
	return credit
}

// writeChunks writes chunks and frees them. What goes to a stream is to be flushed.
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
	switch x := w.(type) {
	case *Held:
		w = x.UnixConn
	case *target:
		w = x.TCPConn
	}
	switch w := w.(type) {
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
