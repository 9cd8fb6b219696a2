package model

import (
	"reflect"
	"slices"
	"strings"
	"sync"
)

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
