package jobs_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-vpn/culvert/internal/lab/cluster"
	"github.com/culvert-vpn/culvert/internal/lab/labtest"
)

// get fetches a URL from the site's inner address.
func (s *site) get(url string, more ...string) (string, error) {
	return s.host.Try("curl", append([]string{"-s", "-S", "-m", "2", "--interface", siteHost, url}, more...)...)
}

// reachesPods wants every pod to see the site under an address.
func (s *site) reachesPods(as string, timeout time.Duration) {
	s.t.Helper()
	for node, ip := range s.pods {
		labtest.Eventually(s.t, timeout, "the site reaches the pod on "+node, func() error {
			out, err := s.get("http://" + ip + ":8080/")
			if want := "client=" + as + " pod=web-" + node; err == nil && !strings.HasPrefix(out, want) {
				err = fmt.Errorf("answer %q, want %q", out, want)
			}
			return err
		})
	}
}

// reachesService wants the service's pods to see the site under an address.
func (s *site) reachesService(as string) {
	t := s.t
	seen := map[string]bool{}
	for range 40 {
		out, err := s.get("http://" + s.web + "/")
		if err != nil || !strings.HasPrefix(out, "client="+as+" ") {
			t.Fatalf("answer %q (%v)", out, err)
		}
		seen[out] = true
	}
	if len(seen) != len(s.Nodes) {
		t.Errorf("the service led to %d of %d pods: %v", len(seen), len(s.Nodes), seen)
	}
	out, err := s.host.Try(s.TestServer(), "echo", "udp", s.web+":8081", "hello")
	if err != nil || !strings.Contains(out, "client="+as+" hello") {
		t.Errorf("over UDP: answer %q (%v)", out, err)
	}
}

// reachesReal is what an administrator tries first: names, the API server, a ping.
func (s *site) reachesReal() {
	t := s.t
	labtest.Eventually(t, 10*time.Second, "a DNS query over UDP to CoreDNS's service address", func() error {
		out, err := s.host.Try("dig", "-b", siteHost, "+time=2", "+tries=1", "+short", "@"+cluster.DNS[0].String(), "web.jobs.svc.cluster.local")
		if err == nil && strings.TrimSpace(out) != s.web {
			err = fmt.Errorf("answer %q, want %s", out, s.web)
		}
		return err
	})
	out, err := s.get("https://10.96.0.1/healthz", "-k")
	if err != nil || out != "ok" {
		t.Errorf("the API server's service: %q (%v)", out, err)
	}
	for node, ip := range s.pods {
		if out, err := s.host.Try("ping", "-c", "3", "-i", "0.2", "-W", "2", "-I", siteHost, ip); err != nil {
			t.Errorf("ping of the pod on %s: %v: %s", node, err, out)
		}
	}
}

func (s *site) podsReachSite() {
	t := s.t
	for node, ip := range s.pods {
		labtest.Eventually(t, 10*time.Second, "the pod on "+node+" reaches the site", func() error {
			out, err := s.Exec("jobs", "web-"+node, "/server", "get", "http://"+siteHost+":8080/")
			if want := "client=" + ip + " "; err == nil && !strings.HasPrefix(out, want) {
				err = fmt.Errorf("answer %q, want %q", out, want)
			}
			return err
		})
	}
}

func (s *site) bulk() {
	for node := range s.pods {
		s.transfer(node, 100<<20)
	}
}

// transfer gets bytes from the pod on a node and sends as many, and wants their hashes right.
func (s *site) transfer(node string, size int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 4*time.Minute) // a busy machine takes its time
	defer cancel()
	pod, began := "http://"+s.pods[node]+":8080", time.Now()
	local, err := s.host.Output(ctx, "sh", "-c", fmt.Sprintf("curl -sS -m 120 --interface %s '%s/bytes?n=%d' | sha256sum", siteHost, pod, size))
	if err != nil {
		s.t.Fatalf("%d bytes from the pod on %s: %v", size, node, err)
	}
	down := time.Since(began)
	sum, _, _ := strings.Cut(local, " ")
	out, err := s.host.Output(ctx, s.TestServer(), "send", pod+"/sink", strconv.Itoa(size))
	if want := fmt.Sprintf("bytes=%d sha256=%s", size, sum); err != nil || strings.TrimSpace(out) != want {
		s.t.Errorf("%d bytes to the pod on %s: %q (%v), want %q", size, node, out, err, want)
	}
	s.t.Logf("%d MiB from and to the pod on %s: %s, %s", size>>20, node, down.Round(time.Millisecond), (time.Since(began) - down).Round(time.Millisecond))
}
