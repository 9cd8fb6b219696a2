package front

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strconv"

	"github.com/culvert-vpn/culvert/internal/reverse/front/preamble"
)

// Table is where connections may go: the whole routing table as a value. The zero value
// serves nobody.
type Table struct {
	Routes  []Route  `json:"routes"`
	Tenants []Tenant `json:"tenants,omitempty"`
}

// Route sends the connections for one server name to its backends.
type Route struct {
	// ServerName is the SNI, or the name of the CONNECT target: a DNS name, exactly, in any
	// case. For a hub it derives from the object's UID, so nobody can choose another's.
	ServerName string `json:"serverName"`
	// Tenant is whom the connections count for; empty: the server name itself.
	Tenant string `json:"tenant,omitempty"`
	// ConnectPort is the port that a CONNECT request must name; 0: DefaultConnectPort. It
	// has nothing to do with the backends' ports.
	ConnectPort uint16 `json:"connectPort,omitempty"`
	// Content is what may follow a CONNECT request; empty: ContentTLS.
	Content Content `json:"content,omitempty"`
	// Backends are one or more; of those that answer, the one with the fewest connections
	// is taken.
	Backends []Backend `json:"backends"`
}

// Backend is where connections are relayed to.
type Backend struct {
	// Address is "host:port": an IP address or a DNS name, which is resolved for every
	// connection.
	Address string `json:"address"`
	// ProxyProtocol is the header that the backend gets first; empty: ProxyNone.
	ProxyProtocol ProxyProtocol `json:"proxyProtocol,omitempty"`
}

// Tenant overrides the limits that hold for every tenant. In each field 0 means: as for
// every tenant.
type Tenant struct {
	Name                 string  `json:"name"`
	MaxConnections       int     `json:"maxConnections,omitempty"`       // open at a time
	ConnectionsPerSecond float64 `json:"connectionsPerSecond,omitempty"` // new ones, in the long run
	ConnectionsBurst     int     `json:"connectionsBurst,omitempty"`     // new ones, at once
}

// Content is what may follow a CONNECT request.
type Content string

// The contents.
const (
	ContentTLS Content = "TLS" // a ClientHello for the very same server name
	ContentTCP Content = "TCP" // anything, from either side: OpenVPN, SSH
)

// ProxyProtocol is a version of the PROXY protocol (haproxy.org, proxy-protocol.txt).
type ProxyProtocol string

// The versions.
const (
	ProxyNone ProxyProtocol = "None"
	ProxyV1   ProxyProtocol = "V1"
	ProxyV2   ProxyProtocol = "V2" // with the server name as PP2_TYPE_AUTHORITY
)

// DefaultConnectPort is the port that a CONNECT request must name by default.
const DefaultConnectPort = 443

// route is a Route that was checked, with everything filled in; it never changes.
type route struct {
	Route
	backends []*backend
}

// normal returns the route with everything filled in, or what is wrong with it.
func (r Route) normal(path string) (Route, error) {
	name, err := preamble.Name(r.ServerName)
	if err != nil {
		return Route{}, fmt.Errorf("%s.serverName: %w", path, err)
	}
	r.ServerName = name
	r.Tenant = cmp.Or(r.Tenant, name)
	r.ConnectPort = cmp.Or(r.ConnectPort, DefaultConnectPort)
	r.Content = cmp.Or(r.Content, ContentTLS)
	if r.Content != ContentTLS && r.Content != ContentTCP {
		return Route{}, fmt.Errorf("%s.content: %q is unknown: use %s or %s", path, r.Content, ContentTLS, ContentTCP)
	}
	if len(r.Backends) == 0 {
		return Route{}, fmt.Errorf("%s.backends: none: name at least one address", path)
	}
	r.Backends = slices.Clone(r.Backends)
	for i, b := range r.Backends {
		at := fmt.Sprintf("%s.backends[%d]", path, i)
		if b, err = b.normal(at); err != nil {
			return Route{}, err
		}
		if slices.ContainsFunc(r.Backends[:i], func(o Backend) bool { return o.Address == b.Address }) {
			return Route{}, fmt.Errorf("%s.address: %s is listed twice: remove one", at, b.Address)
		}
		r.Backends[i] = b
	}
	return r, nil
}

func (b Backend) normal(path string) (Backend, error) {
	host, port, err := net.SplitHostPort(b.Address)
	if err != nil {
		return Backend{}, fmt.Errorf("%s.address: %q: want host:port, an IPv6 address in brackets", path, b.Address)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return Backend{}, fmt.Errorf("%s.address: %q is no port: want 1 to 65535", path, port)
	}
	if net.ParseIP(host) == nil {
		if _, err := preamble.Name(host); err != nil {
			return Backend{}, fmt.Errorf("%s.address: %w", path, err)
		}
	}
	b.ProxyProtocol = cmp.Or(b.ProxyProtocol, ProxyNone)
	if !slices.Contains([]ProxyProtocol{ProxyNone, ProxyV1, ProxyV2}, b.ProxyProtocol) {
		return Backend{}, fmt.Errorf("%s.proxyProtocol: %q is unknown: use %s, %s or %s", path, b.ProxyProtocol, ProxyNone, ProxyV1, ProxyV2)
	}
	return b, nil
}

func (t Tenant) check(path string) error {
	switch {
	case t.Name == "":
		return fmt.Errorf("%s.name: missing: name the tenant as its routes do", path)
	case t.MaxConnections < 0:
		return fmt.Errorf("%s.maxConnections: %d is negative: use 0 for the default", path, t.MaxConnections)
	case !(t.ConnectionsPerSecond >= 0):
		return fmt.Errorf("%s.connectionsPerSecond: %v is negative: use 0 for the default", path, t.ConnectionsPerSecond)
	case t.ConnectionsBurst < 0:
		return fmt.Errorf("%s.connectionsBurst: %d is negative: use 0 for the default", path, t.ConnectionsBurst)
	}
	return nil
}

// normal returns the table with everything filled in, or the first thing that is wrong
// with it, with its field path.
func (t Table) normal() (Table, error) {
	out := Table{Routes: slices.Clone(t.Routes), Tenants: slices.Clone(t.Tenants)}
	names := map[string]int{}
	for i, r := range t.Routes {
		path := fmt.Sprintf("routes[%d]", i)
		r, err := r.normal(path)
		if err != nil {
			return Table{}, err
		}
		if first, found := names[r.ServerName]; found {
			return Table{}, fmt.Errorf("%s.serverName: %s is routed by routes[%d] already: remove one, or list both backends in one", path, r.ServerName, first)
		}
		names[r.ServerName] = i
		out.Routes[i] = r
	}
	return out, out.checkTenants()
}

// checkTenants says what is wrong with the tenants of a table whose routes are normal.
func (t Table) checkTenants() error {
	routed := make(map[string]bool, len(t.Routes))
	for _, r := range t.Routes {
		routed[r.Tenant] = true
	}
	listed := make(map[string]bool, len(t.Tenants))
	for i, tenant := range t.Tenants {
		path := fmt.Sprintf("tenants[%d]", i)
		if err := tenant.check(path); err != nil {
			return err
		}
		if listed[tenant.Name] {
			return fmt.Errorf("%s.name: %q is listed twice: remove one", path, tenant.Name)
		}
		if !routed[tenant.Name] {
			return fmt.Errorf("%s.name: no route has the tenant %q: correct the name or remove the entry", path, tenant.Name)
		}
		listed[tenant.Name] = true
	}
	return nil
}
