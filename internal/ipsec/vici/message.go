package vici

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
)

// Limits of the protocol; Encode refuses what exceeds them, Decode what declares it.
const (
	MaxName    = 255       // bytes of a section's, key's or list's name
	MaxValue   = 1<<16 - 1 // bytes of a value or list item
	MaxMessage = 512 << 10 // bytes of a whole packet
	maxDepth   = 32        // sections inside sections; the daemon uses six
)

// The element types on the wire.
const (
	sectionStart = 1
	sectionEnd   = 2
	keyValue     = 3
	listStart    = 4
	listItem     = 5
	listEnd      = 6
)

// ErrMalformed is wrapped by every error of Decode.
var ErrMalformed = errors.New("malformed vici message")

// Section is a message, or a section of one: named elements in their order, each a
// value, a list of values or a section. The zero value is an empty section. A nil
// *Section may be read from: it is empty.
type Section struct{ elements []element }

type element struct {
	name    string
	kind    byte // keyValue, listStart or sectionStart
	value   string
	list    []string
	section *Section
}

// Set appends a key with its value; any bytes are allowed in it.
func (s *Section) Set(key, value string) *Section {
	s.elements = append(s.elements, element{name: key, kind: keyValue, value: value})
	return s
}

// SetList appends a list.
func (s *Section) SetList(name string, items ...string) *Section {
	s.elements = append(s.elements, element{name: name, kind: listStart, list: slices.Clone(items)})
	return s
}

// Add appends an empty section and returns it.
func (s *Section) Add(name string) *Section {
	sub := &Section{}
	s.elements = append(s.elements, element{name: name, kind: sectionStart, section: sub})
	return sub
}

func (s *Section) find(name string, kind byte) *element {
	if s == nil {
		return nil
	}
	for i := range s.elements {
		if e := &s.elements[i]; e.kind == kind && e.name == name {
			return e
		}
	}
	return nil
}

// Get returns the first value of that key, or "".
func (s *Section) Get(key string) string {
	if e := s.find(key, keyValue); e != nil {
		return e.value
	}
	return ""
}

// List returns the items of the first list of that name, or nil.
func (s *Section) List(name string) []string {
	if e := s.find(name, listStart); e != nil {
		return slices.Clone(e.list)
	}
	return nil
}

// Section returns the first section of that name, or nil.
func (s *Section) Section(name string) *Section {
	if e := s.find(name, sectionStart); e != nil {
		return e.section
	}
	return nil
}

// Sections yields every section with its name, in order.
func (s *Section) Sections() iter.Seq2[string, *Section] {
	return func(yield func(string, *Section) bool) {
		if s == nil {
			return
		}
		for _, e := range s.elements {
			if e.kind == sectionStart && !yield(e.name, e.section) {
				return
			}
		}
	}
}

// String shows the names of the elements and no value: values may be keys.
func (s *Section) String() string {
	if s == nil {
		return "{}"
	}
	names := make([]string, len(s.elements))
	for i, e := range s.elements {
		names[i] = fmt.Sprintf("%q", e.name)
		if e.kind == sectionStart {
			names[i] += e.section.String()
		}
	}
	return "{" + strings.Join(names, " ") + "}"
}

// Format answers every fmt verb with String.
func (s *Section) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(s.String())) }

// LogValue keeps values out of slog.
func (s *Section) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Encode appends the wire form of a message to b. It fails, without saying what the
// value was, when a name is empty or something exceeds its limit.
func (s *Section) Encode(b []byte) ([]byte, error) {
	if s == nil {
		return b, nil
	}
	return s.encode(b, 0)
}

func (s *Section) encode(b []byte, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("sections nested more than %d deep", maxDepth)
	}
	var err error
	for _, e := range s.elements {
		if e.name == "" || len(e.name) > MaxName {
			return nil, fmt.Errorf("name of %d bytes: 1 to %d are allowed", len(e.name), MaxName)
		}
		b = append(b, e.kind, byte(len(e.name)))
		b = append(b, e.name...)
		switch e.kind {
		case sectionStart:
			if b, err = e.section.encode(b, depth+1); err != nil {
				return nil, fmt.Errorf("%s: %w", e.name, err)
			}
			b = append(b, sectionEnd)
		case keyValue:
			if b, err = appendValue(b, e.value); err != nil {
				return nil, fmt.Errorf("%s: %w", e.name, err)
			}
		case listStart:
			for _, item := range e.list {
				if b, err = appendValue(append(b, listItem), item); err != nil {
					return nil, fmt.Errorf("%s: %w", e.name, err)
				}
			}
			b = append(b, listEnd)
		}
	}
	return b, nil
}

func appendValue(b []byte, v string) ([]byte, error) {
	if len(v) > MaxValue {
		return nil, fmt.Errorf("value of %d bytes: at most %d are allowed", len(v), MaxValue)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(v)))
	return append(b, v...), nil
}

// Decode parses the wire form of a whole message. The result shares no memory with b.
// Every error wraps ErrMalformed.
func Decode(b []byte) (*Section, error) {
	if len(b) > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrMalformed, len(b))
	}
	d := decoder{rest: b}
	s, err := d.section(0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w at byte %d", ErrMalformed, err, len(b)-len(d.rest))
	}
	return s, nil
}

type decoder struct{ rest []byte }

var errTruncated = errors.New("truncated")

func (d *decoder) take(n int) (string, error) {
	if len(d.rest) < n {
		return "", errTruncated
	}
	v := string(d.rest[:n])
	d.rest = d.rest[n:]
	return v, nil
}

func (d *decoder) kind() (byte, error) {
	v, err := d.take(1)
	if err != nil {
		return 0, err
	}
	return v[0], nil
}

func (d *decoder) name() (string, error) {
	n, err := d.kind()
	if err != nil {
		return "", err
	}
	if n == 0 {
		return "", errors.New("empty name")
	}
	return d.take(int(n))
}

func (d *decoder) value() (string, error) {
	n, err := d.take(2)
	if err != nil {
		return "", err
	}
	return d.take(int(n[0])<<8 | int(n[1]))
}

// section reads elements until the end of the section or, at depth 0, of the message.
func (d *decoder) section(depth int) (*Section, error) {
	if depth > maxDepth {
		return nil, errors.New("nested too deep")
	}
	s := &Section{}
	for depth > 0 || len(d.rest) > 0 {
		kind, err := d.kind()
		if err != nil {
			return nil, err
		}
		if kind == sectionEnd && depth > 0 {
			return s, nil
		}
		if kind != sectionStart && kind != keyValue && kind != listStart {
			return nil, fmt.Errorf("unexpected element %d", kind)
		}
		e := element{kind: kind}
		if e.name, err = d.name(); err != nil {
			return nil, err
		}
		switch kind {
		case sectionStart:
			e.section, err = d.section(depth + 1)
		case keyValue:
			e.value, err = d.value()
		case listStart:
			e.list, err = d.list()
		}
		if err != nil {
			return nil, err
		}
		s.elements = append(s.elements, e)
	}
	return s, nil
}

func (d *decoder) list() ([]string, error) {
	var items []string
	for {
		kind, err := d.kind()
		if err != nil {
			return nil, err
		}
		switch kind {
		case listEnd:
			return items, nil
		case listItem:
			v, err := d.value()
			if err != nil {
				return nil, err
			}
			items = append(items, v)
		default:
			return nil, fmt.Errorf("unexpected element %d in a list", kind)
		}
	}
}
