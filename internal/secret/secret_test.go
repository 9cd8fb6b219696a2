package secret

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestNeverPrinted(t *testing.T) {
	const material = "s3cr3t-material"
	type holder struct {
		Name string
		Key  Bytes
		Ptr  *Bytes
		Map  map[string]Bytes
	}
	b := New([]byte(material))
	h := holder{Name: "n", Key: b, Ptr: &b, Map: map[string]Bytes{"k": b}}

	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c", "%U", "%b", "%t", "%w"} {
		fmt.Fprintf(&out, verb+"\n", b)
		fmt.Fprintf(&out, verb+"\n", h)
	}
	j, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", b, "holder", h)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", b, "holder", h)
	out.Write(log.Bytes())

	hex := fmt.Sprintf("%x", material)
	for _, leak := range []string{material, hex, strings.ToUpper(hex), fmt.Sprint([]byte(material))} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("material printed as %q", leak)
		}
	}
	if !strings.Contains(string(j), Redacted) {
		t.Errorf("JSON does not say %s: %s", Redacted, j)
	}
}

func TestRevealIsACopy(t *testing.T) {
	b := New([]byte("abc"))
	b.Reveal()[0] = 'X'
	if got := string(b.Reveal()); got != "abc" {
		t.Errorf("Reveal after a change of its result = %q, want abc", got)
	}
}

func TestZero(t *testing.T) {
	var b Bytes
	if !b.IsZero() || b.String() != "" || !b.Equal(New(nil)) || b.Equal(New([]byte("x"))) {
		t.Errorf("zero value misbehaves: %q", b.String())
	}
}
