package vici

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// The example of the protocol description, byte by byte.
func TestWireForm(t *testing.T) {
	m := &Section{}
	m.Set("key1", "value1")
	s := m.Add("section1")
	s.Add("sub-section").Set("key2", "value2")
	s.SetList("list1", "item1", "item2")
	want := "\x03\x04key1\x00\x06value1" +
		"\x01\x08section1" + "\x01\x0bsub-section" + "\x03\x04key2\x00\x06value2" + "\x02" +
		"\x04\x05list1" + "\x05\x00\x05item1" + "\x05\x00\x05item2" + "\x06" + "\x02"
	got, err := m.Encode(nil)
	if err != nil || string(got) != want {
		t.Fatalf("encoded %q, %v\nwant %q", got, err, want)
	}
	back, err := Decode(got)
	if err != nil || !reflect.DeepEqual(back, m) {
		t.Fatalf("decoded %#v, %v", back, err)
	}
	if v := back.Section("section1").Section("sub-section").Get("key2"); v != "value2" {
		t.Errorf("key2 = %q", v)
	}
	if v := back.Section("section1").List("list1"); !reflect.DeepEqual(v, []string{"item1", "item2"}) {
		t.Errorf("list1 = %q", v)
	}
	if back.Section("none").Section("none").Get("x") != "" || back.List("key1") != nil {
		t.Error("what is not there is not empty")
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, b := range map[string]string{
		"truncated name":    "\x03\x04key",
		"truncated value":   "\x03\x01k\x00\x06val",
		"no value":          "\x03\x01k",
		"empty name":        "\x03\x00\x00\x00",
		"open section":      "\x01\x01s",
		"open list":         "\x04\x01l\x05\x00\x01x",
		"section end alone": "\x02",
		"list item alone":   "\x05\x00\x01x",
		"key in a list":     "\x04\x01l\x03\x01k\x00\x00\x06",
		"unknown element":   "\x09",
		"too deep":          strings.Repeat("\x01\x01s", maxDepth+1) + strings.Repeat("\x02", maxDepth+1),
		"too long":          strings.Repeat("\x03\x01k\x00\x00", MaxMessage/5+1),
	} {
		if s, err := Decode([]byte(b)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxValue+1)
	for name, m := range map[string]*Section{
		"empty name": (&Section{}).Set("", "secret"),
		"long name":  (&Section{}).Set(strings.Repeat("n", 256), "secret"),
		"long value": (&Section{}).Set("k", long),
		"long item":  (&Section{}).SetList("k", "secret", long),
	} {
		if _, err := m.Encode(nil); err == nil || strings.Contains(err.Error(), "secret") || len(err.Error()) > 200 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (packet{kind: cmdRequest, name: "x", message: make([]byte, MaxMessage)}).encode(); err == nil {
		t.Error("a packet above the limit was encoded")
	}
}

func TestValuesAreNotPrinted(t *testing.T) {
	m := (&Section{}).Set("data", "hunter2").SetList("owners", "hunter2")
	m.Add("sub").Set("k", "hunter2")
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		if s := fmt.Sprintf(verb, m); strings.Contains(s, "hunter2") || strings.Contains(s, "68756e74657232") {
			t.Errorf("%s prints %s", verb, s)
		}
	}
	if s := m.LogValue().String(); strings.Contains(s, "hunter2") || !strings.Contains(s, "owners") {
		t.Errorf("slog prints %s", s)
	}
}

// Every message that can be built comes back as it was.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawSection(t, 3)
		b, err := m.Encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		back, err := Decode(b)
		if err != nil {
			t.Fatalf("%v of %q", err, b)
		}
		if !reflect.DeepEqual(back, m) {
			t.Fatalf("%q came back as another message", b)
		}
	})
}

func drawSection(t *rapid.T, depth int) *Section {
	s := &Section{}
	name := rapid.StringOfN(rapid.Rune(), 1, 20, MaxName)
	for range rapid.IntRange(0, 4).Draw(t, "elements") {
		n := name.Draw(t, "name")
		switch rapid.IntRange(0, 2).Draw(t, "kind") {
		case 0:
			s.Set(n, string(rapid.SliceOf(rapid.Byte()).Draw(t, "value")))
		case 1:
			s.SetList(n, rapid.SliceOfN(rapid.String(), 1, 5).Draw(t, "list")...)
		case 2:
			if depth > 0 {
				*s.Add(n) = *drawSection(t, depth-1)
			}
		}
	}
	return s
}

// What decodes encodes to the same bytes, and nothing makes the parser panic.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		"", "\x03\x04key1\x00\x06value1", "\x01\x01s\x03\x01k\x00\x01v\x02",
		"\x04\x01l\x05\x00\x01x\x05\x00\x00\x06", "\x02", "\x01\x01s", "\x03\xff", "\x05\x00\x01x",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := decodePacket(b); err == nil {
			again, err := p.encode()
			if err == nil && string(again[4:]) != string(b) {
				t.Fatalf("packet %q became %q", b, again)
			}
		}
		m, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error %v", err)
			}
			return
		}
		again, err := m.Encode(nil)
		if err != nil || string(again) != string(b) {
			t.Fatalf("%q became %q, %v", b, again, err)
		}
	})
}
