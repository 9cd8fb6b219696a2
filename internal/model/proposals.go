package model

import (
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-vpn/culvert/api/v1alpha1"
)

// What is offered when a site does not say: AES-256-GCM (RFC 5282), SHA-384 and SHA-256,
// curve25519 (RFC 8031), ecp384 (RFC 5903) and modp4096 (RFC 3526). The last ESP proposal
// is without a key exchange of its own, for peers whose rekeying has none: without it
// their tunnel would come up and break at the first rekeying.
var (
	defaultIKE = []string{"aes256gcm16-prfsha384-prfsha256-x25519-ecp384-modp4096"}
	defaultESP = []string{"aes256gcm16-x25519-ecp384-modp4096", "aes256gcm16"}
)

// use is what an algorithm is for.
type use uint8

const (
	useEncryption use = iota + 1 // without integrity
	useAEAD
	useIntegrity
	usePRF
	useKeyExchange
	useESN
)

// algorithm is a keyword of strongSwan's notation (its proposal keywords, version 5.9.8,
// and ML-KEM of 6.0).
type algorithm struct {
	use  use
	weak bool
}

var algorithms = func() map[string]algorithm {
	m := map[string]algorithm{}
	add := func(u use, weak bool, names ...string) {
		for _, n := range names {
			m[n] = algorithm{u, weak}
		}
	}
	add(useEncryption, false, "aes", "camellia")
	for _, bits := range []string{"128", "192", "256"} {
		for _, c := range []string{"aes", "camellia"} {
			add(useEncryption, false, c+bits, c+bits+"ctr")
			for _, tag := range []string{"8", "12", "16", "64", "96", "128"} {
				add(useAEAD, false, c+bits+"ccm"+tag)
			}
		}
		add(useAEAD, false, "aes"+bits+"gcm", "aes"+bits+"ccm")
		for _, tag := range []string{"8", "12", "16", "64", "96", "128"} {
			add(useAEAD, false, "aes"+bits+"gcm"+tag)
		}
	}
	add(useAEAD, false, "chacha20poly1305")
	add(useEncryption, true, "3des", "des", "null", "cast128", "blowfish", "blowfish128", "blowfish192", "blowfish256")
	add(useIntegrity, false, "sha256", "sha2_256", "sha384", "sha2_384", "sha512", "sha2_512", "aesxcbc", "aescmac")
	add(useIntegrity, true, "md5", "md5_128", "sha", "sha1", "sha1_160", "sha256_96", "sha2_256_96")
	add(usePRF, false, "prfsha256", "prfsha384", "prfsha512", "prfaesxcbc", "prfaescmac")
	add(usePRF, true, "prfmd5", "prfsha1")
	add(useKeyExchange, false, "modp2048", "modp3072", "modp4096", "modp6144", "modp8192",
		"ecp256", "ecp384", "ecp521", "ecp256bp", "ecp384bp", "ecp512bp", "curve25519", "x25519", "curve448", "x448",
		"mlkem512", "mlkem768", "mlkem1024")
	add(useKeyExchange, true, "modpnull", "modpnone", "modp768", "modp1024", "modp1024s160", "modp1536", "modp2048s224", "modp2048s256",
		"ecp192", "ecp224", "ecp224bp")
	add(useESN, false, "esn", "noesn")
	return m
}()

const (
	mostProposals      = 16
	longestProposal    = 255
	proposalExampleIKE = "aes256gcm16-prfsha384-ecp384"
	proposalExampleESP = "aes256gcm16-ecp384"
)

