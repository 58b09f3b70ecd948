package catalogtest_test

import (
	"context"
	"errors"
	"testing"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

func TestMemoryIsAStore(t *testing.T) {
	catalogtest.Run(t, catalogtest.Config{
		Open: func(*testing.T) catalog.Store { return catalogtest.NewMemory() },
		Reopen: func(t *testing.T, s catalog.Store) catalog.Store {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			return s.(*catalogtest.Memory).Reopen()
		},
	})
}

func TestCrasherStopsBeforeAndAfterEachWrite(t *testing.T) {
	story := func(ctx context.Context, s catalog.Store) (acknowledged int) {
		for _, id := range []string{"a", "b"} {
			if _, err := s.Apply(ctx, catalog.Record{Kind: catalog.KindKey, ID: id, Value: []byte("{}")}); err != nil {
				break
			}
			acknowledged++
		}
		return acknowledged
	}
	want := []struct{ acknowledged, written int }{{0, 0}, {0, 1}, {1, 1}, {1, 2}}
	for step := 1; ; step++ {
		disk := catalogtest.NewMemory()
		c := catalogtest.NewCrasher(disk, step)
		acknowledged := story(t.Context(), c)
		written := 0
		for range disk.List(t.Context(), catalog.KindKey, "", "", 0) {
			written++
		}
		if !c.Crashed() {
			if step != len(want)+1 || acknowledged != 2 {
				t.Errorf("the story ended at step %d with %d acknowledged", step, acknowledged)
			}
			break
		}
		if w := want[step-1]; acknowledged != w.acknowledged || written != w.written {
			t.Errorf("step %d: %d acknowledged and %d written, want %+v", step, acknowledged, written, w)
		}
		if _, err := c.Get(t.Context(), catalog.KindKey, "a"); !errors.Is(err, catalogtest.ErrCrashed) {
			t.Errorf("step %d: reading after the crash: %v, want ErrCrashed", step, err)
		}
		if _, err := c.Rev(t.Context()); !errors.Is(err, catalogtest.ErrCrashed) {
			t.Errorf("step %d: Rev after the crash: %v, want ErrCrashed", step, err)
		}
	}
}
