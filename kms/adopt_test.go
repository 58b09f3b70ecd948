package kms_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// makeBehind makes a key on a member's token that kmsd knows nothing of.
func (h *hsm) makeBehind(t *testing.T, n byte, typ pluginproto.KeyType, label string) pluginproto.Object {
	t.Helper()
	o, err := h.behind(t).Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{n}, Type: typ, Label: label})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

var adopting = api.SyncOptions{Adopt: true}

func TestAdoptionMakesAMasterKeyOfAnObjectThatNobodyKnows(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.AES128, pluginproto.HMACSHA256, pluginproto.ECP256} {
		t.Run(string(typ), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				o := r.hsms[1].makeBehind(t, 1, typ, "till")

				_, by := r.sync(api.SyncOptions{})
				want := api.Object{Identity: o.ID.String(), Label: "till", Type: string(typ), CheckValue: hex.EncodeToString(o.CheckValue)}
				if f := by["hsm-b"].Foreign; len(f) != 1 || f[0] != want {
					t.Errorf("unknown objects %+v, want %+v", f, want)
				}
				if _, err := r.Key(t.Context(), "till"); err == nil {
					t.Error("it was adopted though nobody asked")
				}

				report, by := r.sync(adopting)
				if fmt.Sprint(report.Adopted) != "[till]" || len(by["hsm-b"].Foreign) != 1 || by["hsm-b"].Foreign[0] != want {
					t.Fatalf("adopted %v, unknown objects %+v", report.Adopted, by["hsm-b"].Foreign)
				}
				key, err := r.Key(t.Context(), "till")
				if err != nil || key.Type != string(typ) || key.MinCopies != 2 || key.Primary != 1 ||
					fmt.Sprint(key.Versions[0].Copies) != "[hsm-a hsm-b hsm-c]" || !bytes.Equal(key.Versions[0].PublicKey, o.Public) {
					t.Errorf("the key is %+v, %v", key, err)
				}
				r.wantConsistent()
				r.wantVerified("till")
				for _, h := range r.hsms {
					r.wantServesAlone(h, "till", typ)
				}
				if report, by = r.sync(adopting); report.Adopted != nil || by["hsm-b"].Foreign != nil {
					t.Errorf("once more: adopted %v, unknown %v", report.Adopted, by["hsm-b"].Foreign)
				}
				if n, err := r.Rotate(t.Context(), "till"); err != nil || n != 2 {
					t.Errorf("Rotate = %d, %v", n, err)
				}
			})
		})
	}
}

// The tokens are whole, the catalog is gone: kmsd knows its own keys by their labels.
func TestAdoptionBringsBackTheKeysOfALostCatalog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		wrapped := [][]byte{r.wrap("shop")}
		for range 10 { // so that the versions are not in the order of their labels
			if _, err := r.Rotate(t.Context(), "shop"); err != nil {
				t.Fatal(err)
			}
			wrapped = append(wrapped, r.wrap("shop"))
		}
		r.create("till")
		till := r.wrap("till")
		r.stop()
		r.disk = catalogtest.NewMemory()
		r.mustStart()
		r.wantStates(active, active, active)

		report, _ := r.sync(adopting)
		if fmt.Sprint(report.Adopted) != "[shop till]" {
			t.Fatalf("adopted %v: %+v", report.Adopted, report.Members)
		}
		for _, w := range wrapped {
			r.wantUnwrap("shop", w)
		}
		r.wantUnwrap("till", till)
		r.wantConsistent()
		r.wantVerified("shop")
		if n, err := r.Rotate(t.Context(), "shop"); err != nil || n != 12 {
			t.Errorf("Rotate = %d, %v", n, err)
		}
	})
}

