package floors

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Two packages of the standard library are half pure, so what is used of them counts.
var (
	// clockReads read the clock or wait for it. Values and arithmetic (Duration,
	// Time.Add) are free for all.
	clockReads = []string{"Now", "Since", "Until", "After", "AfterFunc", "Sleep", "Tick", "NewTimer", "NewTicker"}
	// netText is what handles values and text only.
	netText = []string{"JoinHostPort", "SplitHostPort", "ParseIP", "ParseCIDR", "IP", "IPNet"}
)

// Uses returns a line for every use of the clock or of sockets in the files (not the
// tests) of pure packages; there, time is an argument. The error is that of reading or
// parsing a file.
func Uses(packages []Package) ([]string, error) {
	var broken []string
	for _, p := range packages {
		name, ok := strings.CutPrefix(p.ImportPath, Module+"/")
		if !ok || !within(name, pure) {
			continue
		}
		for _, file := range p.GoFiles {
			uses, err := impureUses(filepath.Join(p.Dir, file), nil)
			if err != nil {
				return nil, err
			}
			for _, use := range uses {
				broken = append(broken, fmt.Sprintf("%s/%s, but touches no clock and no socket", name, use))
			}
		}
	}
	return broken, nil
}

// impureUses parses a file, from src when it is not nil (as parser.ParseFile takes it).
func impureUses(filename string, src any) ([]string, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, filename, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", filename, err)
	}
	imported := importNames(file)
	var uses []string
	ast.Inspect(file, func(n ast.Node) bool {
		selector, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := selector.X.(*ast.Ident); ok && impure(imported[x.Name], selector.Sel.Name) {
			uses = append(uses, fmt.Sprintf("%s:%d uses %s.%s", filepath.Base(filename),
				set.Position(n.Pos()).Line, imported[x.Name], selector.Sel.Name))
		}
		return true
	})
	// Without a selector nothing tells where a name comes from.
	if p, ok := imported["."]; ok {
		uses = append(uses, fmt.Sprintf("%s uses %s by a dot import", filepath.Base(filename), p))
	}
	return uses, nil
}

func impure(pkg, name string) bool {
	switch pkg {
	case "time":
		return slices.Contains(clockReads, name)
	case "net":
		return !slices.Contains(netText, name)
	}
	return false
}

// importNames maps the names under which a file knows packages to their paths.
func importNames(file *ast.File) map[string]string {
	names := map[string]string{}
	for _, spec := range file.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		name := path.Base(p)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		names[name] = p
	}
	return names
}
