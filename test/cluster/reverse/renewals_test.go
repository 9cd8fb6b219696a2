package reverse

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
	"github.com/culvert-vpn/culvert/internal/pki"
	"github.com/culvert-vpn/culvert/internal/reverse/wire"
	"github.com/culvert-vpn/culvert/internal/tunnel"
)

// lifetimes are those of the tenant "self".
var lifetimes = pki.Lifetimes{Leaf: 40 * time.Second, Authority: 20 * 40 * time.Second}

// oldEnds is when its first authority ends, from the moment in which its hubs may start: the
// next one is made when a fifth of its life is left, signs after twice the life of a
// certificate, and has everybody's two thirds of such a life later, all of which must be before.
const oldEnds = 180 * time.Second

// holdBack lets no pod of a tenant's hubs start before shorten.
func (p *plant) holdBack(x tenant) {
	p.t.Helper()
	p.hosting.Apply("apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: not-yet, namespace: " + x.namespace + "}\nspec: {hard: {pods: 0}}\n")
}

// shorten gives a tenant's hubs other lifetimes for certificates, and an authority from a
// backup that is about to end, and lets them start.
func (p *plant) shorten(x tenant) {
	p.t.Helper()
	hubs := "statefulset/culvert-hub-" + x.name
	labtest.Eventually(p.t, 30*time.Second, hubs, func() error {
		_, err := p.hosting.TryKubectl("-n", x.namespace, "get", hubs)
		return err
	})
	old, err := lifetimes.NewAuthority("from-a-backup", time.Now().Add(oldEnds-lifetimes.Authority))
	if err != nil {
		p.t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(old.Key)
	if err != nil {
		p.t.Fatal(err)
	}
	pair := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: old.Certificate.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	p.hosting.Apply(fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s-authority, namespace: %s}\ndata: {authority-0.pem: %s}\n",
		strings.TrimPrefix(hubs, "statefulset/"), x.namespace, base64.StdEncoding.EncodeToString(pair)))
	p.hosting.Kubectl("-n", x.namespace, "delete", "resourcequota", "not-yet")
	p.hosting.Kubectl("-n", x.namespace, "set", "env", hubs,
		"CULVERT_CERTIFICATE_LIFETIME="+lifetimes.Leaf.String(), "CULVERT_AUTHORITY_LIFETIME="+lifetimes.Authority.String())
}

// renewals is what is seen of a tenant whose certificates last for seconds.
type renewals struct {
	*opening
	began   time.Time
	mu      sync.Mutex
	seen    map[string]map[string]bool // certificates' ends, by whose they are
	stopped chan struct{}
}

// watchRenewals looks at the certificates of a tenant, and opens connections through it,
// while the other tests go on.
func (p *plant) watchRenewals(x tenant) *renewals {
	r := &renewals{opening: p.opening(x, 50*time.Millisecond), began: time.Now(), seen: map[string]map[string]bool{}, stopped: make(chan struct{})}
	go func() {
		defer close(r.stopped)
		for {
			r.look(p, x)
			select {
			case <-r.done:
				return
			case <-time.After(3 * time.Second):
			}
		}
	}()
	p.t.Cleanup(func() { r.stop(); <-r.stopped })
	return r
}

func (r *renewals) look(p *plant, x tenant) {
	text, err := p.hosting.TryKubectl("-n", x.namespace, "get", "remotecluster", x.name, "-o", "json")
	var o v1alpha1.RemoteCluster
	if err != nil || json.Unmarshal([]byte(text), &o) != nil {
		return // the next look may tell
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	note := func(who string, end string) {
		if r.seen[who] == nil {
			r.seen[who] = map[string]bool{}
		}
		r.seen[who][end] = true
	}
	for _, h := range o.Status.Hubs {
		if h.CertificateExpirationTime != nil {
			note(h.Name, h.CertificateExpirationTime.String())
		}
		for _, s := range h.Spokes {
			if s.CertificateExpirationTime != nil {
				note(s.Name, s.CertificateExpirationTime.String())
			}
		}
	}
}

// testRenewals: hubs and spokes have renewed their certificates, the egress lives with one that
// has long expired otherwise, and nobody has noticed.
func (p *plant) testRenewals(t *testing.T, r *renewals) {
	labtest.Eventually(t, 3*lifetimes.Leaf, "hubs and spokes have renewed their certificates twice", func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		renewed := 0
		for _, ends := range r.seen {
			if len(ends) > 2 {
				renewed++
			}
		}
		if renewed < 4 || time.Since(r.began) < lifetimes.Leaf {
			return fmt.Errorf("%v", r.seen)
		}
		return nil
	})
	p.succeeded(t, p.selfTenant())
	p.connected(t, p.selfTenant())
	opened, failures := r.stop()
	t.Logf("%d connections were opened in %s, with certificates that are valid for %s", opened, time.Since(r.began).Round(time.Second), lifetimes.Leaf)
	for _, f := range failures {
		t.Errorf("a new connection failed %s after the beginning: %v", f.at.Sub(r.began).Round(time.Millisecond), f.err)
	}
	logs := p.hosting.In(t).Kubectl("-n", "culvert-spoke", "logs", "-l", "app.kubernetes.io/component=spoke", "--prefix", "--tail=-1")
	own, adopted := strings.Count(logs, "certificate renewed\""), strings.Count(logs, "renewed by another one")
	t.Logf("spokes: %d renewals, %d that another one had made", own, adopted)
	if own == 0 {
		t.Errorf("no spoke tells of a renewal:\n%s", logs)
	}
}

// succeeded waits until everybody's certificate is from the second authority, which the hubs
// have made meanwhile.
func (p *plant) succeeded(t *testing.T, x tenant) {
	t.Helper()
	labtest.Eventually(t, oldEnds, "everybody has a certificate of the new authority", func() error {
		next, err := p.certificate(x.namespace, "culvert-hub-"+x.name+"-authority", `jsonpath={.data.authority-1\.pem}`, func(b []byte) []byte { return b })
		if err != nil {
			return err
		}
		// Spokes of this tenant run in the hosting cluster, too.
		for namespace, secret := range map[string]string{"culvert-spoke": "culvert-spoke-" + x.name, x.namespace: "culvert-egress-" + x.name} {
			leaf, err := p.certificate(namespace, secret, `jsonpath={.data.membership\.json}`, pairOf)
			if err != nil {
				return err
			}
			if err := leaf.CheckSignatureFrom(next); err != nil {
				return fmt.Errorf("%s: %w", secret, err)
			}
		}
		for i := range 2 {
			leaf, err := p.shownBy(x, i)
			if err != nil {
				return err
			}
			if err := leaf.CheckSignatureFrom(next); err != nil {
				return fmt.Errorf("hub %d: %w", i, err)
			}
		}
		return nil
	})
}

// certificate is one that a Secret of the hosting cluster holds; of says where in the value.
func (p *plant) certificate(namespace, secret, value string, of func([]byte) []byte) (*x509.Certificate, error) {
	out, err := p.hosting.TryKubectl("-n", namespace, "get", "secret", secret, "-o", value)
	if err != nil {
		return nil, err
	}
	b, err := base64.StdEncoding.DecodeString(out)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(of(b))
	if block == nil {
		return nil, fmt.Errorf("Secret %s: no certificate at %s", secret, value)
	}
	return x509.ParseCertificate(block.Bytes)
}

// pairOf is the certificate and key in a membership.
func pairOf(b []byte) []byte {
	var m tunnel.Membership
	_ = json.Unmarshal(b, &m)
	return []byte(m.Pair)
}

// shownBy is the certificate that a hub shows to clients.
func (p *plant) shownBy(x tenant, hub int) (leaf *x509.Certificate, err error) {
	address, err := p.hosting.TryKubectl("-n", x.namespace, "get", "service", fmt.Sprintf("culvert-hub-%s-%d", x.name, hub), "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		return nil, err
	}
	err = p.hosting.Nodes[0].Do(func() error {
		config := &tls.Config{
			InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPNHTTP},
			VerifyConnection: func(s tls.ConnectionState) error { leaf = s.PeerCertificates[0]; return nil },
		}
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 3 * time.Second}, "tcp", net.JoinHostPort(address, "8132"), config)
		if err == nil {
			err = c.Close()
		}
		if leaf != nil {
			return nil // without a certificate of ours nothing more was to be had
		}
		return errors.Join(err, errors.New("it showed no certificate"))
	})
	return leaf, err
}
