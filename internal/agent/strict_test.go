package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/culvert-vpn/culvert/internal/guard"
)

// An agent that is removed, or believes so because it may no longer ask, leaves a strict
// guard in place.
func TestStrictGuardOutlivesTheAgent(t *testing.T) {
	for saved, want := range map[string]bool{
		"":                  false, // no NodeEncryption
		`{"Strict": false}`: false,
		`{"Strict": true}`:  true,
		"{":                 true, // unreadable
	} {
		dir := t.TempDir()
		if saved != "" {
			if err := os.WriteFile(filepath.Join(dir, guard.FileName), []byte(saved), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		e, err := newEncryption(Options{State: dir}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.strict(); got != want {
			t.Errorf("saved %q: strict %v, want %v", saved, got, want)
		}
	}
}
