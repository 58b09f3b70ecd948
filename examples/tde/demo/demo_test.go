package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
)

func TestLoadRecordsTheSlowestAndTheFirstFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLoad()
		defer l.end()
		fails := errors.New("no member answers")
		l.do(kindKey, "wrap", func() error { <-time.After(3 * time.Millisecond); return nil })
		l.do(kindKey, "unwrap", func() error { <-time.After(40 * time.Millisecond); return fails })
		l.do(kindKey, "wrap", func() error { return errOtherPlaintext })
		l.do(kindPage, "read row", func() error { <-time.After(time.Second); return nil })

		if s := l.slowest[kindKey]; s.op != "unwrap" || s.took != 40*time.Millisecond {
			t.Errorf("the slowest is %+v", s)
		}
		if l.failures != 2 || !errors.Is(l.first, fails) || !strings.Contains(l.first.Error(), "unwrap, after 40ms") {
			t.Errorf("%d failures, the first: %v", l.failures, l.first)
		}
		if l.total() != 3 {
			t.Errorf("%d key operations, want 3: pages do not count", l.total())
		}
	})
}

func TestLoadFinishesWhatHasBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLoad()
		finished := 0
		l.every(10*time.Millisecond, func(ctx context.Context) {
			<-time.After(7 * time.Millisecond)
			if ctx.Err() == nil {
				finished++
			}
		})
		<-time.After(35 * time.Millisecond)
		l.end()
		if finished != 3 {
			t.Errorf("%d operations finished, want 3", finished)
		}
	})
}

func TestAccount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		a := newAccount(&out)
		<-time.After(1500 * time.Millisecond)
		a.note("SIGKILL to the driver of %s", "hsm-a")
		a.fact("failed", "%d", 0)
		a.fact("longest stall", "%s", a.timing(timing{took: 12_345 * time.Microsecond, op: "wrap", at: time.Now()}))
		a.fact("rows", "%s", thousands(1234567))
		a.summary([]string{"hsm-a", "hsm-b"}, []api.Verification{{Name: "shop", Copies: []api.Copy{
			{Version: 1, Member: "hsm-a", State: "ok"}, {Version: 1, Member: "hsm-b", State: "missing"},
			{Version: 2, Member: "hsm-b", State: "ok"}, {Version: 2, Member: "hsm-a", State: "ok"},
		}}})
		want := `kmsd demo: databases on three HSMs, two failures, a re-key and a restart

    1.5 s  SIGKILL to the driver of hsm-a

What survived

  failed         0
  longest stall  12.3 ms (wrap, at 1.5 s)
  rows           1,234,567

Copies of each key, as the HSMs say now

  key   version  hsm-a  hsm-b
  shop  1        ok     missing
  shop  2        ok     ok
`
		if out.String() != want {
			t.Errorf("got\n%s\nwant\n%s", out.String(), want)
		}
	})
}
