package mux

import (
	"sync"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// Received bytes wait in chunks: small ones for the odd line of a log, large ones for bulk.
const (
	smallChunk = 4 << 10
	largeChunk = wire.FrameHeader + wire.MaxData
)

var (
	smallPool = sync.Pool{New: func() any { b := make([]byte, smallChunk); return &chunk{buf: b} }}
	largePool = sync.Pool{New: func() any { b := make([]byte, largeChunk); return &chunk{buf: b} }}
)

// chunk holds received bytes buf[off:end]; filling: the session's reader writes behind end.
type chunk struct {
	buf      []byte
	off, end int
	filling  bool
	next     *chunk
}

func newChunk(size int) *chunk {
	if size <= smallChunk/2 {
		return smallPool.Get().(*chunk)
	}
	return largePool.Get().(*chunk)
}

func (c *chunk) free() {
	c.off, c.end, c.filling, c.next = 0, 0, false, nil
	if len(c.buf) == smallChunk {
		smallPool.Put(c)
		return
	}
	largePool.Put(c)
}

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
