// Package source takes snapshots of objects: from a directory of manifests (package
// manifests), and from an API server.
//
// It decodes and nothing more: what the objects mean is internal/model's matter.
package source

import (
	"io"

	"github.com/culvert-vpn/culvert/internal/model"
	"github.com/culvert-vpn/culvert/internal/source/manifests"
)

// Files reads the manifests of a directory.
type Files = manifests.Files

// NewFiles reads from dir.
func NewFiles(dir string) *Files { return manifests.NewFiles(dir) }

// Decode splits a file into its documents and decodes each; origin names the file in
// messages.
func Decode(data []byte, origin string) ([]model.Decoded, []model.Problem) {
	return manifests.Decode(data, origin)
}

// Load reads manifests once: files, directories, and standard input for "-".
func Load(paths []string, stdin io.Reader) (model.Objects, []model.Problem, error) {
	return manifests.Load(paths, stdin)
}

// IsManifest reports whether a file of this name is read.
func IsManifest(name string) bool { return manifests.IsManifest(name) }
