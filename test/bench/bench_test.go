package bench

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// culvert is the program under test, peers the directory of those that hack/bench.sh builds
// from modules; empty: not built.
var culvert, peers string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv(relayEnv) != "" {
		return relayAlone()
	}
	peers = os.Getenv("BENCH_PEERS")
	if os.Geteuid() != 0 {
		return m.Run() // every test skips
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	culvert = filepath.Join(dir, "culvert")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "../../cmd/...")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build culvert: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// suites is everything that is measured; brief: for a second or so each.
func suites(brief bool) []*suite {
	return []*suite{tunnels(brief), reversed(brief), streams(brief), servicePath(brief), relays(brief), scale(brief), operator(brief), agents(brief), failover(brief), apart(brief)}
}

// rounds is how often "make bench" measures everything.
func rounds() int {
	if n, err := strconv.Atoi(os.Getenv("ROUNDS")); err == nil && n > 0 {
		return n
	}
	return 3
}

// TestBench runs what "make bench" names: ONLY=tunnels,reverse ROUNDS=5.
func TestBench(t *testing.T) {
	if os.Getenv("CULVERT_BENCH") == "" {
		t.Skip("runs in make bench only")
	}
	var only []string
	if v := os.Getenv("ONLY"); v != "" {
		only = strings.Split(v, ",")
	}
	m := thisMachine()
	m.Congestion = congestionOf(t)
	var results []*result
	for _, s := range suites(false) {
		if only != nil && !slices.Contains(only, s.name) {
			continue
		}
		r := s.result(rounds())
		results = append(results, r)
		t.Run(s.name, func(t *testing.T) { s.run(t, r) })
	}
	if len(results) == 0 {
		t.Fatalf("no suite named %q: tunnels, reverse, services, relay, scale, operator, agents, failover, ipsec", os.Getenv("ONLY"))
	}
	report(t, m, results)
}

// One short round of every suite: each candidate runs and moves bytes the way it says; no
// figure is judged.
func TestSmoke(t *testing.T) {
	labtest.Require(t, "wg", "wireguard-go", "openvpn", "swanctl", "iperf3", "haproxy", "nft")
	begin := time.Now()
	for _, s := range suites(true) {
		if len(s.contenders) == 0 {
			continue // other tests run them
		}
		t.Run(s.name, func(t *testing.T) {
			r := s.result(1)
			s.run(t, r)
			for _, c := range s.contenders {
				if _, absent := r.Absent[c.name]; absent && c.ours {
					t.Errorf("%s takes no part: %s", c.name, r.Absent[c.name])
				}
			}
			for _, name := range r.Order {
				for _, m := range s.metrics {
					for _, v := range r.Samples[name][m.figure()] {
						if v < 0 {
							t.Errorf("%s: %s is %v", name, m.name, v)
						}
					}
				}
				if len(r.Samples[name]) == 0 {
					t.Errorf("%s measured nothing", name)
				}
			}
			t.Log("\n" + r.table())
		})
	}
	t.Logf("took %s", time.Since(begin).Round(time.Second))
}

// needs says that a program is missing.
func needs(program string) func() string {
	return func() string {
		if _, err := exec.LookPath(program); err != nil {
			return "no program " + program
		}
		return ""
	}
}

// built says that a peer was not built from its module.
func built(program string) func() string {
	return func() string {
		if peers == "" {
			return "built by make bench only"
		}
		if _, err := os.Stat(filepath.Join(peers, program)); err != nil {
			return "not built: " + program
		}
		return ""
	}
}

// versions are those of the programs that take part.
func versions() map[string]string {
	out := map[string]string{}
	ask := func(name, program string, args ...string) {
		b, _ := exec.Command(program, args...).CombinedOutput()
		line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		if line != "" && len(line) < 200 {
			out[name] = line
		}
	}
	ask("culvert", "git", "describe", "--tags", "--always", "--dirty")
	ask("wireguard-go (Debian)", "dpkg-query", "-W", "-f", "${Version}", "wireguard-go")
	ask("OpenVPN", "dpkg-query", "-W", "-f", "${Version}", "openvpn")
	ask("strongSwan", "dpkg-query", "-W", "-f", "${Version}", "charon-systemd")
	ask("HAProxy", "dpkg-query", "-W", "-f", "${Version}", "haproxy")
	ask("OpenSSH", "dpkg-query", "-W", "-f", "${Version}", "openssh-server")
	if peers != "" {
		for name, module := range map[string]string{
			"wireguard-go (upstream)": "golang.zx2c4.com/wireguard", "wireguard-go (Tailscale's)": "github.com/tailscale/wireguard-go",
			"Nebula": "github.com/slackhq/nebula",
		} {
			ask(name, "go", "-C", "../../hack/bench", "list", "-m", "-f", "{{.Version}}", module)
		}
		ask("tailscaled", "go", "-C", "../../hack/bench/control", "list", "-m", "-f", "{{.Version}}", "tailscale.com")
		ask("Kubernetes (kube-proxy, API server)", "go", "-C", "../../hack/kubernetes", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	}
	return out
}
