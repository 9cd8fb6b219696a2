package ipsec

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

const memoryName = "applied.json"

// memory is what must be known about a running daemon after a restart of ours: which
// form of each connection it was given. It is written before something is changed
// (without what changes) and after, so that a crash in between leads to a reload.
type memory struct {
	Key         []byte                `json:"key"` // of the digests
	Connections map[string]remembered `json:"connections"`
	// Instance tells an external daemon from the one that took its place; empty: our own.
	Instance string `json:"instance,omitempty"`
}

type remembered struct {
	Digest string `json:"digest"`
	KeyID  string `json:"keyID,omitempty"` // the daemon's name for our private key
	// InterfaceID marks what the kernel holds for it; 0: kernel-libipsec.
	InterfaceID uint32 `json:"interfaceID,omitempty"`
}

// read starts afresh when there is no file, or none that can be read.
func (m *memory) read(path string) error {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err != nil || json.Unmarshal(b, m) != nil || len(m.Key) != 32 {
		*m = memory{Key: make([]byte, 32)}
		if _, err := rand.Read(m.Key); err != nil {
			return err
		}
	}
	if m.Connections == nil {
		m.Connections = map[string]remembered{}
	}
	return nil
}

func (m *memory) write(path string) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("remember what the IKE daemon was told: %w", err)
	}
	return os.Rename(path+".new", path)
}

// clear forgets all connections and returns their interface IDs.
func (m *memory) clear() map[uint32]bool {
	ids := map[uint32]bool{}
	for _, r := range m.Connections {
		if r.InterfaceID != 0 {
			ids[r.InterfaceID] = true
		}
	}
	m.Connections = map[string]remembered{}
	return ids
}
