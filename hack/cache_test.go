// Package hack holds the scripts behind the Makefile's verbs; this is the test of what they
// share.
package hack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// script runs lines of bash that may call the functions of cache.sh.
func script(t *testing.T, env []string, lines string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", ". ./cache.sh\n"+lines)
	cmd.Env = append(cmd.Environ(), env...)
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

func entries(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, 0, len(list))
	for _, e := range list {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// Two callers at once: one builds, both find it complete.
func TestCachedOnce(t *testing.T) {
	root := t.TempDir()
	env := []string{"CULVERT_CACHE=" + root, "LOG=" + filepath.Join(t.TempDir(), "log")}
	const build = `build() { echo said; echo built >>"$LOG"; sleep 0.2; echo whole >"$1/program"; }
		d=$(cached kind key build); cat "$d/program"; [[ $d == "$CULVERT_CACHE/kind/key" ]]`
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			if out, err := script(t, env, build); err != nil || out != "whole" {
				t.Errorf("%q, %v", out, err)
			}
		})
	}
	wait.Wait()
	if out, err := script(t, env, `cat "$LOG"`); err != nil || out != "built" {
		t.Errorf("the builds: %q, %v; want one", out, err)
	}
	if got := entries(t, filepath.Join(root, "kind")); got != "key lock" {
		t.Errorf("the cache holds %s", got)
	}
}

// A build that fails, in its middle too, leaves nothing and fails the caller.
func TestCachedFails(t *testing.T) {
	for _, build := range []string{`echo half >"$1/program"; false; echo whole >"$1/program"`, `echo half >"$1/program"; exit 3`, `echo half >"$1/program"; kill $BASHPID; sleep 5`} {
		root := t.TempDir()
		out, err := script(t, []string{"CULVERT_CACHE=" + root}, "build() { "+build+"; }\nd=$(cached kind key build); echo went on")
		if err == nil || out != "" {
			t.Errorf("%s: %q, %v", build, out, err)
		}
		if got := entries(t, filepath.Join(root, "kind")); got != "lock" {
			t.Errorf("%s: the cache holds %s", build, got)
		}
	}
}

// What a killed build left, and what nothing has used for a month, goes with the next build.
func TestCachedForgets(t *testing.T) {
	root := t.TempDir()
	env := []string{"CULVERT_CACHE=" + root}
	const build = `build() { echo whole >"$1/program"; }; for key in %s; do cached kind $key build; done`
	if out, err := script(t, env, fmt.Sprintf(build, "old used")); err != nil {
		t.Fatalf("%q, %v", out, err)
	}
	for name, days := range map[string]int{"old/complete": 32, "used/complete": 29, ".build-killed": 3} {
		path := filepath.Join(root, "kind", name)
		if strings.HasPrefix(name, ".") {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		then := time.Now().AddDate(0, 0, -days)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := script(t, env, fmt.Sprintf(build, "used new")); err != nil {
		t.Fatalf("%q, %v", out, err)
	}
	if got := entries(t, filepath.Join(root, "kind")); got != "lock new used" {
		t.Errorf("the cache holds %s", got)
	}
	if info, err := os.Stat(filepath.Join(root, "kind", "used", "complete")); err != nil || time.Since(info.ModTime()) > time.Hour {
		t.Errorf("a use leaves no trace: %v, %v", info.ModTime(), err)
	}
}

func TestCacheRoot(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	checkout, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"CULVERT_CACHE=" + dir + "/own", "XDG_CACHE_HOME=" + dir + "/xdg", "HOME=" + dir + "/home", "GOCACHE=" + dir + "/go/build"}
	none := []string{"CULVERT_CACHE=", "XDG_CACHE_HOME=", "HOME=", "GOCACHE=off"}
	for _, test := range []struct {
		env  []string
		want string
	}{
		{all, dir + "/own"},
		{[]string{"CULVERT_CACHE=", all[1], all[2], all[3]}, dir + "/xdg/culvert"},
		{[]string{"CULVERT_CACHE=", "XDG_CACHE_HOME=", all[2], all[3]}, dir + "/home/.cache/culvert"},
		{[]string{"CULVERT_CACHE=", "XDG_CACHE_HOME=", "HOME=", all[3]}, dir + "/go/culvert"},
		{[]string{"CULVERT_CACHE=" + file, "XDG_CACHE_HOME=relative", all[2], all[3]}, dir + "/home/.cache/culvert"},
		{none, checkout + "/.cache"},
	} {
		if got, err := script(t, test.env, "cache_root"); err != nil || got != test.want {
			t.Errorf("%s: %q, %v; want %s", test.env, got, err, test.want)
		}
	}
}
