package mux

import (
	"sync"
	"time"
)

// deadline is a point in time after which waiting ends.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

// SetDeadline implements net.Conn.
func (st *Stream) SetDeadline(t time.Time) error {
	return firstError(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (st *Stream) SetReadDeadline(t time.Time) error {
	return st.setDeadline(&st.readBy, &st.readable, t)
}

// SetWriteDeadline implements net.Conn.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	return st.setDeadline(&st.writeBy, &st.writable, t)
}

func (st *Stream) setDeadline(d *deadline, c *sync.Cond, t time.Time) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	d.stop()
	d.at = t
	if !t.IsZero() && !st.closed {
		d.timer = time.AfterFunc(time.Until(t), func() {
			st.mu.Lock()
			defer st.mu.Unlock()
			c.Broadcast()
		})
	}
	c.Broadcast()
	return nil
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