func TestAKeyIsAdoptedWithAllItsVersionsOrNotAtAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.hsms[0].makeBehind(t, 1, pluginproto.AES256, "till/1")
		r.hsms[0].makeBehind(t, 2, pluginproto.AES128, "till/2")
		r.hsms[0].makeBehind(t, 3, pluginproto.AES256, "shop/0")
		r.hsms[0].makeBehind(t, 4, pluginproto.AES256, "late/7")
		report, by := r.sync(adopting)
		if fmt.Sprint(report.Adopted) != "[late]" {
			t.Errorf("adopted %v", report.Adopted)
		}
		for _, o := range by["hsm-a"].Foreign {
			want := map[string]string{"shop/0": `its label "shop/0" cannot be`, "till/1": "of different types", "till/2": "of different types", "late/7": ""}[o.Label]
			if !strings.Contains(o.Refused, want) || (o.Refused == "") != (want == "") {
				t.Errorf("%s: refused because %q, want %q", o.Label, o.Refused, want)
			}
		}
		key, err := r.Key(t.Context(), "late")
		if err != nil || len(key.Versions) != 1 || key.Primary != 7 {
			t.Errorf("the key is %+v, %v", key, err)
		}
		r.wantUnwrap("late", r.wrap("late"))
	})
}

// wantServesAlone uses a key on one member only.
func (r *rig) wantServesAlone(only *hsm, name string, typ pluginproto.KeyType) {
	r.t.Helper()
	switch typ {
	case pluginproto.AES256, pluginproto.AES128:
		r.wantUnwrapOn(only, name, r.wrap(name))
	case pluginproto.HMACSHA256:
		if _, err := r.MAC(r.t.Context(), name, api.MACRequest{Message: []byte("message")}); err != nil {
			r.t.Error(err)
		}
	default:
		if _, err := r.Sign(r.t.Context(), name, api.SignRequest{Digest: make([]byte, 32)}); err != nil {
			r.t.Error(err)
		}
	}
}

func TestAdoptionRefusesWhatCannotBecomeAMasterKey(t *testing.T) {
	forbidden := &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: 0x68, Op: "using the key"}    // CKR_KEY_FUNCTION_NOT_PERMITTED
	unextractable := &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: 0x6A, Op: "wrapping key"} // CKR_KEY_UNEXTRACTABLE
	full := &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: 0x31, Op: "unwrapping a key"}     // CKR_DEVICE_MEMORY
	make1 := func(label string) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) { r.hsms[0].makeBehind(t, 1, pluginproto.AES256, label) }
	}
	for _, c := range []struct {
		name    string
		prepare func(*testing.T, *rig)
		says    string
	}{
		{"it has no label", make1(""), `its label "" cannot be the name of a key: the key has no name`},
		{"its label is no name", make1("My key"), `its label "My key" cannot be the name of a key`},
		{"a key has that name", func(t *testing.T, r *rig) {
			r.create("till")
			make1("till")(t, r)
		}, `there is a key "till" already`},
		{"a key had that name", func(t *testing.T, r *rig) {
			r.create("till")
			if _, err := r.Destroy(t.Context(), "till", 0); err != nil {
				t.Fatal(err)
			}
			make1("till")(t, r)
		}, "names are not used again"},
		{"two objects have the label", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			r.hsms[1].makeBehind(t, 2, pluginproto.AES256, "till")
		}, `have both the label "till"`},
		{"two members hold different keys under its identity", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			r.hsms[1].makeBehind(t, 1, pluginproto.AES256, "till")
		}, "members hsm-a and hsm-b hold different keys under this identity"},
		{"its token does not let it out", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: unextractable})
		}, "it cannot be cloned: member hsm-a: wrapping key: CKR_KEY_UNEXTRACTABLE"},
		{"it may not unwrap", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Err: forbidden})
		}, "it cannot unwrap: member hsm-a: using the key: CKR_KEY_FUNCTION_NOT_PERMITTED"},
		{"nobody else has room for it", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			for _, h := range r.hsms[1:] {
				h.driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: full})
			}
		}, "key till needs 2 copies, but only hsm-a could take one (hsm-b: cloning key till version 1"},
		{"too few members are there", func(t *testing.T, r *rig) {
			make1("till")(t, r)
			r.hsms[1].leave()
			r.hsms[2].leave()
			r.wantStates(active, down, down)
		}, "key till needs 2 copies, but only hsm-a could take one (hsm-b is down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				c.prepare(t, r)
				_, before := r.Key(t.Context(), "till")
				report, by := r.sync(adopting)
				f := by["hsm-a"].Foreign
				if report.Adopted != nil || len(f) != 1 || !strings.Contains(f[0].Refused, c.says) {
					t.Errorf("adopted %v, unknown objects %+v, want it refused: %s", report.Adopted, f, c.says)
				}
				if _, after := r.Key(t.Context(), "till"); (before == nil) != (after == nil) {
					t.Errorf("key till: %v, before %v", after, before)
				}
				if !r.hsms[0].holds(pluginproto.KeyID{1}) {
					t.Error("the object is gone")
				}
			})
		})
	}
}

