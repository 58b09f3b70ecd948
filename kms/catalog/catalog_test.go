package catalog_test

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

func identity(n int) string { return fmt.Sprintf("%032x", n) }

func newKey(name string, versions ...catalog.Version) catalog.Key {
	return catalog.Key{Name: name, Group: "default", Type: "aes-256", MinCopies: 2, Created: time.Unix(1, 0).UTC(), Versions: versions}
}

func newVersion(n int) catalog.Version {
	return catalog.Version{
		Number: n, Identity: identity(n), State: catalog.Enabled, Created: time.Unix(int64(n), 0).UTC(),
		CheckValue: []byte{1, 2, 3}, Copies: []string{"hsm-a", "hsm-b"},
	}
}

func newIntent(key string, version, id int) catalog.Intent {
	return catalog.Intent{
		Identity: identity(id), Op: catalog.IntentCreate, Group: "default", Key: key, Version: version, Started: time.Unix(1, 0).UTC(),
	}
}

func TestCreateRotateDestroy(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())

	in := must(c.Begin(ctx, newIntent("shop", 1, 1), 0))
	if got := collect(t, c.Intents(ctx)); len(got) != 1 || !reflect.DeepEqual(got[0], in) || in.Rev == 0 {
		t.Errorf("intents %+v, want %+v", got, in)
	}
	if _, err := c.Key(ctx, "shop"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a key that is being made: %v, want ErrNotFound", err)
	}
	k := must(c.Commit(ctx, newKey("shop", newVersion(1)), in))
	wantKey(t, c, k)
	if got := collect(t, c.Intents(ctx)); len(got) != 0 {
		t.Errorf("intents %+v after the commit", got)
	}

	in = must(c.Begin(ctx, newIntent("shop", 2, 2), k.Rev))
	k.Versions = append(k.Versions, newVersion(2))
	k = must(c.Commit(ctx, k, in))
	wantKey(t, c, k)

	k.Versions[0].State = catalog.Destroyed
	k, tombs, err := c.Entomb(ctx, k, []catalog.Tombstone{{
		Identity: identity(1), Group: "default", Key: "shop", Version: 1, Destroyed: time.Unix(9, 0).UTC(), Pending: []string{"hsm-a", "hsm-b", "hsm-c"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	wantKey(t, c, k)
	if got := must(c.Tombstone(ctx, identity(1))); got.Rev != tombs[0].Rev || len(got.Pending) != 3 {
		t.Errorf("tombstone %+v, want %+v", got, tombs[0])
	}
	if err := c.Settle(ctx, []string{"hsm-a", "hsm-c"}, identity(1)); err != nil {
		t.Fatal(err)
	}
	if got := must(c.Tombstone(ctx, identity(1))); !slices.Equal(got.Pending, []string{"hsm-b"}) {
		t.Errorf("pending %v, want hsm-b", got.Pending)
	}
	if err := c.Settle(ctx, []string{"hsm-b", "hsm-a"}, identity(1)); err != nil {
		t.Fatal(err)
	}
	if got := collect(t, c.Tombstones(ctx)); len(got) != 1 || len(got[0].Pending) != 0 {
		t.Errorf("tombstones %+v, want one that stays though nothing is pending", got)
	}
}

func TestTwoWhoMakeTheSameVersionConflict(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	first := must(c.Begin(ctx, newIntent("shop", 1, 1), 0))
	if _, err := c.Begin(ctx, newIntent("shop", 1, 2), 0); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("the second begin: %v, want ErrConflict", err)
	}
	if _, err := c.Begin(ctx, newIntent("shop-2", 1, 3), 0); err != nil {
		t.Errorf("a begin of another key: %v", err)
	}
	k := must(c.Commit(ctx, newKey("shop", newVersion(1)), first))
	for name, rev := range map[string]uint64{"as if the key did not exist": 0, "at an old revision": k.Rev - 1} {
		if _, err := c.Begin(ctx, newIntent("shop", 2, 4), rev); !errors.Is(err, catalog.ErrConflict) {
			t.Errorf("a begin %s: %v, want ErrConflict", name, err)
		}
	}
	if got := collect(t, c.Intents(ctx)); len(got) != 1 || got[0].Key != "shop-2" {
		t.Errorf("the losers left %+v", got)
	}
}

func TestAbandonTellsWhetherTheCommitHappened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		for step := 3; step <= 4; step++ { // the commit is the second Apply
			disk := catalogtest.NewMemory()
			crasher := catalogtest.NewCrasher(disk, step)
			c := catalog.New(crasher)
			in := must(c.Begin(ctx, newIntent("shop", 1, 1), 0))
			if _, err := c.Commit(ctx, newKey("shop", newVersion(1)), in); !errors.Is(err, catalogtest.ErrCrashed) {
				t.Fatalf("step %d: %v, want the crash", step, err)
			}

			c = catalog.New(disk)
			tomb, err := c.Abandon(ctx, in, []string{"hsm-a"})
			_, missing := c.Key(ctx, "shop")
			if step == 3 {
				if err != nil || !errors.Is(missing, catalog.ErrNotFound) {
					t.Errorf("not committed: abandon %v, key %v", err, missing)
				}
				if got := must(c.Tombstone(ctx, identity(1))); got.Rev != tomb.Rev || got.Key != "shop" || got.Version != 1 || !got.Destroyed.Equal(time.Now()) {
					t.Errorf("tombstone %+v, want %+v", got, tomb)
				}
				if got := collect(t, c.Intents(ctx)); len(got) != 0 {
					t.Errorf("intents %+v are left", got)
				}
			}
			if step == 4 && (!errors.Is(err, catalog.ErrConflict) || missing != nil) {
				t.Errorf("committed: abandon %v, want ErrConflict; key %v", err, missing)
			}
		}
	})
}

