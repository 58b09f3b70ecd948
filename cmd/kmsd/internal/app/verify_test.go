package app_test

import (
	"testing"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/kms/api"
)

func TestAVerificationSaysWhatItKnowsAndNoMore(t *testing.T) {
	for _, c := range []struct {
		name   string
		states []string
		exit   int
		text   string
	}{
		{"every copy is there", []string{"ok", "ok", "ok"}, 0, ""},
		{"a member that is away is not said to lack its copy", []string{"ok", "ok", "unknown"}, 3,
			"1 of 3 copies of shop could not be asked for; the others are as they should be"},
		{"a copy is missing", []string{"ok", "missing", "ok"}, 1,
			"shop is not on every member as it should be: 1 of 3 copies are missing or different, 0 could not be asked for"},
		{"a copy is different, and another unknown", []string{"ok", "different", "unknown"}, 1,
			"shop is not on every member as it should be: 1 of 3 copies are missing or different, 1 could not be asked for"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := api.Verification{Name: "shop", OK: c.exit == 0}
			for i, state := range c.states {
				v.Copies = append(v.Copies, api.Copy{Version: 1, Member: string(rune('a' + i)), State: state})
			}
			err := app.Verdict(v)
			if err == nil {
				if c.text != "" {
					t.Fatalf("no failure, want %q", c.text)
				}
				return
			}
			exit := app.ExitOf(api.AsError(err).Code)
			if err.Error() != c.text || exit != c.exit {
				t.Errorf("got %q, exit %d; want %q, exit %d", err, exit, c.text, c.exit)
			}
		})
	}
}
