package operator

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// A grant is waited for; where it never comes one device has waited for all of its namespace, and
// those of others wait as before.
func TestGrantThatNeverComes(t *testing.T) {
	forbidden := apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "phone", nil)
	other := errors.New("no route to host")
	synctest.Test(t, func(t *testing.T) {
		r := &round{}
		for _, c := range []struct {
			name, namespace string
			comes           int // in this call; 0: never
			then            error
			calls           int
			took            time.Duration
		}{
			{"it comes", "a", 3, nil, 3, 2 * grantPause},
			{"something else is wrong", "a", 1, other, 1, 0},
			{"it never comes", "gone", 0, nil, grantAttempts + 1, grantAttempts * grantPause},
			{"nor for the next one", "gone", 0, nil, 1, 0},
			{"it has come nevertheless", "gone", 1, nil, 1, 0},
			{"elsewhere it comes", "b", 5, nil, 5, 4 * grantPause},
		} {
			calls, began := 0, time.Now()
			err := r.granted(t.Context(), c.namespace, func() error {
				if calls++; calls == c.comes {
					return c.then
				}
				return forbidden
			})
			want := c.then
			if c.comes == 0 {
				want = forbidden
			}
			if took := time.Since(began); !errors.Is(err, want) || calls != c.calls || took != c.took {
				t.Errorf("%s: %v after %d calls and %s, want %v after %d and %s", c.name, err, calls, took, want, c.calls, c.took)
			}
		}
		// Whoever stops does not wait.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		if err := r.granted(ctx, "c", func() error { return forbidden }); !apierrors.IsForbidden(err) || time.Since(began) != 0 {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}
