package labtest

import (
	"fmt"
	"os"
	"strings"
)

// Figure is one measured value; its unit is one word, such as "start-s".
type Figure struct {
	Value float64
	Unit  string
}

// Line is figures as a Go benchmark prints them, so that benchstat reads them. What a name
// must not have in it becomes an underscore.
func Line(name string, figures ...Figure) string {
	var b strings.Builder
	name = Word(name)
	if name != "" { // behind "Benchmark" a small letter would make it something else
		name = strings.ToUpper(name[:1]) + name[1:]
	}
	fmt.Fprintf(&b, "Benchmark%s\t1", name)
	for _, f := range figures {
		fmt.Fprintf(&b, "\t%.6g %s", f.Value, Word(f.Unit))
	}
	return b.String() + "\n"
}

// Word is a name or unit as Line writes it.
func Word(s string) string { return strings.NewReplacer(" ", "_", ",", "", "\t", "_").Replace(s) }

// Report prints figures of a test that measures, for benchstat and "make bench": when
// CULVERT_BENCH is set, otherwise nothing.
func Report(name string, figures ...Figure) {
	if os.Getenv("CULVERT_BENCH") != "" {
		fmt.Print("\n" + Line(name, figures...)) // not behind the name of a test that has not ended
	}
}
