package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const passing = `{"Action":"output","Package":"x/p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"x/p","Test":"TestA","Output":"chatter\n"}
{"Action":"output","Package":"x/p","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"x/p","Test":"TestA"}
{"Action":"output","Package":"x/p","Output":"PASS\n"}
{"Action":"output","Package":"x/p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"x/p"}
`
	tests := []struct {
		name, in string
		failed   bool
		want     []string
		not      string
		whole    int
	}{
		{"pass", passing, false, []string{"--- PASS: TestA", "ok  \tp\t0.1s", "1 passed, 0 failed, 0 skipped"}, "chatter", 1},
		{"fail", passing + `{"Action":"output","Package":"x/p","Test":"TestB","Output":"    b_test.go:1: reason\n"}
{"Action":"output","Package":"x/p","Test":"TestB","Output":"--- FAIL: TestB (0.00s)\n"}
{"Action":"fail","Package":"x/p","Test":"TestB"}
{"Action":"fail","Package":"x/p"}
`, true, []string{"b_test.go:1: reason", "--- FAIL: TestB", "1 passed, 1 failed"}, "chatter", 0},
		{"skip", passing + `{"Action":"output","Package":"x/p","Test":"TestC","Output":"    c_test.go:1: SKIP: why\n"}
{"Action":"skip","Package":"x/p","Test":"TestC"}
`, false, []string{"SKIP: why", "1 passed, 0 failed, 1 skipped"}, "", 1},
		{"does not build", passing + `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: syntax error\n"}
{"ImportPath":"q","Action":"build-fail"}
{"Action":"fail","Package":"q","FailedBuild":"q"}
`, true, []string{"q.go:1: syntax error"}, "", 1},
		{"a package that dies between tests", passing + `{"Action":"output","Package":"x/p","Output":"panic: in TestMain\n"}
{"Action":"fail","Package":"x/p"}
`, true, []string{"panic: in TestMain"}, "", 0},
		{"plain text of the go command", "go: no such tool\n" + passing, false, []string{"go: no such tool"}, "", 1},
		{"nothing ran", "", true, []string{"0 passed"}, "", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			s := newResults(&out)
			failed, err := s.report(strings.NewReader(tt.in))
			if err != nil || failed != tt.failed {
				t.Errorf("failed: %v, %v; want %v", failed, err, tt.failed)
			}
			dir := filepath.Join(t.TempDir(), "new")
			if err := note(dir, s.whole); err != nil {
				t.Fatal(err)
			}
			files, err := os.ReadDir(dir)
			if len(files) != tt.whole || err != nil || tt.whole > 0 && files[0].Name() != "x_p" {
				t.Errorf("noted as passed: %v (%v), want %d", files, err, tt.whole)
			}
			for _, want := range tt.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("lacks %q:\n%s", want, out.String())
				}
			}
			if tt.not != "" && strings.Contains(out.String(), tt.not) {
				t.Errorf("has %q:\n%s", tt.not, out.String())
			}
		})
	}
}

// Packages that run at the same time do not mix.
func TestReportOfTwoAtATime(t *testing.T) {
	line := func(action, name, test string) string {
		if test != "" {
			test = `,"Test":"Test` + test + `"`
		}
		return `{"Action":"` + action + `","Package":"` + name + `"` + test + "}\n"
	}
	passing := func(name, test string) string {
		return `{"Action":"output","Package":"` + name + `","Test":"Test` + test + `","Output":"--- PASS: Test` + test + `\n"}` + "\n" + line("pass", name, test)
	}
	ok := func(name string) string {
		return `{"Action":"output","Package":"` + name + `","Output":"ok ` + name + `\n"}` + "\n" + line("pass", name, "")
	}
	both := line("start", "a", "") + line("start", "b", "") + passing("b", "B1") + passing("a", "A1")
	tests := []struct{ name, in, want string }{
		{"the second ends first", both + ok("b") + line("start", "c", "") + passing("c", "C1") + passing("a", "A2") + ok("a") + passing("c", "C2") + ok("c"),
			"--- PASS: TestA1\n--- PASS: TestA2\nok a\n--- PASS: TestB1\nok b\n--- PASS: TestC1\n--- PASS: TestC2\nok c\n5 passed, 0 failed, 0 skipped\n"},
		{"the first ends first", both + ok("a") + passing("b", "B2") + ok("b"), "--- PASS: TestA1\nok a\n--- PASS: TestB1\n--- PASS: TestB2\nok b\n3 passed, 0 failed, 0 skipped\n"},
		{"go test is killed", both, "--- PASS: TestA1\n--- PASS: TestB1\n2 passed, 0 failed, 0 skipped\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if _, err := newResults(&out).report(strings.NewReader(tt.in)); err != nil || out.String() != tt.want {
				t.Errorf("error %v, printed\n%s\nwant\n%s", err, out.String(), tt.want)
			}
		})
	}
}
