// Package catalogtest answers: is this a catalog.Store?
//
// [Run] is the contract as tests; every Store passes it. [Memory] is the smallest
// Store that does, and [Crasher] makes any Store crash at a chosen step.
package catalogtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"kmsd/kms/catalog"
)

// Config says how to get at the Store under test.
type Config struct {
	// Open returns an empty Store, which Run closes.
	Open func(t *testing.T) catalog.Store
	// Reopen closes the Store and returns one on the same records, as after a
	// restart. Run closes that too.
	Reopen func(t *testing.T, s catalog.Store) catalog.Store
}

// Run checks everything that a Store promises.
func Run(t *testing.T, cfg Config) {
	cases := []struct {
		name string
		run  func(*testing.T, Config, catalog.Store)
	}{
		{"a record that was applied is read back with its revision", readBack},
		{"what does not exist is ErrNotFound", notFound},
		{"a change at another revision is ErrConflict and changes nothing", conflict},
		{"either all changes of an Apply are made or none", allOrNone},
		{"a kept record is a condition and stays as it is", keep},
		{"a deleted record is gone and may be made again", deleteAndMakeAgain},
		{"revisions only grow and Rev is the last of them", revisions},
		{"List has prefix, after and order", list},
		{"List yields at most as many as its limit", listLimit},
		{"Count counts what List yields", count},
		{"pages walk every record once while others are written", pages},
		{"List is of one moment even while its reader writes", listSnapshot},
		{"kinds do not see each other", kinds},
		{"what is over a limit is refused and changes nothing", limits},
		{"a context that has ended changes nothing", endedContext},
		{"of many that change one record at one revision exactly one wins", race},
		{"records do not share memory with the caller", noSharing},
		{"everything is there after a restart", restart},
		{"a closed store says so", closed},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := cfg.Open(t)
			t.Cleanup(func() { _ = s.Close() })
			c.run(t, cfg, s)
		})
	}
}

func readBack(t *testing.T, _ Config, s catalog.Store) {
	for _, value := range []string{"{}", "", strings.Repeat("x", catalog.MaxValue)} {
		id := fmt.Sprintf("a%d", len(value))
		rev := mustApply(t, s, put(id, 0, value))
		wantRecord(t, s, id, rev, value)
		again := mustApply(t, s, put(id, rev, "?"))
		wantRecord(t, s, id, again, "?")
	}
}

func notFound(t *testing.T, _ Config, s catalog.Store) {
	mustApply(t, s, put("ab", 0, "{}"))
	for _, id := range []string{"a", "abc", "\x00", "ab\x00"} {
		if _, err := s.Get(t.Context(), catalog.KindKey, id); !errors.Is(err, catalog.ErrNotFound) {
			t.Errorf("Get(%q): %v, want ErrNotFound", id, err)
		}
	}
}

func conflict(t *testing.T, _ Config, s catalog.Store) {
	first := mustApply(t, s, put("a", 0, "1"))
	second := mustApply(t, s, put("a", first, "2"))
	for name, c := range map[string]catalog.Record{
		"made though it exists":    put("a", 0, "x"),
		"changed at an old one":    put("a", first, "x"),
		"changed at a later one":   put("a", second+1, "x"),
		"deleted at an old one":    del("a", first),
		"deleted as if not there":  del("a", 0),
		"changed but not there":    put("b", first, "x"),
		"deleted but not there":    del("b", first),
		"kept at an old one":       keptAt("a", first),
		"kept as if not there":     keptAt("a", 0),
		"kept though it's missing": keptAt("b", second),
	} {
		if _, err := s.Apply(t.Context(), c); !errors.Is(err, catalog.ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", name, err)
		}
	}
	wantRecord(t, s, "a", second, "2")
	wantIDs(t, s, "", "", "a")
	wantRev(t, s, second)
}

func allOrNone(t *testing.T, _ Config, s catalog.Store) {
	a := mustApply(t, s, put("a", 0, "1"), put("b", 0, "1"))
	if _, err := s.Apply(t.Context(), put("a", a, "2"), put("c", 0, "2"), put("b", a+1, "2")); !errors.Is(err, catalog.ErrConflict) {
		t.Fatalf("the last of three changes conflicts: %v, want ErrConflict", err)
	}
	wantRecord(t, s, "a", a, "1")
	wantIDs(t, s, "", "", "a", "b")

	rev := mustApply(t, s, put("a", a, "2"), del("b", a), put("c", 0, "2"))
	wantRecord(t, s, "a", rev, "2")
	wantRecord(t, s, "c", rev, "2")
	wantIDs(t, s, "", "", "a", "c")
}