// proposals reads both lists.
func proposals(r *report, x *v1alpha1.IPsecProposals) (ike, esp []string) {
	const field = "spec.ipsec.proposals"
	for i, w := range x.AllowWeak {
		at := field + ".allowWeak[" + strconv.Itoa(i) + "]"
		if !algorithms[string(w)].weak {
			r.refuse(at, ReasonInvalidSpec, "%s is not the keyword of an algorithm that counts as weak: leave it out", quote(string(w)))
		}
		if slices.Contains(x.AllowWeak[:i], w) {
			r.refuse(at, ReasonInvalidSpec, "%s is listed twice: leave one out", quote(string(w)))
		}
	}
	list := func(field string, in []v1alpha1.Proposal, fallback []string, esp bool) []string {
		if len(in) == 0 {
			return slices.Clone(fallback)
		}
		atMost(r, field, len(in), mostProposals)
		out := make([]string, len(in))
		for i, s := range in {
			at := field + "[" + strconv.Itoa(i) + "]"
			proposal(r, at, string(s), esp, x.AllowWeak)
			if slices.Contains(in[:i], s) {
				r.refuse(at, ReasonInvalidSpec, "%s is listed twice: leave one out", quote(string(s)))
			}
			out[i] = string(s)
		}
		return out
	}
	return list(field+".ike", x.IKE, defaultIKE, false), list(field+".esp", x.ESP, defaultESP, true)
}

// proposal checks one set of algorithms: its words, its strength, and whether it is whole.
func proposal(r *report, field, s string, esp bool, allow []v1alpha1.WeakAlgorithm) {
	example := proposalExampleIKE
	if esp {
		example = proposalExampleESP
	}
	if len(s) > longestProposal {
		r.refuse(field, ReasonInvalidSpec, "has %d bytes: write at most %d, such as %s", len(s), longestProposal, example)
		return
	}
	var has [useESN + 1]string
	for word := range strings.SplitSeq(s, "-") {
		a, ok := algorithms[withoutRound(word)]
		if !ok {
			r.refuse(field, ReasonInvalidSpec, "%s in %s is not an algorithm that is known: write strongSwan's keywords joined by '-', such as %s", quote(word), quote(s), example)
			return
		}
		if a.weak && !slices.Contains(allow, v1alpha1.WeakAlgorithm(withoutRound(word))) {
			r.refuse(field, ReasonWeakAlgorithm, "%s in %s is weak: use %s, or, when the peer knows no better, list %s in spec.ipsec.proposals.allowWeak", word, quote(s), example, withoutRound(word))
		}
		has[a.use] = word
	}
	if wrong := incomplete(has, esp); wrong != "" {
		r.refuse(field, ReasonInvalidSpec, "%s %s: write one such as %s", quote(s), wrong, example)
	}
}

// incomplete says what a proposal with these words lacks or has too much of; "" when it is
// whole.
func incomplete(has [useESN + 1]string, esp bool) string {
	switch {
	case has[useEncryption] == "" && has[useAEAD] == "":
		return "names no encryption"
	case has[useEncryption] != "" && has[useAEAD] != "":
		return "mixes " + has[useAEAD] + ", which has its own integrity, with " + has[useEncryption] + ": make two proposals of it"
	case has[useEncryption] != "" && has[useIntegrity] == "":
		return "has no integrity algorithm beside " + has[useEncryption]
	case has[useAEAD] != "" && has[useIntegrity] != "" && esp:
		return "has " + has[useIntegrity] + " beside " + has[useAEAD] + ", which has its own integrity"
	case !esp && has[useAEAD] != "" && has[usePRF] == "":
		return "has no pseudo-random function beside " + has[useAEAD]
	case !esp && has[useKeyExchange] == "":
		return "names no key exchange"
	case esp && has[usePRF] != "":
		return "has " + has[usePRF] + ", which only IKE uses"
	case !esp && has[useESN] != "":
		return "has " + has[useESN] + ", which only ESP uses"
	}
	return ""
}

// withoutRound takes off the number of an additional key exchange (RFC 9370), "ke1_".
func withoutRound(word string) string {
	if len(word) > 4 && word[:2] == "ke" && word[2] >= '1' && word[2] <= '7' && word[3] == '_' {
		if rest := word[4:]; algorithms[rest].use == useKeyExchange {
			return rest
		}
	}
	return word
}
