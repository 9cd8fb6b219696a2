package main

import (
	"archive/tar"
	"bufio"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// statusFile is where dpkg lists the installed packages.
const statusFile = "var/lib/dpkg/status"

// spdxPackage is a package of SPDX 2.3.
type spdxPackage struct {
	ID       string    `json:"SPDXID"`
	Name     string    `json:"name"`
	Version  string    `json:"versionInfo"`
	Source   string    `json:"sourceInfo,omitempty"`
	Location string    `json:"downloadLocation"`
	Analyzed bool      `json:"filesAnalyzed"`
	Refs     []spdxRef `json:"externalRefs,omitempty"`
	Sums     []spdxSum `json:"checksums,omitempty"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxSum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRelation struct {
	From string `json:"spdxElementId"`
	Type string `json:"relationshipType"`
	To   string `json:"relatedSpdxElement"`
}

// writeSBOM writes what the image consists of: Debian's packages and, of each of our
// programs, the Go modules that are linked into it.
func (p *packing) writeSBOM(programs []string, digest string) error {
	sum := strings.TrimPrefix(digest, "sha256:")
	image := spdxPackage{
		ID: "SPDXRef-image", Name: p.name, Version: p.version, Location: "NOASSERTION",
		Sums: []spdxSum{{Algorithm: "SHA256", Value: sum}},
	}
	packages := []spdxPackage{image}
	debian, err := debianPackages(p.debian)
	if err != nil {
		return err
	}
	packages = append(packages, debian...)
	for _, name := range programs {
		modules, err := goModules(filepath.Join(p.programs, name))
		if err != nil {
			return err
		}
		packages = append(packages, modules...)
	}
	slices.SortFunc(packages[1:], func(a, b spdxPackage) int { return strings.Compare(a.ID, b.ID) })
	packages = slices.CompactFunc(packages, func(a, b spdxPackage) bool { return a.ID == b.ID })

	relations := []spdxRelation{{From: "SPDXRef-DOCUMENT", Type: "DESCRIBES", To: image.ID}}
	for _, k := range packages[1:] {
		relations = append(relations, spdxRelation{From: image.ID, Type: "CONTAINS", To: k.ID})
	}
	document, err := json.MarshalIndent(map[string]any{
		"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT",
		"name":              p.name,
		"documentNamespace": "https://culvert.dev/sbom/" + sum,
		"creationInfo": map[string]any{
			"created": time.Unix(p.created, 0).UTC().Format(time.RFC3339), "creators": []string{"Tool: culvert/hack/image"},
		},
		"packages": packages, "relationships": relations,
	}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(p.sbom, func(f *os.File) error {
		_, err := f.Write(append(document, '\n'))
		return err
	})
}

// debianPackages reads the installed packages out of a layer.
func debianPackages(layer string) ([]spdxPackage, error) {
	f, err := os.Open(layer)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s has no %s", layer, statusFile)
		}
		if err != nil {
			return nil, err
		}
		if h.Name == statusFile {
			return parseStatus(r)
		}
	}
}

// parseStatus reads dpkg's status file: paragraphs of fields (deb-control(5)).
func parseStatus(in io.Reader) ([]spdxPackage, error) {
	var packages []spdxPackage
	fields := make(map[string]string)
	flush := func() {
		if strings.HasSuffix(fields["Status"], " installed") {
			packages = append(packages, debianPackage(fields))
		}
		clear(fields)
	}
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		name, value, ok := strings.Cut(line, ": ")
		switch {
		case line == "":
			flush()
		case ok && !strings.HasPrefix(line, " "):
			fields[name] = value
		}
	}
	flush()
	return packages, s.Err()
}

func debianPackage(fields map[string]string) spdxPackage {
	name, version, arch := fields["Package"], fields["Version"], fields["Architecture"]
	p := spdxPackage{
		ID: spdxID("deb", name, version), Name: name, Version: version, Location: "NOASSERTION",
		Refs: []spdxRef{purl("pkg:deb/debian/" + name + "@" + strings.ReplaceAll(version, "+", "%2B") + "?arch=" + arch + "&distro=debian-12")},
	}
	if source := fields["Source"]; source != "" {
		p.Source = "built from the source package " + source
	}
	return p
}

// goModules lists the modules that are linked into a program, and Go's standard library.
func goModules(program string) ([]spdxPackage, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("%s is no Go program: %w", program, err)
	}
	version := strings.TrimPrefix(info.GoVersion, "go")
	modules := []spdxPackage{{
		ID: spdxID("go", "stdlib", version), Name: "stdlib", Version: version, Location: "NOASSERTION",
		Refs: []spdxRef{purl("pkg:golang/stdlib@" + version)},
	}}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		modules = append(modules, spdxPackage{
			ID: spdxID("go", m.Path, m.Version), Name: m.Path, Version: m.Version, Location: "NOASSERTION",
			Refs: []spdxRef{purl("pkg:golang/" + m.Path + "@" + strings.ReplaceAll(m.Version, "+", "%2B"))},
		})
	}
	return modules, nil
}

func purl(locator string) spdxRef {
	return spdxRef{Category: "PACKAGE-MANAGER", Type: "purl", Locator: locator}
}

var notInID = regexp.MustCompile(`[^a-zA-Z0-9.-]+`)

// spdxID is an identifier of SPDX: letters, digits, dots and hyphens.
func spdxID(parts ...string) string {
	return "SPDXRef-" + notInID.ReplaceAllString(strings.Join(parts, "-"), "-")
}
