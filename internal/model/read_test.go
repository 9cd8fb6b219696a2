package model

import (
	"fmt"
	"strings"
	"testing"

	yaml "go.yaml.in/yaml/v3"
)

// read decodes a YAML stream that must be sound.
func read(t testing.TB, text string) Objects {
	t.Helper()
	objects, problems := decodeAll(text)
	for _, p := range problems {
		t.Fatalf("decode: %s", line(p))
	}
	return objects
}

// decodeAll decodes a YAML stream; each document's origin is "test.yaml:LINE".
func decodeAll(text string) (Objects, []Problem) {
	var objects Objects
	var problems []Problem
	at := 1
	for _, doc := range strings.Split("\n"+text, "\n---\n") {
		doc = strings.TrimPrefix(doc, "\n")
		skipped := strings.Count(doc[:len(doc)-len(strings.TrimLeft(doc, " \n"))], "\n")
		decoded, p := Decode([]byte(doc), fmt.Sprintf("test.yaml:%d", at+skipped))
		for _, d := range decoded {
			objects.Add(d)
		}
		problems = append(problems, p...)
		at += strings.Count(doc, "\n") + 2
	}
	return objects, problems
}

// line is how a problem reads.
func line(p Problem) string {
	s := fmt.Sprintf("%s %s: %s: %s: %s: %s", p.Kind, p.Object, p.Origin, p.Field, p.Reason, p.Message)
	if p.Pending {
		s += " (pending)"
	}
	return s
}

// yamlTree reads a document as a tree.
func yamlTree(doc string, into *map[string]any) error { return yaml.Unmarshal([]byte(doc), into) }
