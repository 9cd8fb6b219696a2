package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

type reply struct {
	code   int
	fields map[string]any
}

func call(t *testing.T, command, config string, strict, standing func() (bool, error)) reply {
	t.Helper()
	var out bytes.Buffer
	code := Call{
		Command: command, Stdin: strings.NewReader(config), Stdout: &out, Patience: 250 * time.Millisecond,
		Strict: func(dir string) (bool, error) {
			if dir != "/state" {
				t.Errorf("asked of %q", dir)
			}
			return strict()
		},
		Standing: standing,
	}.Run()
	r := reply{code, map[string]any{}}
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r.fields); err != nil {
			t.Fatalf("%s: %v", out.String(), err)
		}
	}
	return r
}

func yes() (bool, error)     { return true, nil }
func no() (bool, error)      { return false, nil }
func unknown() (bool, error) { return false, errors.New("cannot be read") }

const config = `{"cniVersion": "1.0.0", "name": "pods", "type": "culvert-cni", "stateDirectory": "/state",
"prevResult": {"cniVersion": "0.4.0", "ips": [{"address": "10.244.1.5/24"}], "dns": {}}}`

// A pod gets a network when nobody asks for a guard that drops, or when one stands; what cannot be
// found out counts as no.
func TestAdd(t *testing.T) {
	tries := 0
	later := func() (bool, error) { tries++; return tries > 2, nil }
	for _, c := range []struct {
		name             string
		strict, standing func() (bool, error)
		ok               bool
	}{
		{"nothing is encrypted, or Permissive", no, unknown, true},
		{"a guard stands", yes, yes, true},
		{"a guard stands, and the saved one cannot be read", unknown, yes, true},
		{"a guard comes", yes, later, true},
		{"no guard", yes, no, false},
		{"the saved guard cannot be read", unknown, no, false},
		{"the kernel cannot be asked", yes, unknown, false},
	} {
		r := call(t, "ADD", config, c.strict, c.standing)
		if c.ok != (r.code == 0) {
			t.Errorf("%s: exit code %d: %v", c.name, r.code, r.fields)
		}
		if c.ok && (r.fields["ips"] == nil || r.fields["cniVersion"] != "1.0.0") {
			t.Errorf("%s: what came before was lost: %v", c.name, r.fields)
		}
		if !c.ok && (r.fields["code"] != 11.0 || !strings.Contains(r.fields["msg"].(string), "culvert-agent")) {
			t.Errorf("%s: %v", c.name, r.fields)
		}
	}
}

// All other calls pass, above all DEL: a pod must be able to go.
func TestOtherCalls(t *testing.T) {
	for _, command := range []string{"DEL", "CHECK", "GC", "STATUS"} {
		if r := call(t, command, config, yes, no); r.code != 0 || len(r.fields) != 0 {
			t.Errorf("%s: %+v", command, r)
		}
	}
	if r := call(t, "VERSION", `{"cniVersion": "1.0.0"}`, yes, no); r.code != 0 || len(r.fields["supportedVersions"].([]any)) == 0 {
		t.Errorf("VERSION: %+v", r)
	}
	for _, c := range []struct {
		command, config string
		code            float64
	}{{"ADD", "{", 6}, {"ADD", `{"cniVersion": "1.0.0"}`, 7}, {"", config, 4}} {
		if r := call(t, c.command, c.config, yes, no); r.code != 1 || r.fields["code"] != c.code {
			t.Errorf("%q of %s: %+v", c.command, c.config, r)
		}
	}
}
