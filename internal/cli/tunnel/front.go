// Package tunnel is the commands of the reversed tunnel, which both programs have: the
// whole one, and the small one that links no Kubernetes client.
package tunnel

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/culvert-vpn/culvert/internal/cli/usage"
	"github.com/culvert-vpn/culvert/internal/podapi"
	"github.com/culvert-vpn/culvert/internal/process"
	"github.com/culvert-vpn/culvert/internal/reverse/front"
)

// NewFront is the command front.
func NewFront() *cobra.Command {
	var o front.RunOptions
	var log process.LogOptions
	var proxyFrom []string
	var accessLog bool
	var configMap string
	cmd := &cobra.Command{
		Use:   "front --routes FILE",
		Short: "Run the one public port that sends connections to the right hub",
		Long: `Takes TCP connections and relays each to the backend that the routing table has for its
server name. TLS clients say the name in their first message (SNI); it is not decrypted, so
that identity stays between client and backend. Clients that only speak through an HTTP
proxy (OpenVPN, curl) say it with CONNECT, on the same port: the first byte tells which.

Only addresses of the table are ever dialled, none that a client names. The table is a
YAML file, followed while the front runs; an error in it is logged and counted, and the
last good table stays. A change breaks no connection.

  routes:
  - serverName: h0-3f2a91c4.front.example.com   # exactly this name
    tenant: alpha                                # whom connections count for
    backends:                                    # the one with the fewest connections that answers
    - address: hub-alpha-0.alpha.svc:8443
      proxyProtocol: V2                          # None (default), V1 or V2
  - serverName: vpn.beta.example.com
    content: TCP             # after CONNECT anything may follow; default TLS: only a
    connectPort: 1194        # ClientHello for this very name. The port CONNECT must name: 443
    backends: [{address: "10.0.0.7:1194"}]
  tenants:                   # optional: other limits for one tenant
  - name: alpha
    maxConnections: 500
    connectionsPerSecond: 50
    connectionsBurst: 500

A refused TLS client gets the alert unrecognized_name when its name is not in the table; a
CONNECT client gets a status line that says why. Behind a load balancer that sends the PROXY
protocol name it with --proxy-protocol-from: from there a header is demanded, from elsewhere
none is believed.

On SIGTERM /readyz says no, new connections are refused after --drain-delay, and those under
way go on for --drain-timeout. A successor may listen on the same port meanwhile.`,
		Example: `  culvert front --routes routes.yaml --listen :8443 --http 127.0.0.1:9590
  culvert front --routes routes.yaml --listen :443 --listen :8132 --proxy-protocol-from 10.0.0.0/8
  curl --proxy http://front.example.com:8443 https://h0-3f2a91c4.front.example.com/`,
		Args: usage.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := routesFrom(&o, configMap)
			if err != nil {
				return err
			}
			if o.ProxyFrom, err = prefixes(proxyFrom); err != nil {
				return usage.Errorf("--proxy-protocol-from %w", err)
			}
			for name, d := range map[string]time.Duration{"--header-timeout": o.HeaderTimeout, "--handshake-timeout": o.HandshakeTimeout, "--idle-timeout": o.IdleTimeout, "--dial-timeout": o.DialTimeout} {
				if d < time.Millisecond {
					return usage.Errorf("%s %s: use at least 1ms", name, d)
				}
			}
			o.Logger, err = process.NewLogger(cmd.ErrOrStderr(), log)
			if err != nil {
				return usage.Wrap(err)
			}
			if accessLog {
				o.AccessLog = cmd.OutOrStdout()
			}
			return front.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&proxyFrom, "proxy-protocol-from", nil, "addresses or ranges of load balancers that send a PROXY protocol header (v1 or v2)")
	f.BoolVar(&accessLog, "access-log", true, "write a JSON line for every connection to standard output")
	f.StringVar(&log.Level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&log.Format, "log-format", "text", "text or json")
	f.StringVar(&configMap, "routes-configmap", "", "in a pod: ConfigMap of the pod's namespace with the routing table, followed")
	frontFlags(f, &o)
	return cmd
}

// routesFrom decides where the table comes from.
func routesFrom(o *front.RunOptions, configMap string) error {
	switch {
	case o.Routes == "" && configMap == "":
		return usage.Errorf("--routes is missing: the file with the routing table")
	case o.Routes != "" && configMap != "":
		return usage.Errorf("--routes and --routes-configmap: give one of them")
	case configMap == "":
		return nil
	}
	api, err := podapi.New("")
	if err != nil {
		return err
	}
	o.Source = front.NewConfigMap(api, configMap)
	return nil
}

// frontFlags are those that need no parsing of our own.
func frontFlags(f *pflag.FlagSet, o *front.RunOptions) {
	f.StringVar(&o.Routes, "routes", "", "file with the routing table (YAML), followed")
	f.StringArrayVar(&o.Listen, "listen", []string{":8443"}, "address:port for clients, TLS and CONNECT alike; may be given several times")
	f.DurationVar(&o.HeaderTimeout, "header-timeout", front.DefaultHeaderTimeout, "until a connection has said where to")
	f.DurationVar(&o.HandshakeTimeout, "handshake-timeout", front.DefaultHandshakeTimeout, "until a TLS client has answered the backend, from the connection's begin")
	f.DurationVar(&o.IdleTimeout, "idle-timeout", front.DefaultIdleTimeout, "a connection without a byte in either direction ends")
	f.DurationVar(&o.DialTimeout, "dial-timeout", front.DefaultDialTimeout, "for one backend, then the next is tried")
	f.IntVar(&o.MaxConnections, "max-connections", 0, "relayed at a time; 0: as many as file descriptors allow, at most 65536")
	f.IntVar(&o.MaxConnectionsPerSource, "max-connections-per-source", front.DefaultMaxConnectionsPerSource, "of one address or IPv6 /64; negative: no limit")
	f.IntVar(&o.MaxConnectionsPerTenant, "max-connections-per-tenant", front.DefaultMaxConnectionsPerTenant, "of one tenant; negative: no limit")
	f.IntVar(&o.MaxPending, "max-pending", 0, "that have not said where to; one more displaces the oldest; 0: up to 4096")
	f.IntVar(&o.MaxPendingPerSource, "max-pending-per-source", 0, "the same for one source; 0: half of --max-pending")
	f.Float64Var(&o.SourceRate, "source-rate", front.DefaultRate, "new connections a second from one source; negative: no limit")
	f.IntVar(&o.SourceBurst, "source-burst", front.DefaultBurst, "new connections at once from one source")
	f.Float64Var(&o.TenantRate, "tenant-rate", front.DefaultRate, "new connections a second of one tenant; negative: no limit")
	f.IntVar(&o.TenantBurst, "tenant-burst", front.DefaultBurst, "new connections at once of one tenant")
	f.DurationVar(&o.DrainDelay, "drain-delay", 0, "after SIGTERM: still take new connections, for load balancers to notice /readyz")
	f.DurationVar(&o.DrainTimeout, "drain-timeout", time.Minute, "then: until connections under way are reset")
	f.StringVar(&o.HTTP, "http", "127.0.0.1:9590", "address:port for /healthz, /readyz and /metrics; empty: none")
	f.BoolVar(&o.PProf, "pprof", false, "serve /debug/pprof beside the metrics")
}

// prefixes parses ranges and single addresses.
func prefixes(texts []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range texts {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			return nil, fmt.Errorf("%q: use an address or a range such as 10.0.0.0/8", s)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}
