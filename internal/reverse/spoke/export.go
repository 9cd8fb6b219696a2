package spoke

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// export is an open listener.
type export struct {
	listener net.Listener
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

func (e *export) close() {
	_ = e.listener.Close()
	e.cancel()
	e.wg.Wait()
}

// welcome takes over what a hub says.
func (s *Spoke) welcome(w wire.Welcome) {
	s.mu.Lock()
	s.wanted = slices.Clone(w.Exports)
	s.mu.Unlock()
	s.follow()
}

// follow opens the listeners that are wanted and closes the others. Connections through
// those that are closed go on.
func (s *Spoke) follow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx == nil {
		return
	}
	for l, e := range s.exports {
		if !slices.Contains(s.wanted, l) {
			_ = e.listener.Close()
			delete(s.exports, l)
			s.opts.Logger.Info("export closed", "export", l.Name, "listen", l.Listen)
		}
	}
	for _, l := range s.wanted {
		if s.exports[l] != nil {
			continue
		}
		e, err := s.listen(l)
		if err != nil {
			if old := s.problem[l]; old == nil || old.Error() != err.Error() {
				s.opts.Logger.Error("export cannot be opened", "export", l.Name, "error", err)
			}
			s.problem[l] = err
			continue
		}
		delete(s.problem, l)
		s.exports[l] = e
		s.opts.Logger.Info("export open", "export", l.Name, "listen", e.listener.Addr())
	}
}

// Exports lists where the open exports listen, by name.
func (s *Spoke) Exports() map[string]net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]net.Addr{}
	for l, e := range s.exports {
		out[l.Name] = e.listener.Addr()
	}
	return out
}

// maxExportConnections is how many connections one export serves at once.
const maxExportConnections = 4096

// listen opens one export, with the lock held.
func (s *Spoke) listen(l wire.Listener) (*export, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	listener, err := s.opts.Listen(ctx, "tcp", l.Listen)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("listen on %s: %w", l.Listen, err)
	}
	e := &export{listener: listener, cancel: cancel}
	slots := make(chan struct{}, maxExportConnections)
	e.wg.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				if ctx.Err() != nil || isClosed(err) {
					return
				}
				time.Sleep(10 * time.Millisecond) // out of descriptors, say
				continue
			}
			slots <- struct{}{}
			e.wg.Go(func() {
				defer func() { <-slots }()
				stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
				defer stop()
				s.serveExport(ctx, l, conn)
			})
		}
	})
	return e, nil
}

func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }
