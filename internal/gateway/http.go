package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/netstate"
	"github.com/culvert-vpn/culvert/internal/plan"
	"github.com/culvert-vpn/culvert/internal/process"
)

// PublicFacts are the facts that a dry run ("culvert plan", "culvert device config")
// takes from the running gateway. They hold no secret.
type PublicFacts struct {
	PublicKey     string                    `json:"publicKey"`
	IPsecDatapath string                    `json:"ipsecDatapath"`
	UnderlayMTU   int                       `json:"underlayMTU"`
	Addresses     map[string][]netip.Addr   `json:"addresses"`           // by device, "namespace/name"
	DeviceKeys    map[string]string         `json:"deviceKeys"`          // by device
	Resolved      map[string]netip.Addr     `json:"resolved,omitempty"`  // by DNS name
	Endpoints     map[string]netip.AddrPort `json:"endpoints,omitempty"` // by public key
}

// Facts are the facts to plan with; Now is left to the caller.
func (p PublicFacts) Facts() (plan.Facts, error) {
	f := plan.Facts{
		IPsecDatapath: netstate.IPsecDatapath(p.IPsecDatapath),
		UnderlayMTU:   p.UnderlayMTU,
		Resolved:      p.Resolved,
		Addresses:     map[model.ID][]netip.Addr{},
		DeviceKeys:    map[model.ID]netstate.Key{},
		Endpoints:     map[netstate.Key]netip.AddrPort{},
	}
	var err error
	if f.PublicKey, err = netstate.ParseKey(p.PublicKey); err != nil {
		return f, fmt.Errorf("the gateway's public key: %w", err)
	}
	for id, addrs := range p.Addresses {
		f.Addresses[parseID(id)] = addrs
	}
	for id, k := range p.DeviceKeys {
		if f.DeviceKeys[parseID(id)], err = netstate.ParseKey(k); err != nil {
			return f, fmt.Errorf("public key of device %s: %w", id, err)
		}
	}
	for k, e := range p.Endpoints {
		key, err := netstate.ParseKey(k)
		if err != nil {
			return f, fmt.Errorf("public key of endpoint %s: %w", e, err)
		}
		f.Endpoints[key] = e
	}
	return f, nil
}

func parseID(s string) model.ID {
	ns, name, _ := strings.Cut(s, "/")
	return model.ID{Namespace: ns, Name: name}
}

// listen starts the servers: the Unix socket for people, the TCP address for machines.
func (g *Gateway) listen(group *process.Group) error {
	local := http.NewServeMux()
	local.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, g.Report()) })
	local.HandleFunc("GET /v1/plan", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, g.Applied()) })
	local.HandleFunc("GET /v1/facts", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, g.PublicFacts()) })
	if err := process.ServeUnix(group, g.store.Socket(), local); err != nil {
		return err
	}
	if g.opts.HTTP == "" {
		return nil
	}
	health := process.NewHealth()
	health.AddReady("applied", func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.ready
	})
	health.AddLive("loop", func() error { return stuck(time.Since(time.Unix(g.beat.Load(), 0))) })
	registry := process.NewRegistry()
	registry.MustRegister(collector{g})
	mux := http.NewServeMux()
	mux.Handle("/", process.Mux(health, registry, g.opts.PProf))
	if h := g.backing.Hello(); h != nil {
		mux.Handle("POST "+helloPath, h)
	}
	return process.ServeTCP(group, g.opts.HTTP, mux)
}

// stuckAfter is when a loop that ought to turn every second is taken for hung: well above
// the longest that one round takes (a daemon that does not answer, 10,000 peers at once).
const stuckAfter = 2 * time.Minute

// stuck says that the loop is to be restarted; nil when it turns.
func stuck(since time.Duration) error {
	if since < stuckAfter {
		return nil
	}
	return fmt.Errorf("the loop has not turned for %s", since.Round(time.Second))
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// Report is the last report.
func (g *Gateway) Report() Report {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.report
}

// Applied is the state that was applied last, as netstate.State.Lines prints it.
func (g *Gateway) Applied() []string {
	g.mu.Lock()
	state := g.applied
	g.mu.Unlock()
	return state.Lines()
}

// PublicFacts are the facts behind the state that was applied last.
func (g *Gateway) PublicFacts() PublicFacts {
	g.mu.Lock()
	facts := g.behind
	g.mu.Unlock()
	p := PublicFacts{
		PublicKey:     facts.PublicKey.String(),
		IPsecDatapath: string(facts.IPsecDatapath),
		UnderlayMTU:   facts.UnderlayMTU,
		Addresses:     plan.AddressBook(facts.Addresses),
		DeviceKeys:    map[string]string{},
		Resolved:      facts.Resolved,
		Endpoints:     map[string]netip.AddrPort{},
	}
	for id, k := range facts.DeviceKeys {
		p.DeviceKeys[id.String()] = k.String()
	}
	for k, e := range facts.Endpoints {
		p.Endpoints[k.String()] = e
	}
	return p
}
