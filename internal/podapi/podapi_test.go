package podapi

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pod makes a client of a server as a pod's files describe it.
func pod(t *testing.T, handler http.HandlerFunc) (*Client, string) {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), "token": []byte("first\n"), "namespace": []byte("team"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", u.Hostname())
	t.Setenv("KUBERNETES_SERVICE_PORT", u.Port())
	c, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c, dir
}

func TestAnswers(t *testing.T) {
	c, dir := pod(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/v1/namespaces/team/secrets/token":
			fmt.Fprintf(w, `{"said":%q,"force":%q,"type":%q}`, r.Header.Get("Authorization"), r.URL.Query().Get("force"), r.Header.Get("Content-Type"))
		case "/api/v1/namespaces/team/secrets/busy":
			w.WriteHeader(http.StatusConflict)
		case "/api/v1/namespaces/team/secrets/forbidden":
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"kind":"Status","message":"secrets \"forbidden\" is forbidden: no right"}`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	ctx := context.Background()
	var said struct{ Said, Force, Type string }
	if err := c.Get(ctx, Secret(c.Namespace(), "token"), &said); err != nil || said.Said != "Bearer first" {
		t.Errorf("%+v, %v", said, err)
	}
	// kubelet replaces tokens.
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(ctx, Secret("team", "token"), "me", true, map[string]any{}, &said); err != nil ||
		said.Said != "Bearer second" || said.Force != "true" || said.Type != "application/apply-patch+yaml" {
		t.Errorf("%+v, %v", said, err)
	}
	if err := c.Get(ctx, Secret("team", "nothing"), &said); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if err := c.Replace(ctx, Secret("team", "busy"), map[string]any{}, nil); !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
	if err := c.Get(ctx, Secret("team", "forbidden"), &said); err == nil || err.Error() != `API server: secrets "forbidden" is forbidden: no right` {
		t.Error(err)
	}
}

// A watch outlives its connections and says what it saw: there, changed, gone, and there
// again.
func TestWatch(t *testing.T) {
	var round int
	c, _ := pod(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "" {
			if round++; round == 1 {
				fmt.Fprint(w, `{"metadata":{"resourceVersion":"1"},"n":1}`)
			} else {
				w.WriteHeader(http.StatusNotFound)
			}
			return
		}
		if r.URL.Path != "/api/v1/namespaces/team/configmaps" || r.URL.Query().Get("fieldSelector") != "metadata.name=routes" {
			t.Errorf("asked for %s", r.URL)
		}
		if round == 1 {
			fmt.Fprint(w, `{"type":"MODIFIED","object":{"n":2}}{"type":"DELETED","object":{"n":2}}`)
			return // and the connection ends
		}
		fmt.Fprint(w, `{"type":"ADDED","object":{"n":3}}`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var seen []int
	c.Watch(ctx, ConfigMap("team", "routes"), func(raw json.RawMessage) {
		var o struct{ N int }
		if raw != nil && json.Unmarshal(raw, &o) != nil {
			t.Errorf("%s", raw)
		}
		seen = append(seen, o.N)
		if o.N == 3 {
			cancel()
		}
	}, func(err error) {
		if err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	if fmt.Sprint(seen) != "[1 2 0 0 3]" {
		t.Errorf("saw %v", seen)
	}
}