func keep(t *testing.T, _ Config, s catalog.Store) {
	a := mustApply(t, s, put("a", 0, "1"))
	mustApply(t, s, keptAt("a", a), put("b", 0, "1"), keptAt("missing", 0))
	wantRecord(t, s, "a", a, "1")
	wantIDs(t, s, "", "", "a", "b")

	if _, err := s.Apply(t.Context(), keptAt("a", a+7), put("c", 0, "1")); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("the condition does not hold: %v, want ErrConflict", err)
	}
	wantIDs(t, s, "", "", "a", "b")
}

func deleteAndMakeAgain(t *testing.T, _ Config, s catalog.Store) {
	rev := mustApply(t, s, put("a", 0, "1"))
	mustApply(t, s, del("a", rev))
	if _, err := s.Get(t.Context(), catalog.KindKey, "a"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("after the deletion: %v, want ErrNotFound", err)
	}
	again := mustApply(t, s, put("a", 0, "2"))
	if again <= rev {
		t.Errorf("made again at revision %d, not above %d", again, rev)
	}
	if _, err := s.Apply(t.Context(), put("a", rev, "3")); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("changed at the revision of its former life: %v, want ErrConflict", err)
	}
}

func revisions(t *testing.T, _ Config, s catalog.Store) {
	wantRev(t, s, 0)
	last := uint64(0)
	for i := range 10 {
		rev := mustApply(t, s, put(fmt.Sprint(i), 0, "{}"))
		if rev <= last {
			t.Fatalf("revision %d after %d", rev, last)
		}
		last = rev
		wantRev(t, s, rev)
	}
}

func list(t *testing.T, _ Config, s catalog.Store) {
	wantIDs(t, s, "", "")
	for _, id := range []string{"shop-b", "shop", "a", "shop-a", "zoo", "shop-a-1", "Shop", "ü", "shop\xff"} {
		mustApply(t, s, put(id, 0, id))
	}
	wantIDs(t, s, "", "", "Shop", "a", "shop", "shop-a", "shop-a-1", "shop-b", "shop\xff", "zoo", "ü")
	wantIDs(t, s, "shop", "", "shop", "shop-a", "shop-a-1", "shop-b", "shop\xff")
	wantIDs(t, s, "shop-", "", "shop-a", "shop-a-1", "shop-b")
	wantIDs(t, s, "shop", "shop-a", "shop-a-1", "shop-b", "shop\xff")
	wantIDs(t, s, "shop", "shop-aa", "shop-b", "shop\xff")
	wantIDs(t, s, "shop", "a", "shop", "shop-a", "shop-a-1", "shop-b", "shop\xff")
	wantIDs(t, s, "shop", "t")
	wantIDs(t, s, "none", "")

	n := 0
	for r, err := range s.List(t.Context(), catalog.KindKey, "", "", 0) {
		if err != nil || string(r.Value) != r.ID || r.Kind != catalog.KindKey || r.Rev == 0 {
			t.Errorf("listed %+v, %v", r, err)
		}
		if n++; n == 3 {
			break
		}
	}
}

func listLimit(t *testing.T, _ Config, s catalog.Store) {
	for _, id := range []string{"a", "b/1", "b/2", "b/3", "c"} {
		mustApply(t, s, put(id, 0, id))
	}
	for _, c := range []struct {
		prefix, after string
		limit         int
		want          []string
	}{
		{"", "", 1, []string{"a"}},
		{"", "", 4, []string{"a", "b/1", "b/2", "b/3"}},
		{"", "", 5, []string{"a", "b/1", "b/2", "b/3", "c"}},
		{"", "", 6, []string{"a", "b/1", "b/2", "b/3", "c"}},
		{"b/", "", 2, []string{"b/1", "b/2"}},
		{"b/", "b/2", 2, []string{"b/3"}},
		{"b/", "b/0", 1, []string{"b/1"}},
		{"b/", "b/3", 1, nil},
		{"d", "", 1, nil},
	} {
		if got := ids(t, s, c.prefix, c.after, c.limit); !slices.Equal(got, c.want) {
			t.Errorf("List(%q, after %q, limit %d) is %q, want %q", c.prefix, c.after, c.limit, got, c.want)
		}
	}
}

func count(t *testing.T, _ Config, s catalog.Store) {
	for _, id := range []string{"a", "b/1", "b/2", "b\xff", "b", "bb", "c"} {
		mustApply(t, s, put(id, 0, id))
	}
	for prefix, want := range map[string]int{"": 7, "b": 5, "b/": 2, "b/2": 1, "d": 0} {
		if n, err := s.Count(t.Context(), catalog.KindKey, prefix); n != want || err != nil {
			t.Errorf("Count(%q) is %d, %v, want %d", prefix, n, err, want)
		}
		if n := len(ids(t, s, prefix, "", 0)); n != want {
			t.Errorf("List(%q) has %d records, want %d", prefix, n, want)
		}
	}
	if n, err := s.Count(t.Context(), catalog.KindMember, ""); n != 0 || err != nil {
		t.Errorf("Count of another kind is %d, %v, want 0", n, err)
	}
}

