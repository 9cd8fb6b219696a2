package model

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

// nasty are values that have broken parsers before, ours or others'.
var nasty = []any{
	nil, true, 0, -1, 1 << 40, 1.5, "", " ", "\n", "a\nb", "\"", "'", "{", "}", "{{", "${x}", "include /etc/passwd", "#", "%any", "*",
	"0", "no", "null", "0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.1/8", "::ffff:1.2.3.4", "fe80::1%eth0", "1.2.3.4:99999", "[::1]:1", ":::",
	"999.999.999.999", "\x00", "\u2028", "ümläut", "../../etc", "a/b", strings.Repeat("x", 300), strings.Repeat("1.", 200), []any{}, map[string]any{},
	[]any{nil}, []any{[]any{[]any{}}}, map[string]any{"a": map[string]any{"b": []any{1}}}, map[string]any{"": ""},
	"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=", "2030-13-45T99:99:99Z", "aes256gcm16-", "-", "3des-sha1-modp1024",
}

func bad(r *rand.Rand) any { return cloneTree(nasty[r.IntN(len(nasty))]) }

// mutate changes one place of a tree: a value, a name, the presence or the order.
func mutate(r *rand.Rand, tree any) any {
	switch x := tree.(type) {
	case map[string]any:
		if len(x) == 0 || r.IntN(8) == 0 {
			x[fmt.Sprint(bad(r))] = bad(r)
			return x
		}
		keys := make([]string, 0, len(x))
		for k := range x {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		k := keys[r.IntN(len(keys))]
		switch r.IntN(12) {
		case 0:
			delete(x, k)
		case 1:
			x[k] = bad(r)
		case 2:
			x[k+"s"], x[k] = x[k], nil
		default:
			x[k] = mutate(r, x[k])
		}
		return x
	case []any:
		if len(x) == 0 || r.IntN(6) == 0 {
			return append(x, bad(r))
		}
		i := r.IntN(len(x))
		switch r.IntN(6) {
		case 0:
			return slices.Delete(x, i, i+1)
		case 1:
			return append(x, x[i])
		}
		x[i] = mutate(r, x[i])
		return x
	case string:
		if x == "" || r.IntN(3) == 0 {
			return bad(r)
		}
		i := r.IntN(len(x))
		switch r.IntN(4) {
		case 0:
			return x[:i] + x[i+1:]
		case 1:
			return x[:i] + string(rune(r.IntN(256))) + x[i:]
		case 2:
			return x[:i] + fmt.Sprint(bad(r)) + x[i:]
		}
		return x[:i] + x[i+1:] + x[i:i+1]
	}
	return bad(r)
}

// FAULTS 15: ten thousand broken manifests: no panic, and each is accepted or refused with
// a field path, in one line.
func TestTenThousandMutations(t *testing.T) {
	const n = 10000
	trees := base(t, certificates(t))
	var sound []Objects // by document
	for _, d := range trees {
		sound = append(sound, read(t, encode(t, []map[string]any{d})))
	}
	r := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for i := range n {
		target := r.IntN(len(trees))
		tree := cloneTree(trees[target]).(map[string]any)
		for range 1 + r.IntN(3) {
			tree = mutate(r, tree).(map[string]any)
		}
		text := encode(t, []map[string]any{tree})
		if r.IntN(20) == 0 { // break the text itself
			at := r.IntN(len(text))
			text = text[:at] + fmt.Sprint(bad(r)) + text[min(len(text), at+r.IntN(5)):]
		}
		objects, problems := decodeAll(text)
		for j, o := range sound {
			// Certificates take time to parse: only with a change of theirs.
			if j != target && (nameOf(trees[j]) != "Site certificate" || nameOf(trees[target]) == "Secret tls") {
				objects.Add(o.list[0])
			}
		}
		m := Parse(objects, ParseOptions{NodeName: "n", Zone: "z"})
		problems = append(problems, m.Problems...)
		if len(problems) > 0 {
			refused++
		}
		for _, p := range problems {
			checkProblem(t, fmt.Sprintf("mutation %d", i), p)
		}
		checkSane(t, i, m)
		if t.Failed() {
			t.Fatalf("mutation %d:\n%s", i, text)
		}
	}
	t.Logf("%d mutations, %d refused, the others accepted", n, refused)
	if refused < n/4 || refused == n {
		t.Errorf("%d of %d refused: the mutations do not test much", refused, n)
	}
}

// checkSane checks that nothing that was accepted can reach a configuration as more than
// one word.
func checkSane(t *testing.T, i int, m *Model) {
	t.Helper()
	check := func(s string) {
		if strings.ContainsAny(s, "\n\r\x00\"{}\\") {
			t.Errorf("mutation %d: %q was accepted", i, s)
		}
	}
	for _, g := range m.Gateways {
		check(g.ID.String() + g.Address)
		for _, s := range g.Sites {
			check(s.ID.String())
			for _, c := range s.CIDRs {
				if why := RefuseRange(c); why != "" {
					t.Errorf("mutation %d: %s was accepted, which %s", i, c, why)
				}
				if why := g.RefuseRange(c); why != "" {
					t.Errorf("mutation %d: %s was accepted, which overlaps %s", i, c, why)
				}
			}
			if x := s.IPsec; x != nil {
				check(x.Address + x.LocalAddress + x.LocalID + x.RemoteID + strings.Join(x.IKEProposals, "") + strings.Join(x.ESPProposals, ""))
			}
			if x := s.WireGuard; x != nil {
				check(x.Endpoint.Host)
			}
		}
		for _, p := range g.Ports {
			check(p.Name)
		}
	}
	for _, c := range m.RemoteClusters {
		check(c.ID.String() + c.FrontHost + c.FrontName)
	}
}

func cloneTree(v any) any {
	switch x := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(x))
		for k, e := range x {
			m[k] = cloneTree(e)
		}
		return m
	case []any:
		l := make([]any, len(x))
		for i, e := range x {
			l[i] = cloneTree(e)
		}
		return l
	}
	return v
}

// FuzzManifests looks for panics and for problems that do not fit a line.
func FuzzManifests(f *testing.F) {
	data, err := os.ReadFile("testdata/base.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, doc := range strings.Split(string(data), "\n---\n") {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		decoded, problems := Decode(doc, "fuzz.yaml:1")
		var objects Objects
		for _, d := range decoded {
			objects.Add(d)
			d.Ref()
			d.Secrets()
		}
		m := Parse(objects, ParseOptions{})
		for _, p := range append(problems, m.Problems...) {
			checkProblem(t, "fuzz", p)
		}
	})
}
