package model

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"time"

	yaml "go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

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