// pages writes behind, before and at the place where the walk is.
func pages(t *testing.T, _ Config, s catalog.Store) {
	const n = 60
	for i := range n {
		mustApply(t, s, put(fmt.Sprintf("%03d", i), 0, strings.Repeat("x", 500)))
	}
	var walked []string
	for after, round := "", 0; ; round++ {
		page := ids(t, s, "", after, 7)
		if len(page) == 0 {
			break
		}
		after = page[len(page)-1]
		walked = append(walked, page...)
		r, err := s.Get(t.Context(), catalog.KindKey, after)
		if err != nil {
			t.Fatal(err)
		}
		mustApply(t, s, put(after, r.Rev, strings.Repeat("y", 5000)), put(fmt.Sprintf("!%03d", round), 0, "behind"))
	}
	var want []string
	for i := range n {
		want = append(want, fmt.Sprintf("%03d", i))
	}
	if !slices.Equal(walked, want) {
		t.Errorf("walked %q, want %q", walked, want)
	}
}

func listSnapshot(t *testing.T, _ Config, s catalog.Store) {
	const n = 50
	for i := range n {
		mustApply(t, s, put(fmt.Sprintf("%03d", i), 0, strings.Repeat("x", 2000)))
	}
	seen := 0
	for r, err := range s.List(t.Context(), catalog.KindKey, "", "", 0) {
		if err != nil {
			t.Fatal(err)
		}
		seen++
		// The store grows a lot, so that a back end which cannot write while it is read hangs here.
		mustApply(t, s, del(r.ID, r.Rev), put("z"+r.ID, 0, strings.Repeat("y", 20000)))
	}
	if seen != n {
		t.Errorf("saw %d records, want the %d that were there at first", seen, n)
	}
}

func kinds(t *testing.T, _ Config, s catalog.Store) {
	for i, k := range catalog.Kinds() {
		mustApply(t, s, catalog.Record{Kind: k, ID: "same", Value: fmt.Appendf(nil, "%d", i)})
	}
	for i, k := range catalog.Kinds() {
		r, err := s.Get(t.Context(), k, "same")
		if err != nil || string(r.Value) != fmt.Sprint(i) || r.Kind != k {
			t.Errorf("Get(%s): %+v, %v", k, r, err)
		}
		n := 0
		for range s.List(t.Context(), k, "", "", 0) {
			n++
		}
		if n != 1 {
			t.Errorf("List(%s) has %d records, want 1", k, n)
		}
	}
}

func limits(t *testing.T, _ Config, s catalog.Store) {
	long := strings.Repeat("i", catalog.MaxID)
	rev := mustApply(t, s, put(long, 0, "{}"))
	wantRecord(t, s, long, rev, "{}")
	for name, c := range map[string]catalog.Record{
		"an ID that is too long":   put(long+"i", 0, "{}"),
		"a value that is too long": put("a", 0, strings.Repeat("v", catalog.MaxValue+1)),
	} {
		if _, err := s.Apply(t.Context(), put("b", 0, "{}"), c); !errors.Is(err, catalog.ErrTooLarge) {
			t.Errorf("%s: %v, want ErrTooLarge", name, err)
		}
	}
	for name, changes := range map[string][]catalog.Record{
		"no ID":                 {put("", 0, "{}")},
		"one record twice":      {put("b", 0, "1"), put("b", 0, "2")},
		"an unknown kind":       {{Kind: "mystery", ID: "b", Value: []byte("{}")}},
		"a kind without a name": {{ID: "b", Value: []byte("{}")}},
	} {
		if _, err := s.Apply(t.Context(), changes...); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	wantIDs(t, s, "", "", long)
}

func endedContext(t *testing.T, _ Config, s catalog.Store) {
	mustApply(t, s, put("a", 0, "{}"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Apply(ctx, put("b", 0, "{}")); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply: %v, want context.Canceled", err)
	}
	if _, err := s.Get(ctx, catalog.KindKey, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get: %v, want context.Canceled", err)
	}
	if _, err := s.Count(ctx, catalog.KindKey, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("Count: %v, want context.Canceled", err)
	}
	for _, err := range s.List(ctx, catalog.KindKey, "", "", 0) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("List: %v, want context.Canceled", err)
		}
	}
	wantIDs(t, s, "", "", "a")
}

