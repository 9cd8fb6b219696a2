// Results reads the output of "go test -json" on standard input and prints go test's own
// result lines: for each package, each test and its direct subtests; everything that a
// failed test said; the reason of a skipped one; and the sums. Of packages that run at the same
// time one is printed as it goes, and the others follow, each as a whole. It exits with 1 when a
// test failed, a package did not build, or nothing ran. With -passed DIRECTORY it makes an empty
// file there for each package that passed, named after it with _ for /.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	passed := flag.String("passed", "", "`directory` for a file for each package that passed")
	flag.Parse()
	s := newResults(os.Stdout)
	failed, err := s.report(os.Stdin)
	if err == nil && *passed != "" {
		err = note(*passed, s.whole)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "results:", err)
	}
	if failed || err != nil {
		os.Exit(1)
	}
}

// event is a line of go test -json, see "go doc test2json".
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Output      string
	FailedBuild string
}

type results struct {
	w                       io.Writer
	turns                   []*turn
	pending                 map[string]*strings.Builder // what a running test has said, by package and test
	passed, failed, skipped int
	broken                  bool
	whole                   []string // packages that passed
}

// turn is a package's to be printed. The first one's is now; what the others say is kept until
// then.
type turn struct {
	name  string
	kept  strings.Builder
	ended bool
}

func newResults(w io.Writer) *results {
	return &results{w: w, pending: map[string]*strings.Builder{}}
}

// report copies the result lines of r and returns whether anything failed.
func (s *results) report(r io.Reader) (failed bool, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			// The go command's own messages come as they are.
			_, _ = fmt.Fprintln(s.w, lines.Text())
			continue
		}
		s.take(e)
	}
	for _, t := range s.turns { // go test was ended itself
		t.ended = true
	}
	s.advance()
	if err := lines.Err(); err != nil {
		return true, fmt.Errorf("read: %w", err)
	}
	_, _ = fmt.Fprintf(s.w, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	return s.broken || s.passed == 0, nil
}

func (s *results) take(e event) {
	key := e.Package + "\x00" + e.Test
	switch e.Action {
	case "start":
		s.turn(e.Package)
	case "output":
		s.output(key, e)
	case "build-output":
		s.print("", e.Output)
	case "build-fail":
		s.broken = true
	case "pass", "fail", "skip":
		if e.Action == "fail" {
			s.broken = true
			s.whole = slices.DeleteFunc(s.whole, func(p string) bool { return p == e.Package })
		}
		switch {
		case e.Test != "":
			s.end(key, e)
		case e.Action == "pass":
			s.whole = append(s.whole, e.Package)
		}
		if e.Test == "" {
			s.turn(e.Package).ended = true
			s.advance()
		}
	}
}

// turn is a package's, which begins to wait for it when it was not known.
func (s *results) turn(name string) *turn {
	for _, t := range s.turns {
		if t.name == name {
			return t
		}
	}
	t := &turn{name: name}
	s.turns = append(s.turns, t)
	return t
}

// advance goes on to the first package that has not ended, and prints what those before it, and it
// itself so far, had to say.
func (s *results) advance() {
	for len(s.turns) > 0 && s.turns[0].ended {
		s.turns = s.turns[1:]
		if len(s.turns) > 0 {
			_, _ = io.WriteString(s.w, s.turns[0].kept.String())
		}
	}
}

func (s *results) output(key string, e event) {
	if e.Test == "" {
		// "PASS" and "FAIL" alone say nothing that the line with the package does not.
		if e.Output != "PASS\n" && e.Output != "FAIL\n" && !strings.Contains(e.Output, "[no test files]") {
			s.print(e.Package, e.Output)
		}
		return
	}
	said := s.pending[key]
	if said == nil {
		said = &strings.Builder{}
		s.pending[key] = said
	}
	if !strings.HasPrefix(e.Output, "=== ") {
		said.WriteString(e.Output)
	}
}

func (s *results) end(key string, e event) {
	said := ""
	if b := s.pending[key]; b != nil {
		said = b.String()
	}
	delete(s.pending, key)
	switch e.Action {
	case "fail":
		s.failed++
		s.print(e.Package, said)
	case "skip":
		s.skipped++
		s.print(e.Package, said)
	default:
		s.passed++
		if strings.Count(e.Test, "/") <= 1 {
			s.print(e.Package, resultLine(said))
		}
	}
}

// resultLine returns the "--- PASS" line among what a test said.
func resultLine(said string) string {
	for line := range strings.Lines(said) {
		if strings.HasPrefix(strings.TrimSpace(line), "--- PASS") {
			return line
		}
	}
	return ""
}

// note makes the files of -passed.
func note(directory string, packages []string) error {
	errs := []error{os.MkdirAll(directory, 0o755)}
	for _, p := range packages {
		errs = append(errs, os.WriteFile(filepath.Join(directory, strings.ReplaceAll(p, "/", "_")), nil, 0o600))
	}
	return errors.Join(errs...)
}

// print prints what a package says when it is its turn, and keeps it otherwise. Without a package
// it prints at once.
func (s *results) print(name, text string) {
	if name != "" {
		if t := s.turn(name); t != s.turns[0] {
			t.kept.WriteString(text)
			return
		}
	}
	_, _ = io.WriteString(s.w, text)
}
