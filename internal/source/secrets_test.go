package source

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/culvert-vpn/culvert/internal/model"
)

// vault answers Get as an API server would.
type vault struct {
	client.Reader
	err  error
	data string
}

func (v *vault) Get(_ context.Context, key client.ObjectKey, o client.Object, _ ...client.GetOption) error {
	if v.err != nil {
		return v.err
	}
	s := o.(*corev1.Secret)
	s.ObjectMeta = metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}
	s.Data = map[string][]byte{"psk": []byte(v.data)}
	return nil
}

var psk = model.Ref{Kind: model.KindSecret, ID: model.ID{Namespace: "a", Name: "psk"}}

// What an API server answers, one after the other, and what a gateway then has.
func TestSecretsByTheirNames(t *testing.T) {
	v := &vault{}
	s := newSecrets(v, slog.New(slog.DiscardHandler), func() {})
	gone := apierrors.NewNotFound(corev1.Resource("secrets"), "psk")
	forbidden := apierrors.NewForbidden(corev1.Resource("secrets"), "psk", errors.New("no role"))
	away := errors.New("connection refused")
	if got := s.want([]model.Ref{psk, psk}); len(got) != 0 || !s.pending() {
		t.Fatalf("before it is asked for: %d Secrets, pending %v", len(got), s.pending())
	}
	for i, c := range []struct {
		err     error
		data    string
		news    bool
		have    string // data; empty: no Secret
		says    string
		pending bool
	}{
		{err: away, news: true, says: "cannot be read", pending: true}, // not known: no snapshot yet
		{err: forbidden, news: true, says: "may not be read by this gateway"},
		{err: forbidden, says: "may not be read by this gateway"},
		{err: gone, news: true, says: "there is no Secret a/psk"},
		{data: "one", news: true, have: "one"},
		{data: "one", have: "one"},
		{err: away, have: "one"}, // what is known stays
		{data: "two", news: true, have: "two"},
		{err: forbidden, news: true, says: "may not be read by this gateway"}, // a right that was taken away
		{err: away, says: "cannot be read"},
		{data: "two", news: true, have: "two"},
		{err: gone, news: true, says: "there is no Secret a/psk"},
	} {
		v.err, v.data = c.err, c.data
		if news := s.get(t.Context(), psk); news != c.news {
			t.Errorf("step %d: news %v, want %v", i, news, c.news)
		}
		got := s.want([]model.Ref{psk})
		have := ""
		if len(got) == 1 {
			have = string(got[0].Data["psk"])
		}
		if have != c.have || s.pending() != c.pending {
			t.Errorf("step %d: %q, pending %v; want %q, %v", i, have, s.pending(), c.have, c.pending)
		}
		err := s.err(psk)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("step %d: error %v, want one that says %q", i, err, c.says)
		}
	}
	if s.want(nil); s.err(psk) != nil || s.get(t.Context(), psk) {
		t.Error("a Secret that nobody wants any more is still read")
	}
}
