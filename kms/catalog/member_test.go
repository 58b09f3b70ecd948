package catalog_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

func TestAMemberIsRemembered(t *testing.T) {
	ctx := t.Context()
	disk := catalogtest.NewMemory()
	c := catalog.New(disk)
	if _, err := c.Member(ctx, "default", "hsm-a"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a member that nothing is known of: %v, want ErrNotFound", err)
	}
	standby := true
	want := catalog.Member{
		Group: "default", Name: "hsm-a", Seen: "0123", Removed: true, Drained: true, Standby: &standby,
		Token: &catalog.Token{Serial: "77", Label: "shop", Model: "SoftHSM v2", Domain: []byte{1, 2}, Place: "ab"},
		Spec:  json.RawMessage(`{"name":"hsm-a"}`),
	}
	got := must(c.UpdateMember(ctx, "default", "hsm-a", func(m *catalog.Member) error {
		if m.Group != "default" || m.Name != "hsm-a" || m.Rev != 0 {
			t.Errorf("a new member begins as %+v", m)
		}
		*m = want
		return nil
	}))
	want.Rev = got.Rev
	must(c.UpdateMember(ctx, "default-2", "hsm-a", func(*catalog.Member) error { return nil })) // another group
	got = must(catalog.New(disk.Reopen()).Member(ctx, "default", "hsm-a"))
	if g, w := string(must(json.Marshal(got))), string(must(json.Marshal(want))); g != w || got.Rev == 0 {
		t.Errorf("read %s at %d\nwant %s at %d", g, got.Rev, w, want.Rev)
	}
	if all := collect(t, c.Members(ctx, "default")); len(all) != 1 || all[0].Name != "hsm-a" {
		t.Errorf("the members are %+v", all)
	}
	refused := errors.New("no")
	if _, err := c.UpdateMember(ctx, "default", "hsm-a", func(*catalog.Member) error { return refused }); !errors.Is(err, refused) {
		t.Errorf("a change that is refused: %v", err)
	}
	for range 2 { // the second time there is nothing
		if err := c.ForgetMember(ctx, "default", "hsm-a"); err != nil {
			t.Fatal(err)
		}
	}
	if all := collect(t, c.Members(ctx, "default")); len(all) != 0 {
		t.Errorf("the members are %+v, want none", all)
	}
}

func TestMembersAreChangedByManyAtOnce(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			if _, err := c.UpdateMember(ctx, "g", "a", func(m *catalog.Member) error {
				m.Seen += string(rune('a' + i))
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if m := must(c.Member(ctx, "g", "a")); len(m.Seen) != 20 {
		t.Errorf("%q holds %d changes, want 20", m.Seen, len(m.Seen))
	}
}

func TestMembersThatCannotBeWritten(t *testing.T) {
	c := catalog.New(catalogtest.NewMemory())
	for name, change := range map[string]func(*catalog.Member){
		"no name":             func(m *catalog.Member) { m.Name = "" },
		"a slash in a name":   func(m *catalog.Member) { m.Name = "a/b" },
		"a slash in a group":  func(m *catalog.Member) { m.Group = "a/b" },
		"a long digest":       func(m *catalog.Member) { m.Seen = strings.Repeat("0", 65) },
		"a long serial":       func(m *catalog.Member) { m.Token = &catalog.Token{Serial: strings.Repeat("0", 257)} },
		"a long description":  func(m *catalog.Member) { m.Spec = json.RawMessage(`"` + strings.Repeat("x", 70000) + `"`) },
		"a description in no": func(m *catalog.Member) { m.Spec = json.RawMessage(`{`) },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.UpdateMember(t.Context(), "g", "a", func(m *catalog.Member) error { change(m); return nil }); err == nil {
				t.Error("it was written")
			}
		})
	}
}

func TestAMemberIsWrittenOrNotWhenACrashComes(t *testing.T) {
	for step := 1; step <= 3; step++ {
		disk := catalogtest.NewMemory()
		crasher := catalogtest.NewCrasher(disk, step)
		_, err := catalog.New(crasher).UpdateMember(t.Context(), "g", "a", func(m *catalog.Member) error { m.Removed = true; return nil })
		_, missing := catalog.New(disk).Member(t.Context(), "g", "a")
		got := fmt.Sprint(errors.Is(err, catalogtest.ErrCrashed), errors.Is(missing, catalog.ErrNotFound))
		if want := map[int]string{1: "true true", 2: "true false", 3: "false false"}[step]; got != want {
			t.Errorf("step %d: crashed, missing: %s, want %s", step, got, want)
		}
	}
}
