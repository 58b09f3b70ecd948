package boltcat_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"kmsd/kms/catalog"
)

// testdata/schema1.db was written by the last kmsd that knew schema 1. It is never
// made anew.
func TestAFileOfSchema1IsReadAndRaised(t *testing.T) {
	old, err := os.ReadFile("testdata/schema1.db")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "catalog.db")
	write(t, path, old)

	for _, opened := range []string{"the first time", "again"} {
		s := mustOpen(t, path)
		c := catalog.New(s)
		shop, err := c.Key(t.Context(), "shop")
		if err != nil {
			t.Fatalf("opened %s: %v", opened, err)
		}
		if len(shop.Versions) != 2 || shop.Versions[0].State != catalog.Destroyed || shop.Versions[1].Identity != fmt.Sprintf("%032x", 2) ||
			shop.RotationPeriod != 720*time.Hour || !slices.Equal(shop.Versions[1].Copies, []string{"hsm-a", "hsm-b"}) || len(shop.Databases) != 0 {
			t.Errorf("opened %s: key %+v", opened, shop)
		}
		till, err := c.Key(t.Context(), "till")
		if err != nil || till.Versions[0].Before != catalog.Disabled || till.Versions[0].DestroyAt == nil {
			t.Errorf("opened %s: key %+v, %v", opened, till, err)
		}
		tomb, err := c.Tombstone(t.Context(), fmt.Sprintf("%032x", 1))
		if err != nil || !slices.Equal(tomb.Pending, []string{"hsm-c"}) {
			t.Errorf("opened %s: tombstone %+v, %v", opened, tomb, err)
		}
		member, err := c.Member(t.Context(), "default", "hsm-a")
		if err != nil || !member.Drained {
			t.Errorf("opened %s: member %+v, %v", opened, member, err)
		}
		for in, err := range c.Intents(t.Context()) {
			if err != nil || in.Key != "ware" {
				t.Errorf("opened %s: intent %+v, %v", opened, in, err)
			}
		}
		s.Close()
	}
	// What an older kmsd looks at first, and refuses.
	alter(t, path, func(tx *bolt.Tx) error {
		if got := tx.Bucket([]byte("meta")).Get([]byte("schema")); string(got) != "2" {
			t.Errorf("the file says schema %q, want 2", got)
		}
		return nil
	})
}

func TestAKeyOfSchema1GetsADatabase(t *testing.T) {
	old, err := os.ReadFile("testdata/schema1.db")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "catalog.db")
	write(t, path, old)
	s := mustOpen(t, path)
	c := catalog.New(s)
	shop, err := c.Key(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	shop.Databases = []string{"orders"}
	db := catalog.Database{Name: "orders", Key: "shop", Created: time.Unix(5, 0).UTC()}
	if _, _, err := c.CreateDatabase(t.Context(), db, shop); err != nil {
		t.Fatal(err)
	}
	s.Close()

	s = mustOpen(t, path)
	defer s.Close()
	c = catalog.New(s)
	if got, err := c.Key(t.Context(), "shop"); err != nil || !slices.Equal(got.Databases, []string{"orders"}) || len(got.Versions) != 2 {
		t.Errorf("key %+v, %v", got, err)
	}
	if got, err := c.Database(t.Context(), "orders"); err != nil || got.Key != "shop" {
		t.Errorf("database %+v, %v", got, err)
	}
}
