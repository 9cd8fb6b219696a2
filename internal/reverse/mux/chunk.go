package mux

import (
	"sync"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Bytes travel in chunks from where they are read to where they are written: small ones for
// the odd line of a log, large ones for bulk. A frame's header goes into the room that is
// left before its payload, so that nothing is copied on the way.
const (
	headroom   = wire.FrameHeader
	smallChunk = 4 << 10
	largeChunk = headroom + wire.MaxData
)

var (
	smallPool = sync.Pool{New: func() any { return &chunk{buf: make([]byte, smallChunk), off: headroom, end: headroom} }}
	largePool = sync.Pool{New: func() any { return &chunk{buf: make([]byte, largeChunk), off: headroom, end: headroom} }}
)

// chunk holds bytes buf[off:end]; off is never less than headroom, but for whole frames.
type chunk struct {
	buf      []byte
	off, end int
	filling  bool // the session's reader writes behind end
	frames   bool // holds whole frames, with headers, and more may be added
	next     *chunk
}

func newChunk(size int) *chunk {
	if size <= smallChunk/2 {
		return smallPool.Get().(*chunk)
	}
	return largePool.Get().(*chunk)
}

func (c *chunk) free() {
	c.off, c.end, c.filling, c.frames, c.next = headroom, headroom, false, false, nil
	if len(c.buf) == smallChunk {
		smallPool.Put(c)
		return
	}
	largePool.Put(c)
}

func (c *chunk) bytes() []byte { return c.buf[c.off:c.end] }

// queue is a list of chunks, first received first.
type queue struct {
	head, tail *chunk
	size       int // readable bytes
}

// reserve gives space for n bytes, at most a frame's, behind the last one; commit makes
// them readable.
func (q *queue) reserve(n int) (c *chunk, space []byte) {
	if q.tail == nil || len(q.tail.buf)-q.tail.end < n {
		fresh := newChunk(n)
		if q.tail == nil {
			q.head = fresh
		} else {
			q.tail.next = fresh
		}
		q.tail = fresh
	}
	c = q.tail
	c.filling = true
	return c, c.buf[c.end : c.end+n]
}

func (q *queue) commit(c *chunk, n int) {
	c.filling = false
	c.end += n
	q.size += n
}

// read copies out what fits into b.
func (q *queue) read(b []byte) int {
	n := 0
	for q.head != nil && n < len(b) {
		c := q.head
		k := copy(b[n:], c.buf[c.off:c.end])
		n += k
		c.off += k
		if c.off < c.end || !q.dropHead() {
			break
		}
	}
	q.size -= n
	return n
}

// take detaches the first chunks, most of them; nil when there are none, or only one that is
// being filled. The caller frees them.
func (q *queue) take(most int) (list []*chunk, size int) {
	for c := q.head; c != nil && !c.filling && len(list) < most; c = q.head {
		q.head = c.next
		if q.head == nil {
			q.tail = nil
		}
		list = append(list, c)
		size += c.end - c.off
	}
	q.size -= size
	return list, size
}

// putBack makes chunks that were taken the first ones again.
func (q *queue) putBack(list []*chunk) {
	for i := len(list) - 1; i >= 0; i-- {
		c := list[i]
		if c.next = q.head; q.tail == nil {
			q.tail = c
		}
		q.head = c
		q.size += len(c.bytes())
	}
}

// dropHead frees the first chunk, which is read to its end, unless it is being filled.
func (q *queue) dropHead() bool {
	c := q.head
	if c.filling {
		return false
	}
	q.head = c.next
	if q.head == nil {
		q.tail = nil
	}
	c.free()
	return true
}

// clear drops everything; a chunk that is being filled is left to the garbage collector.
func (q *queue) clear() {
	for c := q.head; c != nil; {
		next := c.next
		if !c.filling {
			c.free()
		}
		c = next
	}
	*q = queue{}
}

// outQueue is what waits to be sent: chunks of whole frames.
type outQueue struct {
	head, tail *chunk
	size       int
}

func (q *outQueue) push(c *chunk) {
	if q.tail == nil {
		q.head = c
	} else {
		q.tail.next = c
	}
	q.tail = c
	q.size += len(c.bytes())
}

// add copies a frame behind the others.
func (q *outQueue) add(f wire.Frame, payload []byte) {
	need := wire.FrameHeader + len(payload)
	if q.tail == nil || !q.tail.frames || len(q.tail.buf)-q.tail.end < need {
		c := newChunk(need)
		c.off, c.end, c.frames = 0, 0, true
		q.push(c)
	}
	c := q.tail
	b := f.Append(c.buf[:c.end])
	c.end = len(append(b, payload...))
	q.size += need
}

// addChunk puts the header before a chunk's bytes and takes it over.
func (q *outQueue) addChunk(f wire.Frame, c *chunk) {
	c.off -= wire.FrameHeader
	f.Append(c.buf[:c.off])
	c.next = nil
	q.push(c)
}
