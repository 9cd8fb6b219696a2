package cilium

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// socketTimeout is that of one call: Cilium answers a change when it has begun to load the
// endpoint's new program, which waits for what it is loading just then.
const socketTimeout = 30 * time.Second

// ErrNoEndpoint is that Cilium knows no endpoint with an address.
var ErrNoEndpoint = errors.New("Cilium knows no such endpoint")

// Socket is the API of the Cilium agent on a node, the one that cilium-dbg speaks: HTTP over a
// Unix socket (https://docs.cilium.io/en/v1.15/api/). Make it with NewSocket.
type Socket struct{ client *http.Client }

// NewSocket names the socket, usually /var/run/cilium/cilium.sock; nothing is asked before the
// first call. Cilium's agent may come and go.
func NewSocket(path string) *Socket {
	return &Socket{&http.Client{
		Timeout: socketTimeout,
		Transport: &http.Transport{MaxIdleConns: 1, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}},
	}}
}

// sourceOption is the option of an endpoint by which Cilium drops what a pod sends with an
// address that is not the pod's.
const sourceOption = "SourceIPVerification"

// localEndpoint is what is needed of Cilium's model of an endpoint.
type localEndpoint struct {
	ID     int64 `json:"id"`
	Status struct {
		Pod struct {
			Namespace string `json:"k8s-namespace"`
			Name      string `json:"k8s-pod-name"`
		} `json:"external-identifiers"`
		Realized struct {
			Options map[string]string `json:"options"`
		} `json:"realized"`
	} `json:"status"`
}

// VerifySources makes Cilium drop what a pod of this node sends with addresses that are not the
// pod's (verify, as Cilium does by itself), or let it pass. The endpoint is the one with the
// address ip, and must be the pod's. The setting holds until Cilium's agent restarts. changed
// tells that it was another one; then the endpoint's program is loaded anew, within seconds.
// The error is ErrNoEndpoint when the address is nobody's.
func (s *Socket) VerifySources(ctx context.Context, namespace, pod string, ip netip.Addr, verify bool) (changed bool, err error) {
	family := "ipv6:"
	if ip.Is4() {
		family = "ipv4:"
	}
	var e localEndpoint
	if err := s.call(ctx, http.MethodGet, "/endpoint/"+family+ip.String(), nil, &e); err != nil {
		return false, fmt.Errorf("endpoint of pod %s/%s: %w", namespace, pod, err)
	}
	if p := e.Status.Pod; p.Namespace != namespace || p.Name != pod {
		return false, fmt.Errorf("endpoint with %s is that of pod %s/%s, not of %s/%s: its sources stay verified", ip, p.Namespace, p.Name, namespace, pod)
	}
	want := "Disabled"
	if verify {
		want = "Enabled"
	}
	if e.Status.Realized.Options[sourceOption] == want {
		return false, nil
	}
	body := map[string]any{"options": map[string]string{sourceOption: want}}
	if err := s.call(ctx, http.MethodPatch, fmt.Sprintf("/endpoint/%d/config", e.ID), body, nil); err != nil {
		return false, fmt.Errorf("set %s=%s of pod %s/%s: %w", sourceOption, want, namespace, pod, err)
	}
	return true, nil
}

func (s *Socket) call(ctx context.Context, method, path string, body, answer any) error {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://cilium/v1"+path, content)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask Cilium's agent: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	switch {
	case err != nil:
		return fmt.Errorf("ask Cilium's agent: %w", err)
	case resp.StatusCode == http.StatusNotFound:
		return ErrNoEndpoint
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("Cilium's agent answers %s: %s", resp.Status, strings.TrimSpace(string(b[:min(len(b), 300)]))) //nolint:staticcheck // a name
	case answer == nil:
		return nil
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("answer of Cilium's agent: %w", err)
	}
	return nil
}
