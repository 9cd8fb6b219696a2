package front

import (
	"context"
	"crypto/tls"
	"errors"

	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// certificate is the one that a spoke keeps.
func certificate(state string) (*tls.Certificate, error) {
	m, err := tunnel.FileKeeper{Dir: state}.Load(context.Background())
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, errors.New("not joined yet")
	}
	pair, err := tls.X509KeyPair([]byte(m.Pair), []byte(m.Pair))
	return &pair, err
}