func race(t *testing.T, _ Config, s catalog.Store) {
	const callers, rounds = 16, 10
	var wg sync.WaitGroup
	won := make([]int, rounds)
	var mu sync.Mutex // guards won
	for caller := range callers {
		wg.Go(func() {
			for round := range rounds {
				_, err := s.Apply(t.Context(), put(fmt.Sprint(round), 0, fmt.Sprint(caller)), put(fmt.Sprintf("%d/%d", round, caller), 0, "{}"))
				switch {
				case err == nil:
					mu.Lock()
					won[round]++
					mu.Unlock()
				case !errors.Is(err, catalog.ErrConflict):
					t.Errorf("caller %d: %v", caller, err)
				}
			}
		})
	}
	wg.Wait()
	for round, n := range won {
		if n != 1 {
			t.Errorf("round %d has %d winners", round, n)
		}
		n := 0
		for range s.List(t.Context(), catalog.KindKey, fmt.Sprintf("%d/", round), "", 0) {
			n++
		}
		if n != 1 {
			t.Errorf("round %d left %d records of those that lost", round, n-1)
		}
	}
}

func noSharing(t *testing.T, _ Config, s catalog.Store) {
	value := []byte("written")
	rev := mustApply(t, s, catalog.Record{Kind: catalog.KindKey, ID: "a", Value: value})
	copy(value, "altered")
	r, err := s.Get(t.Context(), catalog.KindKey, "a")
	if err != nil {
		t.Fatal(err)
	}
	copy(r.Value, "YYYYYYY")
	for r, err := range s.List(t.Context(), catalog.KindKey, "", "", 0) {
		if err != nil {
			t.Fatal(err)
		}
		copy(r.Value, "ZZZZZZZ")
	}
	wantRecord(t, s, "a", rev, "written")
}

func restart(t *testing.T, cfg Config, s catalog.Store) {
	a := mustApply(t, s, put("a", 0, "1"))
	b := mustApply(t, s, put("b", 0, "1"), put("c", 0, "1"))
	last := mustApply(t, s, put("a", a, "2"), del("c", b))

	s = cfg.Reopen(t, s)
	defer func() { _ = s.Close() }()
	wantRecord(t, s, "a", last, "2")
	wantRecord(t, s, "b", b, "1")
	wantIDs(t, s, "", "", "a", "b")
	wantRev(t, s, last)
	if rev := mustApply(t, s, put("c", 0, "2")); rev <= last {
		t.Errorf("revision %d after the restart, %d before", rev, last)
	}
}

func closed(t *testing.T, _ Config, s catalog.Store) {
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, applied := s.Apply(t.Context(), put("a", 0, "{}"))
	_, got := s.Get(t.Context(), catalog.KindKey, "a")
	_, rev := s.Rev(t.Context())
	_, counted := s.Count(t.Context(), catalog.KindKey, "")
	var listed error
	for _, err := range s.List(t.Context(), catalog.KindKey, "", "", 0) {
		listed = err
	}
	for name, err := range map[string]error{"Apply": applied, "Get": got, "Rev": rev, "List": listed, "Count": counted} {
		if !errors.Is(err, catalog.ErrClosed) {
			t.Errorf("%s: %v, want ErrClosed", name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
}

func put(id string, rev uint64, value string) catalog.Record {
	return catalog.Record{Kind: catalog.KindKey, ID: id, Rev: rev, Value: []byte(value)}
}

func del(id string, rev uint64) catalog.Record {
	return catalog.Record{Kind: catalog.KindKey, ID: id, Rev: rev}
}

func keptAt(id string, rev uint64) catalog.Record {
	return catalog.Record{Kind: catalog.KindKey, ID: id, Rev: rev, Keep: true}
}

func mustApply(t *testing.T, s catalog.Store, changes ...catalog.Record) uint64 {
	t.Helper()
	rev, err := s.Apply(t.Context(), changes...)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func wantRecord(t *testing.T, s catalog.Store, id string, rev uint64, value string) {
	t.Helper()
	r, err := s.Get(t.Context(), catalog.KindKey, id)
	if err != nil {
		t.Fatal(err)
	}
	if r.Kind != catalog.KindKey || r.ID != id || r.Rev != rev || string(r.Value) != value {
		t.Errorf("%q is %s %q at revision %d with %d bytes, want revision %d with %d bytes",
			id, r.Kind, r.ID, r.Rev, len(r.Value), rev, len(value))
	}
}

func wantIDs(t *testing.T, s catalog.Store, prefix, after string, want ...string) {
	t.Helper()
	if got := ids(t, s, prefix, after, 0); !slices.Equal(got, want) {
		t.Errorf("List(%q, after %q) is %q, want %q", prefix, after, got, want)
	}
}

func ids(t *testing.T, s catalog.Store, prefix, after string, limit int) (all []string) {
	t.Helper()
	for r, err := range s.List(t.Context(), catalog.KindKey, prefix, after, limit) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r.ID)
	}
	return all
}

func wantRev(t *testing.T, s catalog.Store, want uint64) {
	t.Helper()
	if got, err := s.Rev(t.Context()); err != nil || got != want {
		t.Errorf("Rev is %d, %v, want %d", got, err, want)
	}
}
