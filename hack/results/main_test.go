package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const passing = `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`
	tests := []struct {
		name, in string
		failed   bool
		want     []string
		not      string
	}{
		{"pass", passing, false, []string{"--- PASS: TestA", "ok  \tp\t0.1s", "1 passed, 0 failed, 0 skipped"}, "chatter"},
		{"fail", passing + `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: reason\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- FAIL: TestB (0.00s)\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
{"Action":"fail","Package":"p"}
`, true, []string{"b_test.go:1: reason", "--- FAIL: TestB", "1 passed, 1 failed"}, "chatter"},
		{"skip", passing + `{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:1: SKIP: why\n"}
{"Action":"skip","Package":"p","Test":"TestC"}
`, false, []string{"SKIP: why", "1 passed, 0 failed, 1 skipped"}, ""},
		{"does not build", passing + `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: syntax error\n"}
{"ImportPath":"q","Action":"build-fail"}
{"Action":"fail","Package":"q","FailedBuild":"q"}
`, true, []string{"q.go:1: syntax error"}, ""},
		{"a package that dies between tests", passing + `{"Action":"output","Package":"p","Output":"panic: in TestMain\n"}
{"Action":"fail","Package":"p"}
`, true, []string{"panic: in TestMain"}, ""},
		{"plain text of the go command", "go: no such tool\n" + passing, false, []string{"go: no such tool"}, ""},
		{"nothing ran", "", true, []string{"0 passed"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			failed, err := report(strings.NewReader(tt.in), &out)
			if err != nil || failed != tt.failed {
				t.Errorf("failed: %v, %v; want %v", failed, err, tt.failed)
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
