package main

import (
	"crypto/rand"
	"errors"
	"testing"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// calls returns how many calls in sessions of a partition there were since it was last asked.
func calls(t testing.TB, p *lunasim.Partition) func() int {
	t.Helper()
	all, last := p.Arm(lunasim.Fault{What: lunasim.Sleep, Function: "*", Times: lunasim.Forever}), 0
	return func() int {
		n := all.Fired() - last
		last += n
		return n
	}
}

// Every call is a round trip to a network HSM, and a member that comes back with ten thousand
// keys makes these for each.
func TestHowManyCallsAKeyCosts(t *testing.T) {
	const keys = 2 * keysTogether
	domain := newDomain()
	from, to := openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil), openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil)
	given, taken := calls(t, from.p), calls(t, to.p)
	for _, x := range []struct {
		typ                  pluginproto.KeyType
		list, source, target int // at most, for each key
	}{
		{pluginproto.AES256, 8, 8, 22},
		{pluginproto.ECP256, 9, 9, 36},
	} {
		ids := make([]pluginproto.KeyID, keys)
		for i := range ids {
			_, _ = rand.Read(ids[i][:]) // never fails
			if _, err := from.Generate(t.Context(), pluginproto.KeySpec{ID: ids[i], Type: x.typ}); err != nil {
				t.Fatal(err)
			}
		}
		check := func(what string, n, most int) {
			if n > most*keys {
				t.Errorf("%s, %s: %d calls for each of %d keys, want at most %d", x.typ, what, n/keys, keys, most)
			}
		}
		fresh := openDriver(t, from.p, domain, nil) // which has not looked at the token yet
		given()
		one := pluginproto.KeySpec{Type: x.typ}
		_, _ = rand.Read(one.ID[:]) // never fails
		if _, err := fresh.Generate(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		if n := given(); n > keys/2 {
			t.Errorf("%s: making one key takes %d calls beside %d others", x.typ, n, keys)
		}
		if err := errors.Join(from.Destroy(t.Context(), one.ID), fresh.Close()); err != nil {
			t.Fatal(err)
		}
		given()
		if _, err := from.List(t.Context()); err != nil {
			t.Fatal(err)
		}
		check("listing", given(), x.list)
		if _, err := to.List(t.Context()); err != nil {
			t.Fatal(err)
		}
		taken()
		for rest := ids; len(rest) > 0; rest = rest[keysTogether:] {
			if _, err := clone(t.Context(), from, to, cpv4, rest[:keysTogether], unchanged); err != nil {
				t.Fatal(err)
			}
		}
		check("giving", given(), x.source)
		check("taking", taken(), x.target)
		for _, d := range []*opened{from, to} {
			for _, id := range ids {
				if err := d.Destroy(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}
