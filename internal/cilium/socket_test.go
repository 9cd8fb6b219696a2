package cilium

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
)

// agentAPI plays Cilium's agent with one endpoint.
func agentAPI(t *testing.T) (socket string, option *string) {
	t.Helper()
	value := "Enabled"
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/endpoint/{id}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "ipv4:10.0.1.5" {
			http.Error(w, "none", http.StatusNotFound)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"id": 7, "status": map[string]any{
			"external-identifiers": map[string]string{"k8s-namespace": "vpn", "k8s-pod-name": "culvert-hq-0"},
			"realized":             map[string]any{"options": map[string]string{sourceOption: value}},
		}})
	})
	mux.HandleFunc("PATCH /v1/endpoint/7/config", func(w http.ResponseWriter, r *http.Request) {
		var body struct{ Options map[string]string }
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil || len(body.Options) != 1 {
			http.Error(w, "bad", http.StatusBadRequest)
			return
		}
		value = body.Options[sourceOption]
	})
	socket = filepath.Join(t.TempDir(), "cilium.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return socket, &value
}

func TestVerifySources(t *testing.T) {
	socket, option := agentAPI(t)
	s := NewSocket(socket)
	set := func(pod, ip string, verify bool) (bool, error) {
		return s.VerifySources(context.Background(), "vpn", pod, netip.MustParseAddr(ip), verify)
	}
	for _, step := range []struct {
		verify, changed bool
		want            string
	}{{false, true, "Disabled"}, {false, false, "Disabled"}, {true, true, "Enabled"}, {true, false, "Enabled"}} {
		changed, err := set("culvert-hq-0", "10.0.1.5", step.verify)
		if err != nil || changed != step.changed || *option != step.want {
			t.Errorf("verify %v: changed %v, %v, the option is %s; want %v, %s", step.verify, changed, err, *option, step.changed, step.want)
		}
	}
	if _, err := set("web", "10.0.1.5", false); err == nil || !strings.Contains(err.Error(), "that of pod vpn/culvert-hq-0, not of vpn/web") || *option != "Enabled" {
		t.Errorf("another pod's endpoint: %v, the option is %s", err, *option)
	}
	if _, err := set("culvert-hq-0", "10.0.1.6", false); !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("nobody's address: %v", err)
	}
	if _, err := set("culvert-hq-0", "fd00::5", false); !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("an IPv6 address: %v", err)
	}
	if _, err := NewSocket(socket+".none").VerifySources(context.Background(), "vpn", "x", netip.MustParseAddr("10.0.1.5"), false); err == nil || errors.Is(err, ErrNoEndpoint) {
		t.Errorf("without Cilium: %v", err)
	}
}
