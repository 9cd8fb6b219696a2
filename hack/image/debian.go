package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// newest is the date that files get which are newer than it: those that the installation
// itself wrote. It is the date of Debian 12; files of packages that are older keep theirs.
var newest = time.Date(2023, time.June, 10, 0, 0, 0, 0, time.UTC)

// left are the directories of which only the directory itself comes into the image, and
// the files that do not: caches and logs of the installation, what it took from the
// machine that built it, and documentation (licences are kept).
var left = []string{
	"boot", "dev", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "tmp",
	"etc/hostname", "etc/resolv.conf", "etc/machine-id", "etc/ssl/certs/java",
	"etc/apt", "etc/cron.daily", "etc/logrotate.d", "etc/systemd",
	"lib/systemd", "usr/lib/systemd", "usr/lib/apt",
	"usr/share/bash-completion", "usr/share/bug", "usr/share/info", "usr/share/lintian", "usr/share/locale", "usr/share/man",
	"usr/share/zoneinfo",
	"var/backups", "var/cache", "var/lib/apt", "var/lib/systemd", "var/log", "var/mail", "var/spool", "var/tmp",
	"var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend", "var/lib/dpkg/triggers", "var/lib/dpkg/status-old", "var/lib/dpkg/diversions-old", "var/lib/dpkg/statoverride-old",
}

// taken reports whether the file system's entry of that name, without a leading "./",
// belongs in the image.
func taken(name string) bool {
	if strings.HasPrefix(name, "usr/share/doc/") {
		return strings.HasSuffix(name, "/") || strings.HasSuffix(name, "/copyright")
	}
	return !slices.ContainsFunc(left, func(l string) bool {
		return name == l || strings.HasPrefix(name, l+"/") && name != l+"/"
	})
}

// debianLayer copies a tar of Debian's root file system to one that depends on the
// packages' versions only: without what is left out, no file newer than Debian 12, owners by
// number, and no program that gives its caller another identity. The order is the
// input's, which must be sorted as mmdebstrap's is.
func debianLayer(in io.Reader, out io.Writer) error {
	r, w := tar.NewReader(in), tar.NewWriter(out)
	skipped := make(map[string]bool)
	var status bool
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the root file system: %w", err)
		}
		name := strings.TrimPrefix(h.Name, "./")
		if name == "" || !taken(name) {
			skipped[name] = true
			continue
		}
		status = status || name == statusFile
		n, err := normal(h, name)
		if err != nil {
			return err
		}
		if n.Typeflag == tar.TypeLink && skipped[n.Linkname] {
			return fmt.Errorf("%s is another name of %s, which is left out: take one of them off the list in hack/image/debian.go", name, n.Linkname)
		}
		if err := w.WriteHeader(n); err != nil {
			return err
		}
		if _, err := io.Copy(w, r); err != nil { //nolint:gosec // G110: our own archive, and nothing is unpacked
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	if !status {
		return fmt.Errorf("the root file system has no %s: it is none that mmdebstrap made", statusFile)
	}
	return w.Close()
}

// normal is the header of a file as the image has it.
func normal(h *tar.Header, name string) (*tar.Header, error) {
	n := &tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size,
		Mode: h.Mode & 0o1777, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime.Truncate(time.Second),
		Format: tar.FormatPAX,
	}
	if n.ModTime.After(newest) {
		n.ModTime = newest
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink:
	case tar.TypeLink:
		n.Linkname = strings.TrimPrefix(h.Linkname, "./")
	default:
		return nil, fmt.Errorf("%s is neither a file, a directory nor a link (type %q): leave it out in hack/image/debian.go", name, h.Typeflag)
	}
	return n, nil
}
