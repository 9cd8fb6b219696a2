package model

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	yaml "go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// walker checks a YAML tree against a Go type and writes it as JSON. What passes the walk
// can be unmarshalled into the type.
type walker struct {
	d      *decoder
	ours   bool // strict about unknown fields
	kind   string
	id     ID
	failed bool
	json   []byte
}

// path is a field path, from the leaf to the root, so that it costs nothing when all is
// well.
type path struct {
	parent *path
	name   string // empty: index
	index  int
}

func (p *path) String() string {
	if p == nil {
		return ""
	}
	if p.name == "" {
		return p.parent.String() + "[" + strconv.Itoa(p.index) + "]"
	}
	name := p.name
	if strings.ContainsAny(name, ".[] ") || hasControl(name) || len(name) > longest {
		name = "[" + quote(name) + "]"
		return p.parent.String() + name
	}
	if p.parent == nil {
		return name
	}
	return p.parent.String() + "." + name
}

func (w *walker) refuse(n *yaml.Node, at *path, reason, format string, args ...any) {
	w.failed = true
	w.d.problems = append(w.d.problems, Problem{
		Kind: w.kind, Object: w.id, Origin: w.d.at(n), Field: at.String(),
		Reason: reason, Message: oneLine(fmt.Sprintf(format, args...)),
	})
}

var (
	timeType      = reflect.TypeFor[metav1.Time]()
	microTimeType = reflect.TypeFor[metav1.MicroTime]()
	unmarshaler   = reflect.TypeFor[json.Unmarshaler]()
	bytesType     = reflect.TypeFor[[]byte]()
)

func (w *walker) walk(n *yaml.Node, t reflect.Type, at *path, depth int) {
	switch {
	case depth > maximumDepth:
		w.refuse(n, at, ReasonInvalidManifest, "is nested more than %d levels deep: no object needs that", maximumDepth)
		return
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		w.refuse(n, at, ReasonInvalidManifest, "uses a YAML anchor or alias: write the value out")
		return
	case isNull(n):
		w.json = append(w.json, "null"...)
		return
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == timeType, t == microTimeType:
		w.time(n, at, t)
		return
	case reflect.PointerTo(t).Implements(unmarshaler), t.Kind() == reflect.Interface:
		w.free(n, at, depth) // IntOrString, Quantity, managed fields
		return
	case t == bytesType:
		w.base64(n, at)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		w.object(n, t, at, depth)
	case reflect.Map:
		w.mapping(n, t, at, depth)
	case reflect.Slice:
		w.list(n, t, at, depth)
	default:
		w.scalar(n, t, at)
	}
}

func (w *walker) object(n *yaml.Node, t reflect.Type, at *path, depth int) {
	if n.Kind != yaml.MappingNode {
		w.refuse(n, at, ReasonInvalidManifest, "must be an object with fields, not %s", describe(n))
		return
	}
	fields := fieldsOf(t)
	w.pairs(n, at, func(name string, key, value *yaml.Node, at *path) bool {
		ft, ok := fields[name]
		if !ok {
			if w.ours {
				w.refuse(key, at, ReasonUnknownField, "is not a field that is known%s", suggestion(name, fields))
			}
			return false
		}
		w.key(name)
		w.walk(value, ft, at, depth+1)
		return true
	})
}

func (w *walker) mapping(n *yaml.Node, t reflect.Type, at *path, depth int) {
	if n.Kind != yaml.MappingNode {
		w.refuse(n, at, ReasonInvalidManifest, "must be a mapping, not %s", describe(n))
		return
	}
	w.pairs(n, at, func(name string, _, value *yaml.Node, at *path) bool {
		w.key(name)
		w.walk(value, t.Elem(), at, depth+1)
		return true
	})
}

// pairs calls each for the pairs of a mapping, and writes the commas between what it wrote.
func (w *walker) pairs(n *yaml.Node, at *path, each func(name string, key, value *yaml.Node, at *path) bool) {
	w.json = append(w.json, '{')
	comma := false
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		child := &path{parent: at, name: key.Value}
		if key.Value == "" {
			child = &path{parent: at, name: " "}
		}
		if key.Kind != yaml.ScalarNode || key.Anchor != "" || key.Tag == "!!merge" {
			w.refuse(key, at, ReasonInvalidManifest, "has a key that is not plain text: write field names only, without anchors and merges")
			continue
		}
		if seen[key.Value] {
			w.refuse(key, child, ReasonInvalidManifest, "is there twice: leave one of them out")
			continue
		}
		seen[key.Value] = true
		if comma {
			w.json = append(w.json, ',')
		}
		comma = each(key.Value, key, value, child) || comma
		if l := len(w.json); l > 0 && w.json[l-1] == ',' {
			w.json, comma = w.json[:l-1], true
		}
	}
	w.json = append(w.json, '}')
}

