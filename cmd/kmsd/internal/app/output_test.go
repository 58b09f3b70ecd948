package app_test

import (
	"testing"

	"kmsd/cmd/kmsd/internal/app"
)

func TestForeignTextIsShownOnOneLineAndMovesNothing(t *testing.T) {
	for text, want := range map[string]string{
		"a label":                      "a label",
		"\x1b[2Jwiped \x07":            "?[2Jwiped ?",
		"one failed\nso did the other": "one failed; so did the other",
		"the last of a list\n":         "the last of a list",
		"right\u202eleft\r":            "right?left?",
	} {
		if got := app.Clean(text); got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
	}
}
