package model

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"

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