func (w *walker) list(n *yaml.Node, t reflect.Type, at *path, depth int) {
	if n.Kind != yaml.SequenceNode {
		w.refuse(n, at, ReasonInvalidManifest, "must be a list, not %s: begin each entry with '- ', or use [brackets]", describe(n))
		return
	}
	w.json = append(w.json, '[')
	for i, item := range n.Content {
		if i > 0 {
			w.json = append(w.json, ',')
		}
		at := &path{parent: at, index: i}
		if isNull(item) {
			w.refuse(item, at, ReasonInvalidManifest, "is empty: write a value, or remove the entry")
			continue
		}
		w.walk(item, t.Elem(), at, depth+1)
	}
	w.json = append(w.json, ']')
}

func (w *walker) scalar(n *yaml.Node, t reflect.Type, at *path) {
	if n.Kind != yaml.ScalarNode {
		w.refuse(n, at, ReasonInvalidManifest, "must be %s, not %s", wanted(t), describe(n))
		return
	}
	switch t.Kind() {
	case reflect.String:
		if n.Tag != "!!str" && n.Tag != "!!timestamp" {
			w.refuse(n, at, ReasonInvalidManifest, "must be text, and YAML reads %s as %s: put it into quotes", quote(n.Value), describe(n))
			return
		}
		w.text(n.Value)
	case reflect.Bool:
		v, ok := truth(n)
		if !ok {
			w.refuse(n, at, ReasonInvalidManifest, "must be true or false, not %s", describe(n))
			return
		}
		w.json = strconv.AppendBool(w.json, v)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v, err := strconv.ParseInt(n.Value, 10, t.Bits())
		if n.Tag != "!!int" || err != nil && !isNumberRange(err) || strings.HasPrefix(n.Value, "+") || len(n.Value) > 1 && n.Value[0] == '0' {
			w.refuse(n, at, ReasonInvalidManifest, "must be a whole number without quotes, not %s", describe(n))
			return
		}
		if err != nil {
			w.refuse(n, at, ReasonInvalidManifest, "%s is too large or too small for this field", quote(n.Value))
			return
		}
		w.json = strconv.AppendInt(w.json, v, 10)
	default:
		w.free(n, at, 0)
	}
}

func isNumberRange(err error) bool { return strings.HasSuffix(err.Error(), strconv.ErrRange.Error()) }

// truth also knows YAML 1.1's other words for true and false, as kubectl does.
func truth(n *yaml.Node) (v, ok bool) {
	if n.Tag == "!!bool" {
		return strings.EqualFold(n.Value, "true"), true
	}
	if n.Tag != "!!str" || n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		return false, false
	}
	switch n.Value {
	case "y", "Y", "yes", "Yes", "YES", "on", "On", "ON":
		return true, true
	case "n", "N", "no", "No", "NO", "off", "Off", "OFF":
		return false, true
	}
	return false, false
}

func (w *walker) time(n *yaml.Node, at *path, t reflect.Type) {
	if n.Kind == yaml.ScalarNode {
		layout := time.RFC3339
		if t == microTimeType {
			layout = metav1.RFC3339Micro
		}
		if v, err := time.Parse(layout, n.Value); err == nil && v.Year() >= 1 && v.Year() <= 9999 {
			w.text(n.Value)
			return
		}
	}
	w.refuse(n, at, ReasonInvalidManifest, "must be a time such as 2026-12-31T23:59:59Z, not %s", describe(n))
}

func (w *walker) base64(n *yaml.Node, at *path) {
	if n.Kind != yaml.ScalarNode {
		w.refuse(n, at, ReasonInvalidManifest, "must be text in base64, not %s", describe(n))
		return
	}
	// A block scalar may break base64 into lines; encoding/json skips line ends, too.
	if _, err := base64.StdEncoding.DecodeString(n.Value); err != nil {
		w.refuse(n, at, ReasonInvalidManifest, "is not base64: encode it, or write it as it is below stringData instead of data")
		return
	}
	w.text(n.Value)
}

