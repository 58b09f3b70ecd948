package kms

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
)

// With a full disk each key that is asked for wakes the janitor.
func TestAJanitorSaysTheSameOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		j := newJanitor(nil, nil, hclog.New(&hclog.LoggerOptions{Output: &out}))
		full, slow := errors.New("no room is left"), errors.New("it takes too long")
		says := func(lines int, chore string, err error) {
			t.Helper()
			out.Reset()
			j.tell(chore, err)
			if got := strings.Count(out.String(), "\n"); got != lines {
				t.Errorf("%s, %v: %d lines, want %d", chore, err, got, lines)
			}
		}
		says(1, "clearing up", full)
		says(0, "clearing up", full)
		says(1, "settling", full) // another chore
		says(0, "clearing up", slow)
		time.Sleep(soon)
		says(1, "clearing up", slow)
		time.Sleep(soon)
		says(0, "clearing up", slow)
		time.Sleep(idle)
		says(1, "clearing up", slow)
		says(0, "clearing up", nil)
		says(1, "clearing up", slow) // it has worked in between
	})
}
