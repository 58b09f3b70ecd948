package kms_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

func TestKeyIsChangedWhileItRotates(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*rig) error
		want   error
		text   string
	}{
		{"an update joins the new version", func(r *rig) error {
			one := 1
			_, err := r.UpdateKey(r.t.Context(), "shop", kms.KeyUpdate{MinCopies: &one})
			return err
		}, nil, ""},
		{"disabling it wins", func(r *rig) error {
			_, err := r.Disable(r.t.Context(), "shop")
			return err
		}, kms.ErrState, "key shop is disabled"},
		{"scheduling its destruction wins", func(r *rig) error {
			_, err := r.Destroy(r.t.Context(), "shop", time.Hour)
			return err
		}, kms.ErrState, "key shop is scheduled for destruction"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				release := make(chan struct{})
				r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Times: 1, Hang: release})
				done := make(chan error, 1)
				go func() {
					_, err := r.Rotate(t.Context(), "shop")
					done <- err
				}()
				synctest.Wait()
				if err := c.change(r); err != nil {
					t.Fatal(err)
				}
				close(release)
				err := <-done
				key, _ := r.Key(t.Context(), "shop")
				if c.want != nil {
					wantError(t, err, c.want, c.text)
					if len(key.Versions) != 1 {
						t.Errorf("it has %d versions", len(key.Versions))
					}
				} else if err != nil || key.Primary != 2 || key.MinCopies != 1 {
					t.Errorf("%+v, %v", key, err)
				}
				r.wantConsistent()
			})
		})
	}
}

func TestKeyIsChangedWhileAMemberComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		r.create("store")
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				for _, do := range []func(context.Context, string) (kms.Key, error){r.Disable, r.Enable} {
					if _, err := do(t.Context(), "shop"); err != nil {
						t.Error(err)
					}
				}
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
			}
		})
		r.hsms[2].come()
		r.wantStates(active, active, active)
		close(stop)
		wg.Wait()
		r.wantConsistent()
	})
}

func TestMemberThatCannotDestroyNowDoesItLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		synctest.Wait() // for the janitor's look around after that
		r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallDestroy, Times: 1,
			Err: &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0xB1, Op: "opening a session"}})
		if _, err := r.Destroy(t.Context(), "shop", 0); err != nil {
			t.Fatal(err)
		}
		if n := len(r.hsms[1].token.Keys()); n != 1 {
			t.Fatalf("hsm-b holds %d keys, want the one it could not destroy", n)
		}
		r.wantConsistent()
	})
}

// moved is a store in which a record changes just before the first intent is written.
type moved struct {
	catalog.Store
	change func()
}

func (m *moved) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	change := m.change
	if change != nil && slices.ContainsFunc(changes, func(r catalog.Record) bool { return r.Kind == catalog.KindIntent && r.Rev == 0 }) {
		m.change = nil
		change()
	}
	return m.Store.Apply(ctx, changes...)
}

// What a member that comes back holds is noted whenever that happens, also between a
// rotation's look at the key and its intent.
func TestKeyIsNotedSomewhereWhileItsRotationBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		store := &moved{Store: r.disk.Reopen()}
		r.mustStartOn(store)
		defer r.stop()
		r.create("shop")
		store.change = func() {
			one := 1
			if _, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{MinCopies: &one}); err != nil {
				t.Error(err)
			}
		}
		if n, err := r.Rotate(t.Context(), "shop"); n != 2 || err != nil {
			t.Errorf("rotating gave version %d and %v, want 2", n, err)
		}
		r.wantConsistent()
	})
}

// bare hides all of a driver but what the contract has.
type bare struct{ pluginproto.Driver }

func TestDriverThatIsNoProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		for i, h := range r.hsms {
			r.group.Members[i].Open = func(ctx context.Context) (pluginproto.Driver, error) {
				d, err := h.open(ctx)
				return bare{d}, err
			}
		}
		r.mustStart()
		defer r.stop()
		r.create("shop")
		r.wantUnwrap("shop", r.wrap("shop"))
		if pid := r.Status().Groups[0].Members[0].DriverPID; pid != 0 {
			t.Errorf("its process is %d", pid)
		}
	})
}

// liar answers with what it should not.
type liar struct {
	*memdriver.Driver
	object func(*pluginproto.Object)
	result func(*pluginproto.Result)
}

func (l *liar) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	o, err := l.Driver.Generate(ctx, spec)
	if l.object != nil {
		l.object(&o)
	}
	return o, err
}

func (l *liar) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	res, err := l.Driver.Do(ctx, cmd)
	if l.result != nil && cmd.Op != pluginproto.OpProbe {
		l.result(&res)
	}
	return res, err
}

