package bench

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/test/strongswan"
)

func newKey(t testing.TB) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// end is one side of a pair.
type end struct {
	name                      string
	host                      *labtest.Host
	own, peer, outer, towards string
	key                       wgtypes.Key
}

func (p *pair) ends() [2]end {
	return [2]end{
		{"a", p.a, innerA, innerB, outerA, outerB, newKey(p.t)},
		{"b", p.b, innerB, innerA, outerB, outerA, newKey(p.t)},
	}
}

// culvertPair is two gateways that are sites of each other; the inner addresses are the
// hosts' own, which an operator calls nodes.
func culvertPair(kind string) func(p *pair) {
	return func(p *pair) {
		ends := p.ends()
		for i, e := range ends {
			e.host.IP("addr", "add", e.own+"/32", "dev", "lo")
			site := fmt.Sprintf("  wireguard: {publicKey: %s, endpoint: %q}\n", ends[1-i].key.PublicKey(), e.towards+":51820")
			if kind == "ipsec" {
				site = fmt.Sprintf("  ipsec: {address: %s, localID: %s.example.com, remoteID: %s.example.com, auth: {presharedKeySecretRef: {name: psk, key: psk}}}\n",
					e.towards, e.name, ends[1-i].name)
			}
			p.write(e.name+"/manifests/all.yaml", `apiVersion: culvert.dev/v1alpha1
kind: VPNGateway
metadata: {name: bench, namespace: default}
spec:
  cluster: {podCIDRs: [10.200.0.0/16], nodeCIDRs: [`+e.own+`/32]}
  expose: {type: None}
---
apiVersion: culvert.dev/v1alpha1
kind: Site
metadata: {name: peer, namespace: default}
spec:
  gatewayRef: {name: bench}
  cidrs: [`+e.peer+`/32]
  access: {to: [Pods, Nodes]}
`+site+`---
apiVersion: v1
kind: Secret
metadata: {name: psk, namespace: default}
stringData: {psk: "0123456789-0123456789-0123456789"}
`)
			p.write(e.name+"/state/wireguard.key", e.key.String()+"\n")
			p.program(e.host, culvert, "gateway", "--manifests", p.path(e.name+"/manifests"), "--state", p.path(e.name+"/state"), "--http", "127.0.0.1:9586", "--log-level", "warn")
		}
		p.link = "cvtwg0"
		if kind == "ipsec" {
			p.link = "ipsec0"
			// charon does the work: it is a child.
			labtest.Eventually(p.t, 20*time.Second, "both IKE daemons", func() error {
				var daemons []int
				for _, pid := range p.pids {
					if child := childOf(pid, "charon"); child != 0 {
						daemons = append(daemons, pid, child)
					}
				}
				if len(daemons) != 4 {
					return fmt.Errorf("%d processes", len(daemons))
				}
				p.pids = daemons
				return nil
			})
		}
		for i, e := range ends {
			labtest.Eventually(p.t, 20*time.Second, "the gateway is ready", func() error { return ready(e.host) })
			e.host.IP("route", "add", ends[i].peer+"/32", "dev", p.link, "src", e.own, "metric", "5000")
		}
	}
}

// ready asks a gateway on a host.
func ready(h *labtest.Host) error {
	out, err := h.Try("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:9586/readyz")
	if err == nil && out != fmt.Sprint(http.StatusOK) {
		err = fmt.Errorf("/readyz says %s", out)
	}
	return err
}

// childOf finds a descendant of a process by the beginning of its name; 0: there is none.
func childOf(pid int, name string) int {
	for _, c := range family([]int{pid}) {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c))
		if c != pid && strings.HasPrefix(string(comm), name) {
			return c
		}
	}
	return 0
}

// wireguardPair is wireguard-go, configured by wg(8). Its sockets are in one directory for
// all namespaces: so the links have names of their own.
func wireguardPair(which string) func(p *pair) {
	return func(p *pair) {
		program := map[string]string{"upstream": filepath.Join(peers, "wireguard"), "tailscale": filepath.Join(peers, "wireguard-go"), "debian": "wireguard-go"}[which]
		ends := p.ends()
		for i, e := range ends {
			link := fmt.Sprintf("b%s%s%d", e.name, which[:1], os.Getpid()%1000000)
			p.program(e.host, program, "-f", link)
			labtest.Eventually(p.t, 5*time.Second, "the link "+link, func() error {
				_, err := e.host.Try("wg", "show", link)
				return err
			})
			e.host.Run("wg", "setconf", link, p.write(e.name+".conf", fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\n[Peer]\nPublicKey = %s\nEndpoint = %s:51820\nAllowedIPs = %s/32\n",
				e.key, ends[1-i].key.PublicKey(), e.towards, e.peer)))
			e.host.IP("link", "set", link, "mtu", "1420")
			p.address(e.host, link, e.own, e.peer)
			p.link = link
		}
	}
}

