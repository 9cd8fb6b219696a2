// Package floors says which package of this module may import which, so that the
// planning of a network configuration stays a pure function and the packages that touch
// the kernel can be read, tested and replaced one at a time.
//
// Every package stands on a floor and imports from the floors below it only. A package
// that the table does not name is an error: whoever adds one decides where it belongs.
// The package's test holds the whole module to the table.
package floors

import (
	"fmt"
	"slices"
	"strings"
)

// Module is the path that the packages of this module begin with.
const Module = "github.com/culvert-vpn/culvert"

// floors lists the packages from the ground up, relative to the module. An entry stands
// for its directory and all below it that have no entry of their own. Packages of one
// directory tree (internal/lab and internal/lab/labtest) may import each other.
var floors = [][]string{
	// The ground: what floor 0 stands on.
	{"internal/secret", "internal/tcpconn", "internal/floors"},
	// 0: values, formats, the life of a process.
	{"api", "internal/netstate", "internal/reverse/wire", "internal/process", "internal/ipam", "internal/ipsec/vici", "internal/splice", "internal/cli/usage"},
	// 1: what objects mean.
	{"internal/model", "internal/pki", "internal/reverse/policy", "internal/reverse/mux", "internal/reverse/meter"},
	// 2: what follows from them.
	{
		"internal/plan", "internal/workload", "internal/kube", "internal/podapi",
		"internal/reverse/identity", "internal/reverse/link", "internal/reverse/dial", "internal/reverse/connect",
	},
	// 3: effects.
	{
		"internal/source", "internal/store", "internal/cilium",
		"internal/wireguard", "internal/ipsec", "internal/nft", "internal/guard", "internal/cni", "internal/route", "internal/relay", "internal/probe",
		"internal/reverse/hub", "internal/reverse/spoke", "internal/reverse/front", "internal/reverse/egress",
		"internal/lab",
	},
	// 4: the loops.
	{"internal/gateway", "internal/agent", "internal/operator", "internal/tunnel", "internal/demo", "internal/lab/cluster/clustertest"},
	// 5: the command line, and peers for tests.
	{"internal/cli", "test/strongswan", "test/herd"},
	// 6: the mains, and tests of the whole.
	{"cmd", "docs", "hack", "test"},
}

// pure packages touch no clock, file, socket or kernel.
var pure = []string{"internal/model", "internal/ipam", "internal/pki", "internal/plan", "internal/workload", "internal/reverse/wire", "internal/reverse/policy"}

// appliers put a part of netstate.State into effect. They know neither the objects that
// it was planned from nor Kubernetes.
var appliers = []string{
	"internal/wireguard", "internal/ipsec", "internal/nft", "internal/guard", "internal/cni", "internal/route", "internal/relay", "internal/probe",
}

// forTests are the packages that tests on any floor may import in addition.
var forTests = []string{"internal/lab", "test/strongswan", "test/herd"}

// Package is what the rules need to know of a package; the names are those of "go list
// -json".
type Package struct {
	ImportPath   string
	Dir          string
	GoFiles      []string
	Imports      []string // of the package itself, direct
	TestImports  []string // of its tests, direct
	XTestImports []string // of its external tests, direct
	Deps         []string // of the package itself, direct and indirect
}

// Check returns a line for every import that breaks a rule, sorted; none when all hold.
// What pure packages use of package time and net is checked by Uses.
func Check(packages []Package) []string {
	var broken []string
	for _, p := range packages {
		name, ok := strings.CutPrefix(p.ImportPath, Module+"/")
		if !ok {
			continue
		}
		broken = append(broken, checkFloor(name, p)...)
		broken = append(broken, checkPure(name, p.Imports)...)
		broken = append(broken, checkDeps(name, p.Deps)...)
	}
	slices.Sort(broken)
	return slices.Compact(broken)
}

func checkFloor(name string, p Package) []string {
	own, entry := floorOf(name)
	if entry == "" {
		return []string{fmt.Sprintf("%s stands on no floor: add it to internal/floors/floors.go", name)}
	}
	var broken []string
	look := func(imports []string, kind string, allowed []string) {
		for _, path := range imports {
			target, ok := strings.CutPrefix(path, Module+"/")
			if !ok || within(target, allowed) {
				continue
			}
			floor, _ := floorOf(target) // an unknown one is reported where it is checked itself
			if floor >= own && !related(name, target) {
				broken = append(broken, fmt.Sprintf("%s%s imports %s, which is not below it", name, kind, target))
			}
		}
	}
	look(p.Imports, "", nil)
	look(slices.Concat(p.TestImports, p.XTestImports), " (test)", forTests)
	return broken
}

func checkPure(name string, imports []string) []string {
	if !within(name, pure) {
		return nil
	}
	var broken []string
	for _, path := range imports {
		root, _, _ := strings.Cut(path, "/")
		if root == "os" || root == "syscall" || strings.HasPrefix(path, "net/") && path != "net/netip" && path != "net/url" ||
			path == "io/ioutil" || path == "path/filepath" || within(path, []string{"golang.org/x/sys", "github.com/vishvananda"}) {
			broken = append(broken, fmt.Sprintf("%s imports %s, but touches no file, socket or kernel", name, path))
		}
	}
	return broken
}

func checkDeps(name string, deps []string) []string {
	var forbidden []string
	switch {
	case within(name, appliers):
		forbidden = []string{"k8s.io", "sigs.k8s.io/controller-runtime", Module + "/api", Module + "/internal/model"}
	case name == "cmd/culvert-tunnel", name == "cmd/culvert-cni":
		forbidden = []string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime"}
	}
	var broken []string
	for _, path := range deps {
		if within(path, forbidden) {
			broken = append(broken, fmt.Sprintf("%s links %s", name, path))
		}
	}
	return broken
}

// floorOf returns the floor of a package and the entry of the table that puts it there;
// without one the floor is above all and the entry empty.
func floorOf(name string) (floor int, entry string) {
	floor = len(floors)
	for i, names := range floors {
		for _, e := range names {
			if within(name, []string{e}) && len(e) > len(entry) {
				floor, entry = i, e
			}
		}
	}
	return floor, entry
}

// within reports whether path is one of the directories or below one.
func within(path string, directories []string) bool {
	return slices.ContainsFunc(directories, func(d string) bool {
		return path == d || strings.HasPrefix(path, d+"/")
	})
}

// related reports whether one of the packages lies below the other's directory.
func related(a, b string) bool {
	return within(a, []string{b}) || within(b, []string{a})
}
