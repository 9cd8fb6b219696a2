package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/rest"
)

// answers is an API server that answers each request by the time that has passed.
type answers struct {
	start time.Time
	at    func(passed time.Duration) (code int, body string)
}

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	code, body := a.at(time.Since(a.start))
	if code == 0 {
		return nil, errors.New("connection refused")
	}
	if body == "" {
		body = fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q}`, code,
			map[int]string{401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 500: "InternalError"}[code])
	}
	return &http.Response{
		StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
		Body: io.NopCloser(bytes.NewReader([]byte(body))),
	}, nil
}

// An agent that is stopped tells an uninstallation, which takes its rights first, from an API
// server that is starting and refuses everybody for a while.
func TestRemoved(t *testing.T) {
	const (
		there   = `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"culvert-agent"}}`
		leaving = `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"culvert-agent","deletionTimestamp":"2026-01-01T00:00:00Z"}}`
	)
	always := func(code int, body string) func(time.Duration) (int, string) {
		return func(time.Duration) (int, string) { return code, body }
	}
	// steps are codes by the second.
	steps := func(codes ...int) func(time.Duration) (int, string) {
		return func(passed time.Duration) (int, string) {
			code := codes[min(int(passed/time.Second), len(codes)-1)]
			if code == http.StatusOK {
				return code, there
			}
			return code, ""
		}
	}
	for name, tc := range map[string]struct {
		at      func(time.Duration) (int, string)
		removed bool
		fails   bool
		within  time.Duration
	}{
		"it is there":                     {at: always(200, there), within: time.Millisecond},
		"it is being deleted":             {at: always(200, leaving), removed: true, within: time.Millisecond},
		"it is gone":                      {at: always(404, ""), removed: true, within: time.Millisecond},
		"the rights are gone":             {at: always(403, ""), removed: true, within: 5 * time.Second},
		"the account is gone":             {at: always(401, ""), removed: true, within: 5 * time.Second},
		"the rights, then the account":    {at: steps(403, 403, 401), removed: true, within: 5 * time.Second},
		"the server is starting":          {at: steps(0, 0, 403, 403, 200), within: 5 * time.Second},
		"the server starts and stumbles":  {at: steps(401, 403, 403, 500, 403, 403, 200), within: 7 * time.Second},
		"the server restarts meanwhile":   {at: steps(403, 403, 0, 0, 0, 403, 403, 200), within: 8 * time.Second},
		"the server is away":              {at: always(0, ""), fails: true, within: removedTimeout + time.Second},
		"refused, and then away for good": {at: steps(403, 403, 0), fails: true, within: removedTimeout + time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k, err := NewKubernetes(KubernetesOptions{
					Config: &rest.Config{Host: "http://server", Transport: answers{time.Now(), tc.at}},
					Node:   "n", Namespace: "culvert-system", DaemonSet: "culvert-agent",
				})
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), removedTimeout)
				defer cancel()
				removed, err := k.Removed(ctx)
				if removed != tc.removed || (err != nil) != tc.fails {
					t.Errorf("removed: %v, %v; want %v, error: %v", removed, err, tc.removed, tc.fails)
				}
				if took := time.Since(start); took > tc.within {
					t.Errorf("it took %s, want %s at most", took, tc.within)
				}
			})
		})
	}
}
