package link

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// Attempts come less and less often, up to a limit, and at once again after a connection that
// lasted; a hub that is too busy is given more time.
func TestPace(t *testing.T) {
	refused, busy := errors.New("connection refused"), fmt.Errorf("%w (timeout)", errBusy)
	var p pace
	for i, x := range []struct {
		err  error
		took time.Duration
		want time.Duration
	}{
		{refused, 0, firstRetry},
		{refused, 0, 2 * firstRetry},
		{refused, 0, 4 * firstRetry},
		{busy, handshakeTimeout, firstBusy},
		{busy, handshakeTimeout, 2 * firstBusy},
		{busy, handshakeTimeout, lastBusy},
		{busy, handshakeTimeout, lastBusy},
		{refused, handshakeTimeout, 8 * firstRetry}, // a long dial is no connection that lasted
		{refused, 0, 16 * firstRetry},
		{refused, 0, lastRetry},
		{refused, 0, lastRetry},
		{nil, time.Second, lastRetry}, // accepted and cut, again and again
		{nil, time.Minute, firstRetry},
		{busy, handshakeTimeout, firstBusy},
	} {
		if got := p.next(x.err, x.took); got != x.want {
			t.Errorf("attempt %d: wait for %s, want %s", i, got, x.want)
		}
	}
}
