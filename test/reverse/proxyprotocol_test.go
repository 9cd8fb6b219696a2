package reverse

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/hub"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
)

// A hub behind a front sees where spokes come from when it is told to believe the front's
// PROXY protocol header (--proxy-protocol-from); from the front it then takes no connection
// without one, and from others it takes the header for what it is: no TLS.
func TestHubBelievesTheFront(t *testing.T) {
	s := newSite(t)
	s.options.Addresses, s.options.ClientAddresses = []string{"192.0.2.1:9443"}, []string{"192.0.2.1:8132"}
	s.write("manifests/prod.yaml", strings.Replace(strings.Replace(manifest, "replicas: 2", "replicas: 1", 1), "namespace: default}", "namespace: default, uid: 4f5e}", 1))
	s.web(s.remote, "10.50.0.1:80")
	// The front reaches the hub from an address of its own.
	s.control.IP("addr", "add", "192.0.2.10/32", "dev", "lo")
	s.start(s.control, "hub", "--manifests", s.options.Manifests, "--state", s.options.State, "--listen-spokes", "192.0.2.1:8443", "--listen-clients", "192.0.2.1:8132",
		"--address", "192.0.2.1:9443", "--client-address", "192.0.2.1:8132", "--proxy-protocol-from", "192.0.2.1/32")
	s.write("routes.yaml", "routes: [{serverName: h0-4f5e.front.example.com, tenant: prod, backends: [{address: \"192.0.2.1:8443\", proxyProtocol: V2}]}]\n")
	s.start(s.control, "front", "--routes", s.path("routes.yaml"), "--listen", "192.0.2.1:9443", "--access-log=false")
	s.invite(pki.Spoke, "node-1", "spoke.yaml")
	s.start(s.remote, "spoke", "--join", s.path("spoke.yaml"), "--state", s.path("spoke"))
	var peers []hub.Peer
	labtest.Eventually(t, 15*time.Second, "the hub knows a spoke", func() error {
		_, body, err := s.get(s.control, "http://127.0.0.1:9587/v1/status")
		if err != nil {
			return err
		}
		if peers = peersIn(body); len(peers) == 0 {
			return fmt.Errorf("no spoke in %s", body)
		}
		return nil
	})
	if host, _, _ := strings.Cut(peers[0].From, ":"); host != "192.0.2.2" {
		t.Errorf("the hub sees the spoke at %s, want 192.0.2.2", peers[0].From)
	}

	header := "PROXY TCP4 203.0.113.99 192.0.2.1 40000 8443\r\n"
	for name, c := range map[string]struct {
		from   *labtest.Host
		send   string
		answer bool
	}{
		"the front, without a header": {s.control, "", false},
		"the front, with one":         {s.control, header, true},
		"another, with one":           {s.remote, header, false},
		"another, without":            {s.remote, "", true},
	} {
		if answered, err := s.knock(c.from, c.send); answered != c.answer {
			t.Errorf("%s: an answer: %t, %v, want %t", name, answered, err, c.answer)
		}
	}
	if _, body, err := s.get(s.control, "http://127.0.0.1:9587/v1/status"); err != nil || strings.Contains(body, "203.0.113.99") {
		t.Errorf("somebody who is no front is believed: %v, %s", err, body)
	}
}

func peersIn(body string) []hub.Peer {
	var status map[string]json.RawMessage
	_ = json.Unmarshal([]byte(body), &status)
	for _, raw := range status {
		var peers []hub.Peer
		if json.Unmarshal(raw, &peers) == nil && len(peers) > 0 && peers[0].Role == pki.Spoke {
			return peers
		}
	}
	return nil
}

// knock sends a text and then a TLS hello to the hub's port for spokes, and says whether the
// hub showed its certificate.
func (s *site) knock(from *labtest.Host, text string) (answered bool, err error) {
	var c net.Conn
	err = from.Host.Do(func() (err error) {
		c, err = net.Dial("tcp", "192.0.2.1:8443")
		return err
	})
	if err != nil {
		return false, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(7 * time.Second))
	if _, err := c.Write([]byte(text)); err != nil {
		return false, err
	}
	err = tls.Client(c, &tls.Config{
		ServerName: "h0-4f5e.front.example.com", NextProtos: []string{wire.ALPNJoin},
		InsecureSkipVerify: true, // only whether there is one
		VerifyConnection:   func(tls.ConnectionState) error { answered = true; return nil },
	}).Handshake()
	return answered, err
}