// nebulaPair is two hosts of a Nebula network, which know each other's addresses.
func nebulaPair(p *pair) {
	cert := func(args ...string) {
		if out, err := exec.Command(filepath.Join(peers, "nebula-cert"), args...).CombinedOutput(); err != nil {
			p.t.Fatalf("nebula-cert %v: %v: %s", args, err, out)
		}
	}
	cert("ca", "-name", "bench", "-out-crt", p.path("ca.crt"), "-out-key", p.path("ca.key"))
	for _, e := range p.ends() {
		cert("sign", "-ca-crt", p.path("ca.crt"), "-ca-key", p.path("ca.key"), "-name", e.name, "-networks", e.own+"/8", "-out-crt", p.path(e.name+".crt"), "-out-key", p.path(e.name+".key"))
		conf := p.write(e.name+".yaml", fmt.Sprintf(`pki: {ca: %s, cert: %s, key: %s}
static_host_map: {"%s": ["%s:4242"]}
lighthouse: {am_lighthouse: false}
listen: {host: 0.0.0.0, port: 4242, read_buffer: 10485760, write_buffer: 10485760}
punchy: {punch: false}
tun: {dev: nebula1, mtu: 1420}
firewall:
  outbound: [{port: any, proto: any, host: any}]
  inbound: [{port: any, proto: any, host: any}]
logging: {level: warning}
`, p.path("ca.crt"), p.path(e.name+".crt"), p.path(e.name+".key"), e.peer, e.towards))
		p.program(e.host, filepath.Join(peers, "nebula"), "-config", conf)
	}
	p.link = "nebula1"
}

// openvpnPair is OpenVPN between two peers that know each other's certificates.
func openvpnPair(protocol string) func(p *pair) {
	return func(p *pair) {
		ends := p.ends()
		prints := [2]string{}
		for i, e := range ends {
			prints[i] = p.certificate(e.name)
		}
		for i, e := range ends {
			args := []string{
				"--dev", "tun0", "--ifconfig", e.own, e.peer, "--proto", protocol, "--port", "1194", "--data-ciphers", "AES-256-GCM", "--cipher", "AES-256-GCM",
				"--cert", p.path(e.name + ".crt"), "--key", p.path(e.name + ".key"), "--peer-fingerprint", prints[1-i], "--verb", "1", "--disable-dco",
				"--tun-mtu", "1420", "--txqueuelen", "1000", "--connect-retry", "1", "--persist-tun",
			}
			if protocol == "udp" {
				args = append(args, "--remote", e.towards, "--fast-io", "--sndbuf", "4194304", "--rcvbuf", "4194304")
			}
			if e.name == "b" {
				args = append(args, "--tls-server", "--dh", "none")
			} else {
				args = append(args, "--tls-client")
			}
			if protocol == "tcp" {
				args[6] = map[string]string{"a": "tcp-client", "b": "tcp-server"}[e.name]
				args = append(args, "--tcp-nodelay")
				if e.name == "a" {
					args = append(args, "--remote", e.towards, "--nobind")
					args[7], args[8] = "--rport", "1194"
				}
			}
			p.program(e.host, "openvpn", args...)
		}
		p.link = "tun0"
	}
}

// certificate makes a self-signed one and returns its fingerprint.
func (p *pair) certificate(name string) string {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		p.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.write(name+".crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	p.write(name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	sum := sha256.Sum256(der)
	var parts []string
	for _, b := range sum {
		parts = append(parts, strings.ToUpper(hex.EncodeToString([]byte{b})))
	}
	return strings.Join(parts, ":")
}

// strongswanPair is two unmodified strongSwans with ESP in user space.
func strongswanPair(p *pair) {
	for _, e := range p.ends() {
		e.host.IP("addr", "add", e.own+"/32", "dev", "lo")
		action := map[string]string{"a": "start", "b": "none"}[e.name]
		strongswan.New(p.t, e.host.Host, fmt.Sprintf(`connections {
  bench {
    version = 2
    local_addrs = %s
    remote_addrs = %s
    proposals = aes256gcm16-prfsha384-x25519
    encap = yes
    local {
      auth = psk
      id = %s.example.com
    }
    remote {
      auth = psk
    }
    children {
      net {
        local_ts = %s/32
        remote_ts = %s/32
        esp_proposals = aes256gcm16-x25519
        start_action = %s
      }
    }
  }
}
secrets {
  ike-bench {
    secret = "0123456789-0123456789-0123456789"
  }
}
`, e.outer, e.towards, e.name, e.own, e.peer, action))
		pid := charonIn(e.host)
		if pid == 0 {
			p.t.Fatalf("no charon on %s", e.name)
		}
		p.pids = append(p.pids, pid)
	}
	p.link = "ipsec0"
}

// charonIn finds the IKE daemon of a namespace; 0: there is none.
func charonIn(h *labtest.Host) int {
	out, _ := exec.Command("ip", "netns", "pids", h.Namespace).Output()
	for _, f := range strings.Fields(string(out)) {
		comm, _ := os.ReadFile("/proc/" + f + "/comm")
		if strings.HasPrefix(string(comm), "charon") {
			var n int
			_, _ = fmt.Sscan(f, &n)
			return n
		}
	}
	return 0
}
