// Image packs Culvert's container image from a Debian root file system and our own static
// programs, without a registry, a daemon or a builder: hack/image.sh calls it. The same
// input gives the same image, byte by byte.
//
//	image layer --root ROOT.tar --out LAYER.tar
//	image pack --debian LAYER.tar --programs DIR --name NAME:TAG --out IMAGE.tar --sbom SBOM.json
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	usage := errors.New("usage: image layer|pack FLAG…; 'image layer -h' lists the flags")
	if len(args) == 0 {
		return usage
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	out := flags.String("out", "", "file to write")
	switch args[0] {
	case "layer":
		root := flags.String("root", "", "tar `file` with the root file system of Debian")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return layer(*root, *out)
	case "pack":
		var p packing
		flags.StringVar(&p.debian, "debian", "", "layer `file` that 'image layer' wrote")
		flags.StringVar(&p.programs, "programs", "", "`directory` with our static programs")
		flags.StringVar(&p.license, "license", "", "`file` with our licence")
		flags.StringVar(&p.name, "name", "", "`reference` of the image: name and tag")
		flags.StringVar(&p.version, "version", "", "`version` of the programs")
		flags.StringVar(&p.revision, "revision", "", "`commit` that they were built from")
		flags.Int64Var(&p.created, "created", 0, "Unix `time` of that commit, the image's date")
		flags.StringVar(&p.sbom, "sbom", "", "`file` to write the list of packages and modules to (SPDX 2.3)")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		p.out = *out
		return p.pack()
	}
	return usage
}

// layer turns the root file system into the image's lower layer.
func layer(root, out string) error {
	in, err := os.Open(root) //nolint:gosec // G703: the file that we were asked to read
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(out, func(f *os.File) error { return debianLayer(in, f) })
}

// writeFile writes a file so that it is there complete or not at all.
func writeFile(path string, write func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".image-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() //nolint:gosec // G703: made by us
	if err = errors.Join(write(f), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path) //nolint:gosec // G703: the file that we were asked to write
}
