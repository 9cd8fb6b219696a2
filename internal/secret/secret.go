// Package secret holds key material that must never be printed.
//
// Every way in which Go turns a value into text (fmt with any verb, log/slog,
// encoding/json, YAML through JSON) yields "[redacted]" for Bytes. The only way
// to the material is Reveal, so that a search for that word finds every use.
package secret

import (
	"crypto/subtle"
	"fmt"
	"log/slog"
	"slices"
)

// Redacted is what a secret prints as.
const Redacted = "[redacted]"

// Bytes is key material of any length. The zero value is "no secret" and prints
// as the empty string, so that "is one set?" stays visible. Compare with Equal,
// never with ==.
//
// The material is behind a pointer because fmt walks the fields of a value, without
// asking it, when the verb is wrong for it (%w outside Errorf): it then prints an
// address.
type Bytes struct{ material *[]byte }

// New copies b into a secret. A nil or empty b gives the zero value.
func New(b []byte) Bytes {
	if len(b) == 0 {
		return Bytes{}
	}
	c := slices.Clone(b)
	return Bytes{material: &c}
}

// Reveal returns a copy of the material: the caller may keep and change it. Nil when
// no secret is set.
func (b Bytes) Reveal() []byte {
	if b.material == nil {
		return nil
	}
	return slices.Clone(*b.material)
}

// IsZero reports whether no secret is set.
func (b Bytes) IsZero() bool { return b.material == nil }

// Equal compares in constant time for secrets of equal length.
func (b Bytes) Equal(o Bytes) bool {
	if b.material == o.material {
		return true
	}
	return subtle.ConstantTimeCompare(b.Reveal(), o.Reveal()) == 1
}

// String is "[redacted]", or "" when no secret is set.
func (b Bytes) String() string {
	if b.IsZero() {
		return ""
	}
	return Redacted
}

// Format answers every fmt verb, also %x, %q, %#v and those that would walk the fields.
func (b Bytes) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(b.String())) }

// LogValue keeps the material out of slog.
func (b Bytes) LogValue() slog.Value { return slog.StringValue(b.String()) }

// MarshalText keeps the material out of JSON, YAML and everything else that asks for text.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }
