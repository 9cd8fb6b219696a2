package operator

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// Every reason that a condition can have is explained.
func TestConditionsAreExplained(t *testing.T) {
	page, err := os.ReadFile("../../docs/reference/conditions.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for file, reason := range map[string]string{
		"status.go":              `reason\w+\s+= "(\w+)"`,
		"remote.go":              `reason\w+\s+= "(\w+)"`,
		"../model/parse.go":      `Reason\w+\s+= "(\w+)"`,
		"../ipsec/failure.go":    `Reason\w+\s+Reason = "(\w+)"`,
		"../gateway/standing.go": `verdict\{\w+, "(\w+)"`,
	} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(reason).FindAllStringSubmatch(string(source), -1)
		if len(found) < 3 {
			t.Errorf("%s: found only %d reasons: was it rewritten?", file, len(found))
		}
		for _, m := range found {
			n++
			if !strings.Contains(string(page), "`"+m[1]+"`") {
				t.Errorf("docs/reference/conditions.md does not explain %s of %s", m[1], file)
			}
		}
	}
	t.Logf("%d reasons", n)
}