func (h *hsm) setStep(step func(*hsm)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.step = step
}

func (h *hsm) holds(id pluginproto.KeyID) bool {
	for _, have := range h.token.Keys() {
		if have == id {
			return true
		}
	}
	return false
}

// An adoption that is broken off never destroys what it would have adopted, and the
// next one ends it.
func TestAdoptionThatIsBrokenOffIsEndedByTheNext(t *testing.T) {
	after := func(t *testing.T, r *rig, o pluginproto.Object) {
		t.Helper()
		for _, h := range r.hsms {
			h.setStep(nil)
		}
		r.wantStates(active, active, active)
		if !r.hsms[0].holds(o.ID) {
			t.Fatal("the object is gone")
		}
		r.eventually(func() error {
			_, err := r.Sync(t.Context(), "", adopting)
			if err == nil {
				_, err = r.Key(t.Context(), "till")
			}
			return err
		})
		r.wantConsistent()
		r.wantVerified("till")
		key, err := r.Key(t.Context(), "till")
		if err != nil || key.Versions[0].CheckValue != hex.EncodeToString(o.CheckValue) {
			t.Errorf("the key is %+v, %v; its object's check value was %x", key, err, o.CheckValue)
		}
		r.wantUnwrap("till", r.wrap("till"))
	}
	t.Run("by a crash of kmsd at a driver step", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3)
			store := catalogtest.NewCrasher(r.disk.Reopen(), 1<<30)
			r.mustStartOn(store)
			o := r.hsms[0].makeBehind(t, 1, pluginproto.AES256, "till")
			reached := r.interrupt(int64(step), func(*hsm) {
				store.Crash()
				for _, h := range r.hsms {
					h.leave()
				}
			})
			_, _ = r.Sync(t.Context(), "", adopting) // nobody is left to hear the answer
			more = reached()
			r.stop()
			for _, h := range r.hsms {
				h.setStep(nil)
				h.come()
			}
			r.mustStart()
			defer r.stop()
			after(t, r, o)
			return more
		})
	})
	t.Run("by a crash of a member at a driver step", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3).mustStart()
			defer r.stop()
			o := r.hsms[0].makeBehind(t, 1, pluginproto.AES256, "till")
			reached := r.interrupt(int64(step), func(h *hsm) { h.driver().Crash() })
			r.sync(adopting)
			more = reached()
			after(t, r, o)
			return more
		})
	})
	t.Run("by a caller who goes away", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3).mustStart()
			defer r.stop()
			o := r.hsms[0].makeBehind(t, 1, pluginproto.AES256, "till")
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			reached := r.interrupt(int64(step), func(*hsm) { leave() })
			if _, err := r.Sync(ctx, "", adopting); err != nil {
				wantError(t, err, kms.ErrDeadline, "")
			}
			more = reached()
			after(t, r, o)
			return more
		})
	})
	t.Run("by a failure of the catalog", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3)
			store := &flaky{Store: r.disk.Reopen()}
			r.mustStartOn(store)
			defer r.stop()
			o := r.hsms[0].makeBehind(t, 1, pluginproto.AES256, "till")
			store.mu.Lock()
			store.after = store.writes + step
			store.mu.Unlock()
			_, _ = r.Sync(t.Context(), "", adopting)
			store.mu.Lock()
			more = store.writes >= store.after
			store.mu.Unlock()
			after(t, r, o)
			return more
		})
	})
}
