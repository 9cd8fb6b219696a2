package wireguard

import (
	"crypto/ecdh"
	"sync/atomic"

	"github.com/tailscale/wireguard-go/conn"
	wg "github.com/tailscale/wireguard-go/device"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// knock is where a handshake initiation came from, until the peer's first packet of
// another kind. The library tells it which key the initiation names, without a lock held,
// before it looks for the peer.
type knock struct {
	conn.Endpoint
	bind   *bind
	packet *[wg.MessageInitiationSize]byte

	counted bool // in bind.inside
	done    atomic.Bool
}

var _ conn.InitiationAwareEndpoint = (*knock)(nil)

// InitiationMessagePublicKey is called once the sender's key could be decrypted, which
// proves nothing: whoever knows the gateway's public key can name any.
func (k *knock) InitiationMessagePublicKey(key [32]byte) {
	k.bind.knocked(key, k.packet)
	k.taken()
}

// DstToString is asked for in words about an initiation that is of no use.
func (k *knock) DstToString() string {
	k.taken()
	return k.Endpoint.DstToString()
}

// DstToBytes is asked for to check a cookie.
func (k *knock) DstToBytes() []byte {
	k.taken()
	return k.Endpoint.DstToBytes()
}

// taken counts that the library has come to the initiation.
func (k *knock) taken() {
	if k.counted && !k.done.Swap(true) {
		k.bind.inside.Add(-1)
	}
}

// door lets in the peers that wait for their first handshake.
type door struct {
	roster atomic.Pointer[roster]
	key    atomic.Pointer[ecdh.PrivateKey] // ours
}

func (d *door) open(private wgtypes.Key) {
	if k, err := ecdh.X25519().NewPrivateKey(private[:]); err == nil {
		d.key.Store(k)
	}
}

func (d *tunDevice) admitBy(r roster) bool {
	d.door.roster.Store(&r)
	return true
}

// knocked admits a peer that waits if the initiation is its own.
func (d *tunDevice) knocked(key wgtypes.Key, packet *[wg.MessageInitiationSize]byte) {
	r, own := d.door.roster.Load(), d.door.key.Load()
	if r == nil || own == nil || !(*r).waits(key) {
		return
	}
	if genuine(own, key, packet) {
		(*r).admit(key)
	}
}

// Layout of a handshake initiation, in bytes.
const (
	ephemeralAt = 8
	staticAt    = ephemeralAt + 32
	timestampAt = staticAt + 32 + chacha20poly1305.Overhead
	timestampTo = timestampAt + 12 + chacha20poly1305.Overhead
)

// genuine tells whether a handshake initiation to our key was made by the holder of the
// peer's private key: its time stamp is sealed with what the two static keys share
// (Noise IKpsk2, first message).
func genuine(own *ecdh.PrivateKey, peer wgtypes.Key, packet *[wg.MessageInitiationSize]byte) bool {
	ephemeral := packet[ephemeralAt:staticAt]
	shared := func(with []byte) []byte {
		k, err := ecdh.X25519().NewPublicKey(with)
		if err != nil {
			return nil
		}
		s, err := own.ECDH(k)
		if err != nil { // a point of low order
			return nil
		}
		return s
	}
	es, ss := shared(ephemeral), shared(peer[:])
	if es == nil || ss == nil {
		return false
	}
	hash := mix(wg.InitialHash, own.PublicKey().Bytes())
	hash = mix(hash, ephemeral)
	hash = mix(hash, packet[staticAt:timestampAt])
	var chain, key [blake2s.Size]byte
	wg.KDF1(&chain, wg.InitialChainKey[:], ephemeral)
	wg.KDF2(&chain, &key, chain[:], es)
	wg.KDF2(&chain, &key, chain[:], ss)
	aead, err := chacha20poly1305.New(key[:])
	if err != nil {
		return false
	}
	_, err = aead.Open(nil, make([]byte, chacha20poly1305.NonceSize), packet[timestampAt:timestampTo], hash[:])
	return err == nil
}

func mix(hash [blake2s.Size]byte, data []byte) [blake2s.Size]byte {
	return blake2s.Sum256(append(hash[:], data...))
}