// free writes any tree.
func (w *walker) free(n *yaml.Node, at *path, depth int) {
	switch {
	case depth > maximumDepth:
		w.refuse(n, at, ReasonInvalidManifest, "is nested more than %d levels deep: no object needs that", maximumDepth)
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		w.refuse(n, at, ReasonInvalidManifest, "uses a YAML anchor or alias: write the value out")
	case n.Kind == yaml.MappingNode:
		w.pairs(n, at, func(name string, _, value *yaml.Node, at *path) bool {
			w.key(name)
			w.free(value, at, depth+1)
			return true
		})
	case n.Kind == yaml.SequenceNode:
		w.json = append(w.json, '[')
		for i, item := range n.Content {
			if i > 0 {
				w.json = append(w.json, ',')
			}
			w.free(item, &path{parent: at, index: i}, depth+1)
		}
		w.json = append(w.json, ']')
	case isNull(n):
		w.json = append(w.json, "null"...)
	case n.Tag == "!!bool":
		v, _ := truth(n)
		w.json = strconv.AppendBool(w.json, v)
	case (n.Tag == "!!int" || n.Tag == "!!float") && json.Valid([]byte(n.Value)):
		w.json = append(w.json, n.Value...)
	default:
		w.text(n.Value)
	}
}

func (w *walker) key(name string) {
	w.text(name)
	w.json = append(w.json, ':')
}

// text writes a JSON string.
func (w *walker) text(s string) {
	plain := true
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			plain = false
			break
		}
	}
	if plain {
		w.json = append(append(append(w.json, '"'), s...), '"')
		return
	}
	b, err := json.Marshal(s)
	if err != nil { // no string makes it fail
		b = []byte(`""`)
	}
	w.json = append(w.json, b...)
}

// describe says what a node is, in words.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "an object with fields"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
	default:
		return "an alias"
	}
	switch n.Tag {
	case "!!null":
		return "nothing"
	case "!!bool":
		return "true or false"
	case "!!int":
		return "a number"
	case "!!float":
		return "a number with a fraction"
	case "!!str":
		return "text"
	case "!!timestamp":
		return "a date"
	}
	return "a value with tag " + quote(n.Tag)
}

func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	}
	return "a number"
}

var fieldCache sync.Map // reflect.Type → map[string]reflect.Type

// fieldsOf lists the JSON fields of a struct, those of embedded ones included.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	if m, ok := fieldCache.Load(t); ok {
		return m.(map[string]reflect.Type)
	}
	m := map[string]reflect.Type{}
	for i := range t.NumField() {
		f := t.Field(i)
		tag := strings.Split(f.Tag.Get("json"), ",")
		switch {
		case tag[0] == "-":
		case f.Anonymous && tag[0] == "":
			for name, ft := range fieldsOf(f.Type) {
				m[name] = ft
			}
		case f.IsExported() && tag[0] != "":
			m[tag[0]] = f.Type
		}
	}
	actual, _ := fieldCache.LoadOrStore(t, m)
	return actual.(map[string]reflect.Type)
}

// suggestion is ": did you mean x?", or the list of what there is.
func suggestion(name string, fields map[string]reflect.Type) string {
	names := make([]string, 0, len(fields))
	for f := range fields {
		names = append(names, f)
	}
	slices.Sort(names)
	best, bestDistance := "", 3
	for _, f := range names {
		if strings.EqualFold(f, name) {
			return ": write " + f
		}
		if d := distance(strings.ToLower(f), strings.ToLower(name)); d < bestDistance {
			best, bestDistance = f, d
		}
	}
	if best != "" {
		return ": did you mean " + best + "?"
	}
	const many = 12
	if len(names) > many {
		return ": remove it, or correct its indentation"
	}
	return ": remove it, or use one of " + strings.Join(names, ", ")
}

// distance is the number of letters to change, add or remove to get from a to b
// (Levenshtein); long words are far from everything.
func distance(a, b string) int {
	if len(a) > longest || len(b) > longest {
		return longest
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		previous := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := previous
			if a[i] != b[j] {
				d = 1 + min(previous, row[j], row[j+1])
			}
			previous, row[j+1] = row[j+1], d
		}
	}
	return row[len(b)]
}