func TestDriverThatLies(t *testing.T) {
	for _, c := range []struct {
		name string
		lie  liar
		do   func(*rig) error
		want error
		text string
	}{
		{"another identity", liar{object: func(o *pluginproto.Object) { o.ID[0]++ }}, createShop, kms.ErrUnavailable, "the driver answered with another key"},
		{"no check value", liar{object: func(o *pluginproto.Object) { o.CheckValue = nil }}, createShop, kms.ErrUnavailable, "the driver gave no check value"},
		{"a ciphertext cut short", liar{result: func(r *pluginproto.Result) { r.Output = r.Output[:3] }}, wrapInShop, kms.ErrUnavailable, "the driver answered with 3 bytes, want 20"},
		{"an IV of zeros", liar{result: func(r *pluginproto.Result) { r.IV = make([]byte, 12) }}, wrapInShop, kms.ErrUnavailable, "an IV of zeros"},
		{"an IV that no envelope can have", liar{result: func(r *pluginproto.Result) { r.IV = make([]byte, 13) }}, wrapInShop, kms.ErrUnavailable, "an IV of 13 bytes, want 12 or 16"},
		{"no IV", liar{result: func(r *pluginproto.Result) { r.IV = nil }}, wrapInShop, kms.ErrUnavailable, "an IV of 0 bytes"},
		{"one IV for two items", liar{result: func(r *pluginproto.Result) { r.IV = []byte("the same one") }}, func(r *rig) error {
			r.create("shop")
			results, err := r.Batch(r.t.Context(), kms.OpWrap, "shop", []kms.Item{{Plaintext: []byte("first")}, {Plaintext: []byte("second")}})
			if err != nil {
				return err
			}
			if results[0].Error != nil {
				r.t.Errorf("the first was refused too: %v", results[0].Error)
			}
			return results[1].Error
		}, kms.ErrUnavailable, "the token used one IV twice"},
		{"too few random bytes", liar{result: func(r *pluginproto.Result) { r.Output = nil }}, func(r *rig) error {
			_, err := r.Random(r.t.Context(), "", 8)
			return err
		}, kms.ErrInternal, "the driver answered with 0 bytes, want 8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 1)
				h := r.hsms[0]
				r.group.Members[0].Open = func(context.Context) (pluginproto.Driver, error) {
					l := c.lie
					l.Driver = memdriver.New(memdriver.Options{Token: h.token})
					return &l, nil
				}
				r.mustStart()
				defer r.stop()
				wantError(t, c.do(r), c.want, c.text)
			})
		})
	}
}

func createShop(r *rig) error {
	_, err := r.CreateMasterKey(r.t.Context(), "shop", kms.KeyOptions{})
	if _, absent := r.Key(r.t.Context(), "shop"); absent == nil {
		return fmt.Errorf("the key exists, though creating it gave %w", err)
	}
	return err
}

func wrapInShop(r *rig) error {
	r.create("shop")
	_, err := r.Wrap(r.t.Context(), "shop", []byte("data"), nil)
	return err
}

func TestTwoGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, other := newRig(t, 2), newRig(t, 1)
		r.group.Name, other.group.Name = "payments", "archive"
		config := kms.Config{Catalog: catalogtest.NewMemory(), Groups: []kms.GroupConfig{r.group, other.group}}
		var err error
		if r.KMS, err = kms.Open(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		first := r.create("first")
		second, err := r.CreateMasterKey(t.Context(), "second", kms.KeyOptions{Group: "archive"})
		if err != nil || first.Group != "payments" || second.Group != "archive" || second.MinCopies != 1 {
			t.Fatalf("%+v, %+v, %v", first, second, err)
		}
		wrapped := r.wrap("second")
		_, err = r.CreateMasterKey(t.Context(), "first", kms.KeyOptions{Group: "archive"})
		wantError(t, err, kms.ErrExists, `there is a key "first" already`)
		_, err = r.CreateMasterKey(t.Context(), "third", kms.KeyOptions{Group: "nowhere"})
		wantError(t, err, kms.ErrNotFound, `there is no group "nowhere"`)
		if a, b := len(r.hsms[0].token.Keys()), len(other.hsms[0].token.Keys()); a != 1 || b != 1 {
			t.Errorf("the tokens hold %d and %d keys, want 1 each", a, b)
		}
		r.stop()

		// A group that is not configured any more takes its keys with it for the time being.
		config.Groups = config.Groups[:1]
		if r.KMS, err = kms.Open(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		_, err = r.Unwrap(t.Context(), "second", wrapped, []byte("aad"))
		wantError(t, err, kms.ErrUnavailable, `key second belongs to group "archive", which is not configured`)
		_, err = r.Destroy(t.Context(), "second", 0)
		wantError(t, err, kms.ErrUnavailable, "which is not configured")
		r.stop()

		config.Groups = []kms.GroupConfig{r.group, other.group}
		if r.KMS, err = kms.Open(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		defer r.stop()
		r.wantUnwrap("second", wrapped)
	})
}

func TestNoSecretInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		r.create("shop")
		r.wantUnwrap("shop", r.wrap("shop"))
		r.hsms[0].leave()
		r.wantUnwrap("shop", r.wrap("shop"))
		r.stop()
		for _, secret := range [][]byte{[]byte(memdriver.PIN + "\""), bytes.Repeat([]byte{7}, 32), plaintextOf("shop")} {
			if bytes.Contains(r.log.Bytes(), secret) {
				t.Errorf("the log has %q", secret)
			}
		}
		if !strings.Contains(r.log.String(), "key created") {
			t.Error("the log does not tell that a key was made")
		}
	})
}

func TestKeyIsDestroyedWhileItUnwraps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		for _, h := range r.hsms {
			h.driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Delay: time.Second})
		}
		done := make(chan error, 1)
		go func() {
			_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
			done <- err
		}()
		synctest.Wait()
		if _, err := r.Destroy(t.Context(), "shop", 0); err != nil {
			t.Fatal(err)
		}
		wantError(t, <-done, kms.ErrState, "version 1 of key shop is destroyed")
		synctest.Wait() // for the janitor, who would say it
		if strings.Contains(r.log.String(), "lacks a key") {
			t.Error("the log says that a member has lost the key")
		}
	})
}
