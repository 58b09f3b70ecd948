package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// at is a time as records have it.
func at(seconds int64) time.Time { return time.Unix(seconds, 0).UTC() }

// withDatabase returns a catalog in which the key shop, with one version, has the database
// orders.
func withDatabase(t *testing.T) (*catalog.Catalog, catalog.Key, catalog.Database) {
	t.Helper()
	c := catalog.New(catalogtest.NewMemory())
	key := newKey("shop", newVersion(1))
	key.Databases = []string{"orders"}
	db, key, err := c.CreateDatabase(t.Context(), catalog.Database{Name: "orders", Key: "shop", Created: at(1)}, key)
	if err != nil {
		t.Fatal(err)
	}
	return c, key, db
}

func newDataKey(id string, number, master int) catalog.DataKey {
	return catalog.DataKey{Database: "orders", ID: id, First: at(1), DataVersion: newDataVersion(number, master)}
}

func newDataVersion(number, master int) catalog.DataVersion {
	return catalog.DataVersion{Number: number, Created: at(int64(number)), Master: master, Envelope: fmt.Appendf(nil, "envelope %d", number)}
}

// strangeIDs are what a data key may be called, in the order of their bytes.
var strangeIDs = []string{
	"\x00", "\x00\x00", " ", "/", "//", "/0000000001", "0", "a", "a/", "a/0000000001", "a/0000000001/0000000002", "a/b", "aa",
	strings.Repeat("m", 255), "ü", "\xff", "\xff\xff",
}

func TestDataKeysOfAnyID(t *testing.T) {
	c, key, _ := withDatabase(t)
	for _, id := range strangeIDs {
		dk := must(c.PutDataKey(t.Context(), key, newDataKey(id, 1, 1), nil))
		old := catalog.OldVersion{Database: "orders", ID: id, DataVersion: dk.DataVersion}
		next := newDataKey(id, 2, 1)
		next.Rev = dk.Rev
		must(c.PutDataKey(t.Context(), key, next, &old))
	}
	for _, id := range strangeIDs {
		dk, err := c.DataKey(t.Context(), "orders", id)
		if err != nil || dk.ID != id || dk.Database != "orders" || dk.Number != 2 || string(dk.Envelope) != "envelope 2" {
			t.Errorf("data key %q is %+v, %v", id, dk, err)
		}
		old, err := c.OldVersion(t.Context(), "orders", id, 1)
		if err != nil || old.ID != id || old.Database != "orders" || old.Number != 1 || string(old.Envelope) != "envelope 1" {
			t.Errorf("version 1 of data key %q is %+v, %v", id, old, err)
		}
	}
	for _, id := range []string{"b", "a/0000000002", "\x01"} {
		if _, err := c.DataKey(t.Context(), "orders", id); !errors.Is(err, catalog.ErrNotFound) {
			t.Errorf("data key %q: %v, want ErrNotFound", id, err)
		}
	}
	var listed []string
	for _, dk := range collect(t, c.DataKeys(t.Context(), "orders", "", "", 0)) {
		listed = append(listed, dk.ID)
	}
	if !slices.Equal(listed, strangeIDs) {
		t.Errorf("listed %q, want %q", listed, strangeIDs)
	}
	keys, versions, err := c.CountDataKeys(t.Context(), "orders")
	if err != nil || keys != len(strangeIDs) || versions != 2*len(strangeIDs) {
		t.Errorf("counted %d data keys and %d versions, %v", keys, versions, err)
	}
}

func TestDataKeysPage(t *testing.T) {
	c, key, _ := withDatabase(t)
	for _, id := range strangeIDs {
		must(c.PutDataKey(t.Context(), key, newDataKey(id, 1, 1), nil))
	}
	for limit := 1; limit <= len(strangeIDs)+1; limit++ {
		var walked []string
		for after := ""; ; {
			page := collect(t, c.DataKeys(t.Context(), "orders", "", after, limit))
			if len(page) == 0 {
				break
			}
			for _, dk := range page {
				walked = append(walked, dk.ID)
			}
			after = walked[len(walked)-1]
		}
		if !slices.Equal(walked, strangeIDs) {
			t.Errorf("in pages of %d there are %q, want %q", limit, walked, strangeIDs)
		}
	}
	var below []string
	for _, dk := range collect(t, c.DataKeys(t.Context(), "orders", "a/", "a/0000000001", 0)) {
		below = append(below, dk.ID)
	}
	if want := []string{"a/0000000001/0000000002", "a/b"}; !slices.Equal(below, want) {
		t.Errorf("below a/ after a/0000000001 there are %q, want %q", below, want)
	}
}

func TestOldVersionsPage(t *testing.T) {
	c, key, _ := withDatabase(t)
	want := make(map[string]bool)
	for _, id := range strangeIDs {
		dk := must(c.PutDataKey(t.Context(), key, newDataKey(id, 1, 1), nil))
		for n := 2; n <= 4; n++ {
			old := catalog.OldVersion{Database: "orders", ID: id, DataVersion: dk.DataVersion}
			dk.DataVersion = newDataVersion(n, 1)
			dk = must(c.PutDataKey(t.Context(), key, dk, &old))
			want[fmt.Sprintf("%q %d", id, n-1)] = true
		}
	}
	for _, limit := range []int{0, 1, 2, 7, 1000} {
		walked := make(map[string]bool)
		for last := (catalog.OldVersion{}); ; {
			page := collect(t, c.OldVersions(t.Context(), "orders", last, limit))
			if len(page) == 0 {
				break
			}
			for _, old := range page {
				name := fmt.Sprintf("%q %d", old.ID, old.Number)
				if walked[name] {
					t.Fatalf("in pages of %d, %s comes twice", limit, name)
				}
				walked[name] = true
				last = old
			}
		}
		if !reflect.DeepEqual(walked, want) {
			t.Errorf("in pages of %d there are %d versions, want %d", limit, len(walked), len(want))
		}
	}
}

func TestDatabasesDoNotSeeEachOther(t *testing.T) {
	c := catalog.New(catalogtest.NewMemory())
	for _, name := range []string{"orders", "orders-2", "order"} {
		key := newKey(name, newVersion(1))
		key.Databases = []string{name}
		_, key, err := c.CreateDatabase(t.Context(), catalog.Database{Name: name, Key: name, Created: at(1)}, key)
		if err != nil {
			t.Fatal(err)
		}
		dk := newDataKey("a", 1, 1)
		dk.Database = name
		dk = must(c.PutDataKey(t.Context(), key, dk, nil))
		old := catalog.OldVersion{Database: name, ID: "a", DataVersion: dk.DataVersion}
		dk.DataVersion = newDataVersion(2, 1)
		must(c.PutDataKey(t.Context(), key, dk, &old))
	}
	for _, name := range []string{"orders", "orders-2", "order"} {
		keys, versions, err := c.CountDataKeys(t.Context(), name)
		if err != nil || keys != 1 || versions != 2 {
			t.Errorf("database %s has %d data keys and %d versions, %v", name, keys, versions, err)
		}
		if old := collect(t, c.OldVersions(t.Context(), name, catalog.OldVersion{}, 0)); len(old) != 1 || old[0].Database != name {
			t.Errorf("database %s has the older versions %+v", name, old)
		}
	}
	var names []string
	for _, db := range collect(t, c.Databases(t.Context(), "orders", "", 0)) {
		names = append(names, db.Name)
	}
	if !slices.Equal(names, []string{"orders", "orders-2"}) {
		t.Errorf("databases %v", names)
	}
	if _, err := c.Database(t.Context(), "sales"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a database that is not there: %v", err)
	}
}

func TestWritesThatMustNotHappen(t *testing.T) {
	for _, tc := range []struct {
		name string
		put  func(context.Context, *catalog.Catalog, catalog.Key, catalog.DataKey) error
		says string // "": ErrConflict
	}{
		{"a new data key that exists", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			_, err := c.PutDataKey(ctx, key, newDataKey("a", 1, 1), nil)
			return err
		}, ""},
		{"a version after one that is replaced", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, dk catalog.DataKey) error {
			old := catalog.OldVersion{Database: "orders", ID: "a", DataVersion: dk.DataVersion}
			dk.DataVersion = newDataVersion(2, 1)
			must(c.PutDataKey(ctx, key, dk, &old))
			_, err := c.PutDataKey(ctx, key, dk, &old)
			return err
		}, ""},
		{"a data key after its master key was rotated", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			rotated := key
			rotated.Versions = []catalog.Version{newVersion(1), newVersion(2)}
			must(c.PutKey(ctx, rotated))
			_, err := c.PutDataKey(ctx, key, newDataKey("b", 1, 1), nil)
			return err
		}, ""},
		{"a data key under an older version", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			key.Versions = []catalog.Version{newVersion(1), newVersion(2)}
			_, err := c.PutDataKey(ctx, must(c.PutKey(ctx, key)), newDataKey("b", 1, 1), nil)
			return err
		}, `wrapped under version 1 of key "shop", whose newest enabled version is 2`},
		{"a data key under a version that is disabled", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			key.Versions[0].State = catalog.Disabled
			_, err := c.PutDataKey(ctx, must(c.PutKey(ctx, key)), newDataKey("b", 1, 1), nil)
			return err
		}, "whose newest enabled version is 0"},
		{"a mark on a data key that is replaced", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, dk catalog.DataKey) error {
			must(c.MarkDataKey(ctx, dk))
			_, err := c.MarkDataKey(ctx, dk)
			return err
		}, ""},
		{"a database that exists", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			_, _, err := c.CreateDatabase(ctx, catalog.Database{Name: "orders", Key: "shop"}, key)
			return err
		}, ""},
		{"no ID", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			_, err := c.PutDataKey(ctx, key, newDataKey("", 1, 1), nil)
			return err
		}, "no ID"},
		{"an ID that is too long", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			_, err := c.PutDataKey(ctx, key, newDataKey(strings.Repeat("m", 256), 1, 1), nil)
			return err
		}, "the ID has 256 bytes"},
		{"a database with a slash", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			dk := newDataKey("b", 1, 1)
			dk.Database = "orders/b"
			_, err := c.PutDataKey(ctx, key, dk, nil)
			return err
		}, "has no slash"},
		{"no envelope", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			dk := newDataKey("b", 1, 1)
			dk.Envelope = nil
			_, err := c.PutDataKey(ctx, key, dk, nil)
			return err
		}, "no envelope"},
		{"an envelope that is too large", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			dk := newDataKey("b", 1, 1)
			dk.Envelope = make([]byte, 66<<10)
			_, err := c.PutDataKey(ctx, key, dk, nil)
			return err
		}, "too large"},
		{"version 0", func(ctx context.Context, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey) error {
			_, err := c.PutDataKey(ctx, key, newDataKey("b", 0, 1), nil)
			return err
		}, "version 0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, key, _ := withDatabase(t)
			dk := must(c.PutDataKey(t.Context(), key, newDataKey("a", 1, 1), nil))
			err := tc.put(t.Context(), c, key, dk)
			if tc.says == "" && !errors.Is(err, catalog.ErrConflict) || err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want %q", err, tc.says)
			}
			if _, err := c.DataKey(t.Context(), "orders", "b"); !errors.Is(err, catalog.ErrNotFound) {
				t.Errorf("it was written: %v", err)
			}
		})
	}
}