func TestKeysPage(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	for _, name := range []string{"b", "a-2", "a-1", "a-3"} {
		must(c.PutKey(ctx, newKey(name)))
	}
	var got []string
	for k, err := range c.Keys(ctx, "a-", "a-1", 0) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, k.Name)
	}
	if !slices.Equal(got, []string{"a-2", "a-3"}) {
		t.Errorf("keys %v", got)
	}
}

func TestPutKeysIsAllOrNone(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	a, b := must(c.PutKey(ctx, newKey("a"))), must(c.PutKey(ctx, newKey("b")))
	changed := must(c.PutKey(ctx, b))
	a.MinCopies = 7
	if _, err := c.PutKeys(ctx, a, b); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("one of two is old: %v, want ErrConflict", err)
	}
	if got := must(c.Key(ctx, "a")); got.MinCopies == 7 {
		t.Error("the other one was written")
	}
	both := must(c.PutKeys(ctx, a, changed))
	wantKey(t, c, both[0])
	wantKey(t, c, both[1])
	if a.Rev == both[0].Rev {
		t.Error("PutKeys changed its argument")
	}
}

func TestUpdateKeyAndSettleLoseNothingToEachOther(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	must(c.PutKey(ctx, newKey("shop", newVersion(1))))
	members := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
	var identities []string
	for i := range 3 * catalog.BatchSize {
		in := must(c.Begin(ctx, newIntent("shop", 100+i, i), must(c.Key(ctx, "shop")).Rev))
		must(c.Abandon(ctx, in, members))
		identities = append(identities, identity(i))
	}
	identities = append(identities, identities[0]) // one of them twice
	var wg sync.WaitGroup
	for _, m := range members {
		wg.Go(func() {
			if _, err := c.UpdateKey(ctx, "shop", func(k *catalog.Key) error {
				k.Versions[0].Copies = append(k.Versions[0].Copies, m)
				return nil
			}); err != nil {
				t.Error(err)
			}
			if err := c.Settle(ctx, []string{m}, identities...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := must(c.Key(ctx, "shop")).Versions[0].Copies; len(got) != 2+len(members) {
		t.Errorf("copies %v", got)
	}
	for _, tomb := range collect(t, c.Tombstones(ctx)) {
		if len(tomb.Pending) != 0 {
			t.Fatalf("%s is still pending on %v", tomb.Identity, tomb.Pending)
		}
	}
}

func TestUpdateKeyEndsWithTheErrorOfItsChange(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	before := must(c.PutKey(ctx, newKey("shop")))
	wrong := errors.New("wrong state")
	if _, err := c.UpdateKey(ctx, "shop", func(k *catalog.Key) error { k.MinCopies = 9; return wrong }); !errors.Is(err, wrong) {
		t.Errorf("%v, want the error of the change", err)
	}
	wantKey(t, c, before)
	if _, err := c.UpdateKey(ctx, "none", nil); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("%v, want ErrNotFound", err)
	}
}

func TestWritingRefusesWhatCannotBeMeant(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	version := func(change func(*catalog.Version)) catalog.Key {
		v := newVersion(1)
		change(&v)
		return newKey("shop", v)
	}
	cases := []struct {
		name string
		key  catalog.Key
		says string
	}{
		{"no name", newKey(""), "no name"},
		{"a name that is too long", newKey(strings.Repeat("n", catalog.MaxID+1)), "too large"},
		{"a version twice", newKey("shop", newVersion(1), newVersion(1)), "version 1 after version 1"},
		{"versions out of order", newKey("shop", newVersion(2), newVersion(1)), "version 1 after version 2"},
		{"version zero", newKey("shop", newVersion(0)), "version 0"},
		{"a state of its own", version(func(v *catalog.Version) { v.State = "lost" }), `unknown state "lost"`},
		{"no identity", version(func(v *catalog.Version) { v.Identity = "" }), "no identity"},
		{"a member without a name", version(func(v *catalog.Version) { v.Copies = []string{""} }), "no member"},
		{"a public key that is too large", version(func(v *catalog.Version) { v.Public = make([]byte, 1<<16) }), "too large"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := c.PutKey(ctx, tc.key); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want %q", err, tc.says)
			}
		})
	}
	in := must(c.Begin(ctx, newIntent("shop", 1, 1), 0))
	if _, err := c.Commit(ctx, newKey("shop", newVersion(2)), in); err == nil {
		t.Error("a key without the version of the intent is committed")
	}
	in.Op = "erase"
	if _, err := c.Begin(ctx, in, 0); err == nil || !strings.Contains(err.Error(), `unknown operation "erase"`) {
		t.Errorf("an unknown operation: %v", err)
	}
}

func TestReadingRefusesWhatItDoesNotKnow(t *testing.T) {
	const whole = `{"schema":1,"name":"shop","group":"default","type":"aes-256","min_copies":2,"created":"2026-01-02T03:04:05Z","versions":null}`
	cases := []struct {
		name, value string
		is          error
		says        string
	}{
		{"a higher schema, by its number", `{"schema":7,"name":"shop","novelty":1}`, catalog.ErrSchema, "schema 7, this kmsd knows schema 2"},
		{"no schema", `{"name":"shop"}`, catalog.ErrSchema, "schema 0"},
		{"a field of a newer kmsd, which the next write would lose", strings.Replace(whole, "{", `{"novelty":1,`, 1), catalog.ErrDamaged, `"novelty"`},
		{"something after the record", whole + "{}", catalog.ErrDamaged, "after top-level value"},
		{"a record in another's place", strings.Replace(whole, `"shop"`, `"till"`, 1), catalog.ErrDamaged, `it says that it is "till"`},
		{"half a record", whole[:50], catalog.ErrDamaged, "unexpected end"},
		{"nothing", "", catalog.ErrDamaged, `key "shop"`},
		{"an unknown state", strings.Replace(whole, "null", `[{"number":1,"identity":"x","state":"odd"}]`, 1), catalog.ErrDamaged, `unknown state "odd"`},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			s := catalogtest.NewMemory()
			must(s.Apply(t.Context(), catalog.Record{Kind: catalog.KindKey, ID: "shop", Value: []byte(tc.value)}))
			_, err := catalog.New(s).Key(t.Context(), "shop")
			if !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want %q", err, tc.says)
			}
			var listed error
			for _, err := range catalog.New(s).Keys(t.Context(), "", "", 0) {
				listed = err
			}
			if !errors.Is(listed, tc.is) {
				t.Errorf("listing: %v, want %v", listed, tc.is)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func collect[T any](t *testing.T, seq func(func(T, error) bool)) []T {
	t.Helper()
	var all []T
	for v, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, v)
	}
	return all
}

func wantKey(t *testing.T, c *catalog.Catalog, want catalog.Key) {
	t.Helper()
	got, err := c.Key(t.Context(), want.Name)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("key %+v\nwant %+v", got, want)
	}
}
