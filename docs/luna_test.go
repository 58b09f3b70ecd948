// Package docs_test answers: is what the documents say still true?
package docs_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	behaviours = 129
	weaknesses = 58
)

var (
	rowPattern  = regexp.MustCompile(`(?m)^\| (W?\d+)(?: \[old\])? \| (.+) \| (.+) \| (.*) \|$`)
	namePattern = regexp.MustCompile("`(Test[A-Za-z0-9_]+)`")
	testPattern = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]+)\(t \*testing\.T\)`)
)

// Every line of the table is there once, and is shown by a test or says why it does not
// apply.
func TestLunaTableIsWhole(t *testing.T) {
	doc, err := os.ReadFile("luna.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	for _, row := range rowPattern.FindAllStringSubmatch(string(doc), -1) {
		number, here, tests := row[1], row[3], row[4]
		if shown[number] {
			t.Errorf("%s stands there twice", number)
		}
		shown[number] = true
		reasoned := strings.HasPrefix(here, "Does not apply") || strings.HasPrefix(here, "Nothing to show")
		if !namePattern.MatchString(tests) && !reasoned {
			t.Errorf("%s names no test and no reason", number)
		}
	}
	for n := 1; n <= behaviours; n++ {
		if !shown[fmt.Sprint(n)] {
			t.Errorf("behaviour %d is missing", n)
		}
	}
	for n := 1; n <= weaknesses; n++ {
		if !shown[fmt.Sprintf("W%d", n)] {
			t.Errorf("weakness W%d is missing", n)
		}
	}
}

// Every test that a document names exists.
func TestNamedTestsExist(t *testing.T) {
	exists := testsOf(t, "..")
	docs, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range docs {
		doc, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range namePattern.FindAllStringSubmatch(string(doc), -1) {
			if !exists[m[1]] {
				t.Errorf("%s names %s, which does not exist", path, m[1])
			}
		}
	}
}

func testsOf(t *testing.T, root string) map[string]bool {
	t.Helper()
	exists := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range testPattern.FindAllStringSubmatch(string(source), -1) {
			exists[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return exists
}
