package wireguard

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestReadUAPI(t *testing.T) {
	key := strings.Repeat("ab", 32)
	text := "private_key=" + key + "\nlisten_port=51820\nfwmark=7\npublic_key=" + key + "\npreshared_key=" + key +
		"\nendpoint=[2001:db8::1]:99\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=6\ntx_bytes=1\nrx_bytes=2\n" +
		"persistent_keepalive_interval=25\nallowed_ip=10.0.0.0/8\nallowed_ip=2001:db8::/32\npublic_key=" + key + "\n"
	for size := 1; size <= len(text); size += 7 { // however it is cut
		r := uapiReader{device: &wgtypes.Device{}}
		for b := []byte(text); len(b) > 0; {
			n := min(size, len(b))
			_, _ = r.Write(b[:n])
			b = b[n:]
		}
		if r.err != nil {
			t.Fatal(r.err)
		}
		d := r.device
		if len(d.Peers) != 2 || d.ListenPort != 51820 || d.FirewallMark != 7 || !d.Peers[1].LastHandshakeTime.IsZero() {
			t.Fatalf("%d bytes at a time: %d peers, port %d, mark %d", size, len(d.Peers), d.ListenPort, d.FirewallMark)
		}
		p := d.Peers[0]
		if addrPort(p.Endpoint) != netip.MustParseAddrPort("[2001:db8::1]:99") || !p.LastHandshakeTime.Equal(time.Unix(5, 6)) ||
			p.TransmitBytes != 1 || p.ReceiveBytes != 2 || p.PersistentKeepaliveInterval != 25*time.Second ||
			fmt.Sprint(prefixes(p.AllowedIPs)) != "[10.0.0.0/8 2001:db8::/32]" {
			t.Fatalf("%d bytes at a time: %+v", size, p.AllowedIPs)
		}
	}
}

func TestUnreadableUAPIDoesNotShowValues(t *testing.T) {
	r := uapiReader{device: &wgtypes.Device{}}
	_, _ = r.Write([]byte("private_key=topsecret\n"))
	if r.err == nil || strings.Contains(r.err.Error(), "topsecret") {
		t.Errorf("error %v", r.err)
	}
}
