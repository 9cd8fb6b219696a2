package wireguard

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// writeUAPI renders a configuration in WireGuard's cross-platform configuration protocol
// (https://www.wireguard.com/xplatform/). The text holds keys: it must not be logged.
func writeUAPI(cfg wgtypes.Config) io.Reader {
	var b bytes.Buffer
	key := func(name string, k wgtypes.Key) { fmt.Fprintf(&b, "%s=%x\n", name, k[:]) }
	if cfg.PrivateKey != nil {
		key("private_key", *cfg.PrivateKey)
	}
	if cfg.ListenPort != nil {
		fmt.Fprintf(&b, "listen_port=%d\n", *cfg.ListenPort)
	}
	if cfg.FirewallMark != nil {
		fmt.Fprintf(&b, "fwmark=%d\n", *cfg.FirewallMark)
	}
	for i := range cfg.Peers {
		p := &cfg.Peers[i]
		key("public_key", p.PublicKey)
		if p.Remove {
			b.WriteString("remove=true\n")
			continue
		}
		if p.UpdateOnly {
			b.WriteString("update_only=true\n")
		}
		if p.PresharedKey != nil {
			key("preshared_key", *p.PresharedKey)
		}
		if p.Endpoint != nil {
			fmt.Fprintf(&b, "endpoint=%s\n", addrPort(p.Endpoint))
		}
		if p.ReplaceAllowedIPs {
			b.WriteString("replace_allowed_ips=true\n")
		}
		for _, ip := range p.AllowedIPs {
			ones, _ := ip.Mask.Size()
			fmt.Fprintf(&b, "allowed_ip=%s/%d\n", ip.IP, ones)
		}
		// Last, since it may send a packet.
		if p.PersistentKeepaliveInterval != nil {
			fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", *p.PersistentKeepaliveInterval/time.Second)
		}
	}
	return &b
}

// uapiReader is a writer that parses what a device prints in the same protocol.
type uapiReader struct {
	device *wgtypes.Device
	rest   []byte // of a line that is not complete yet
	sec    int64
	err    error // the first
}

func (r *uapiReader) Write(b []byte) (int, error) {
	n := len(b)
	for {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			r.rest = append(r.rest, b...)
			return n, nil
		}
		if len(r.rest) > 0 {
			line = append(r.rest, line...)
			r.rest = r.rest[:0]
		}
		b = rest
		name, value, _ := bytes.Cut(line, []byte("="))
		if err := r.line(name, value); err != nil && r.err == nil {
			// Never the value: it may be a key.
			r.err = fmt.Errorf("the device printed a %q that cannot be read", name)
		}
	}
}

func (r *uapiReader) line(name, value []byte) (err error) {
	d := r.device
	var p *wgtypes.Peer
	if len(d.Peers) > 0 {
		p = &d.Peers[len(d.Peers)-1]
	}
	switch string(name) {
	case "private_key":
		if d.PrivateKey, err = hexKey(value); err == nil {
			d.PublicKey = d.PrivateKey.PublicKey()
		}
		return err
	case "listen_port":
		var n int64
		n, err = number(value)
		d.ListenPort = int(n)
		return err
	case "fwmark":
		var n int64
		n, err = number(value)
		d.FirewallMark = int(n)
		return err
	case "public_key":
		k, err := hexKey(value)
		d.Peers = append(d.Peers, wgtypes.Peer{PublicKey: k})
		return err
	}
	if p == nil {
		return nil
	}
	return r.peerLine(p, name, value)
}

func (r *uapiReader) peerLine(p *wgtypes.Peer, name, value []byte) (err error) {
	switch string(name) {
	case "preshared_key":
		p.PresharedKey, err = hexKey(value)
	case "endpoint":
		var ap netip.AddrPort
		ap, err = netip.ParseAddrPort(string(value))
		p.Endpoint = net.UDPAddrFromAddrPort(ap)
	case "last_handshake_time_sec":
		r.sec, err = number(value)
	case "last_handshake_time_nsec":
		var nsec int64
		nsec, err = number(value)
		if r.sec != 0 || nsec != 0 {
			p.LastHandshakeTime = time.Unix(r.sec, nsec)
		}
	case "tx_bytes":
		p.TransmitBytes, err = number(value)
	case "rx_bytes":
		p.ReceiveBytes, err = number(value)
	case "persistent_keepalive_interval":
		var secs int64
		secs, err = number(value)
		p.PersistentKeepaliveInterval = time.Duration(secs) * time.Second
	case "allowed_ip":
		var ip netip.Prefix
		ip, err = netip.ParsePrefix(string(value))
		p.AllowedIPs = append(p.AllowedIPs, ipNets([]netip.Prefix{ip})...)
	}
	return err
}

var errNumber, errKey = errors.New("not a number"), errors.New("not a key")

// number reads a decimal number without an allocation: a device prints several per peer.
func number(b []byte) (n int64, err error) {
	if len(b) == 0 || len(b) > 18 {
		return 0, errNumber
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, errNumber
		}
		n = 10*n + int64(c-'0')
	}
	return n, nil
}

func hexKey(b []byte) (k wgtypes.Key, err error) {
	if len(b) != hex.EncodedLen(len(k)) {
		return k, errKey
	}
	if _, err := hex.Decode(k[:], b); err != nil {
		return k, errKey
	}
	return k, nil
}
