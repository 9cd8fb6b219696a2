package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// TokenLifetime is how long a token can be used to join.
const TokenLifetime = time.Hour

// Token is what the hub's side keeps of a token: enough to check it, not to use it.
type Token struct {
	Hash     []byte    `json:"hash"` // SHA-256
	Identity Identity  `json:"identity"`
	Expires  time.Time `json:"expires"`
	// Used is when somebody joined with it; zero: nobody yet.
	Used time.Time `json:"used,omitzero"`
	// Key is the SHA-256 of the certificate request that it was used for.
	Key []byte `json:"key,omitempty"`
}

var encoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// NewToken makes a token for an owner to be; text is what the owner is given.
func NewToken(id Identity, now time.Time) (text string, t Token, err error) {
	if err := id.Check(); err != nil {
		return "", Token{}, err
	}
	var b [20]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", Token{}, err
	}
	text = strings.ToLower(encoding.EncodeToString(b[:]))
	return text, Token{Hash: hash([]byte(text)), Identity: id, Expires: now.Add(TokenLifetime)}, nil
}

func hash(b []byte) []byte {
	h := sha256.Sum256(b)
	return h[:]
}

// ErrToken is a token that does not let in.
var ErrToken = errors.New("the token is not valid")

// Redeem uses a token for a certificate request and returns the list as it is then, to be
// kept before the certificate is given out. A token works once; the very same request may
// be repeated until it expires, in case the answer was lost.
func Redeem(list []Token, text string, csr []byte, now time.Time) (id Identity, rest []Token, err error) {
	want, key := hash([]byte(text)), hash(csr)
	for i, t := range list {
		if subtle.ConstantTimeCompare(t.Hash, want) != 1 {
			continue
		}
		again := subtle.ConstantTimeCompare(t.Key, key) == 1
		switch {
		case now.After(t.Expires):
			return Identity{}, nil, fmt.Errorf("%w: it expired at %s: run 'culvert join' again", ErrToken, t.Expires.UTC().Format(time.RFC3339))
		case !t.Used.IsZero() && !again:
			return Identity{}, nil, fmt.Errorf("%w: it was used at %s: run 'culvert join' again", ErrToken, t.Used.UTC().Format(time.RFC3339))
		}
		rest = slices.Clone(list)
		if !again {
			rest[i].Used, rest[i].Key = now, key
		}
		return t.Identity, rest, nil
	}
	return Identity{}, nil, fmt.Errorf("%w: it is not known here: run 'culvert join' again", ErrToken)
}

// PruneTokens leaves out those that expired a day ago: until then a late-comer is told so.
func PruneTokens(list []Token, now time.Time) []Token {
	return slices.DeleteFunc(slices.Clone(list), func(t Token) bool { return now.After(t.Expires.Add(24 * time.Hour)) })
}
