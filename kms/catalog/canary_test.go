package catalog_test

import (
	"errors"
	"slices"
	"testing"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

func TestACanaryLeavesNothing(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*testing.T, *catalog.Catalog, catalog.Intent)
	}{
		{"when it ends as it should", func(t *testing.T, c *catalog.Catalog, in catalog.Intent) {
			if err := c.EndCanary(t.Context(), in); err != nil {
				t.Fatal(err)
			}
			if err := c.EndCanary(t.Context(), in); !errors.Is(err, catalog.ErrConflict) {
				t.Errorf("ending it twice: %v, want ErrConflict", err)
			}
		}},
		{"when it is taken back and all members that may hold it have destroyed it", func(t *testing.T, c *catalog.Catalog, in catalog.Intent) {
			tomb := must(c.Abandon(t.Context(), in, []string{"hsm-a", "hsm-b", "hsm-c"}))
			if !slices.Equal(tomb.Pending, []string{"hsm-a", "hsm-d"}) {
				t.Errorf("pending on %v, want the two that the intent names", tomb.Pending)
			}
			for _, m := range []string{"hsm-b", "hsm-d", "hsm-a"} {
				if got := collect(t, c.Tombstones(t.Context())); len(got) != 1 {
					t.Errorf("tombstones %+v while some member may hold it", got)
				}
				if err := c.Settle(t.Context(), []string{m}, identity(1)); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Settle(t.Context(), []string{"hsm-a"}, identity(1)); err != nil {
				t.Errorf("settling it once more: %v", err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := catalog.New(catalogtest.NewMemory())
			in := must(c.BeginCanary(t.Context(), "default", identity(1), "hsm-a", "hsm-d"))
			if got := collect(t, c.Intents(t.Context())); len(got) != 1 || got[0].Op != catalog.IntentCanary {
				t.Errorf("intents %+v", got)
			}
			tc.end(t, c, in)
			if intents, tombs := collect(t, c.Intents(t.Context())), collect(t, c.Tombstones(t.Context())); len(intents)+len(tombs) != 0 {
				t.Errorf("left: %+v %+v", intents, tombs)
			}
		})
	}
}

func TestOnlyACanaryIsEndedWithoutATombstone(t *testing.T) {
	c := catalog.New(catalogtest.NewMemory())
	in := must(c.Begin(t.Context(), newIntent("shop", 1, 1), 0))
	if err := c.EndCanary(t.Context(), in); err == nil {
		t.Error("the intent of a key was removed")
	}
	if got := collect(t, c.Intents(t.Context())); len(got) != 1 {
		t.Errorf("intents %+v, want the key's", got)
	}
}
