package kms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

var deviceError = &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "calling the token"}

func TestTooFewCopies(t *testing.T) {
	full := &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: 0x31, Op: "unwrapping a key"} // CKR_DEVICE_MEMORY
	for _, c := range []struct {
		name     string
		away     []int // members that are away
		full     []int // members that cannot take a copy
		degraded bool
		want     error
		text     string
		copies   string
	}{
		{name: "one of three away, two copies are enough", away: []int{1}, copies: "[hsm-a hsm-c]"},
		{name: "one of three full, two copies are enough", full: []int{1}, copies: "[hsm-a hsm-c]"},
		{name: "two away", away: []int{0, 1}, want: kms.ErrInsufficientCopies,
			text: "key shop needs 2 copies, but only hsm-c could take one (hsm-a is down: "},
		{name: "two full", full: []int{1, 2}, want: kms.ErrInsufficientCopies,
			text: "key shop needs 2 copies, but only hsm-a could take one (hsm-b: cloning key shop version 1 to member hsm-b: member hsm-b: unwrapping a key: CKR_DEVICE_MEMORY"},
		{name: "two away and that is allowed", away: []int{0, 1}, degraded: true, copies: "[hsm-c]"},
		{name: "two full and that is allowed", full: []int{1, 2}, degraded: true, copies: "[hsm-a]"},
		{name: "all away", away: []int{0, 1, 2}, degraded: true, want: kms.ErrGroupLost, text: "no member of the group can serve"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				for _, i := range c.away {
					r.hsms[i].leave()
				}
				for _, i := range c.full {
					r.hsms[i].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: full})
				}
				<-time.After(3 * time.Second) // past the moment in which a lost member may come back
				key, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{AllowDegraded: c.degraded})
				if c.want != nil {
					wantError(t, err, c.want, c.text)
					_, err = r.Key(t.Context(), "shop")
					wantError(t, err, kms.ErrNotFound, `there is no key "shop"`)
				} else if err != nil || fmt.Sprint(key.Versions[0].Copies) != c.copies {
					t.Fatalf("copies %v, %v, want %s", key.Versions, err, c.copies)
				}
				for i := range r.hsms {
					r.hsms[i].come()
					if d := r.hsms[i].driver(); d != nil {
						d.Clear()
					}
				}
				r.wantStates(active, active, active)
				r.wantConsistent() // the janitor brings the copies that were missing
			})
		})
	}
}

func TestPrimaryDiesWhileAKeyIsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		// It makes the key and dies before it can hand it on.
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: deviceError})
		key := r.create("shop")
		if n := len(key.Versions[0].Copies); n < 2 { // hsm-a may be back in time
			t.Errorf("copies are on %v", key.Versions[0].Copies)
		}
		r.wantStates(active, active, active)
		r.wantConsistent()
		r.wantVerified("shop")
	})
}

func TestOneOfManyCreatesWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		var wg sync.WaitGroup
		errs := make([]error, 16)
		for i := range errs {
			wg.Go(func() { _, errs[i] = r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{}) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				wantError(t, err, kms.ErrExists, `there is a key "shop" already`)
			}
		}
		if won != 1 {
			t.Errorf("%d creates won", won)
		}
		r.wantConsistent()
	})
}

func TestCallerGoesAwayWhileAKeyIsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		release := make(chan struct{})
		r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Times: 1, Hang: release})
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := r.CreateMasterKey(ctx, "shop", kms.KeyOptions{})
		wantError(t, err, kms.ErrDeadline, `creating key "shop"`)
		if took := time.Since(began); took > 550*time.Millisecond {
			t.Errorf("the answer took %v", took)
		}
		close(release)
		r.wantConsistent()
		r.create("shop")
		r.wantConsistent()
	})
}

func TestCloseWhileAKeyIsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Hang: make(chan struct{})})
		done := make(chan error, 1)
		go func() {
			_, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
			done <- err
		}()
		synctest.Wait()
		r.stop()
		wantError(t, <-done, kms.ErrUnavailable, "closed")
		_, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
		wantError(t, err, kms.ErrUnavailable, "closed")
		r.mustStart()
		defer r.stop()
		r.wantConsistent()
		r.create("shop")
	})
}

// flaky is a store that fails now and then, before or after a write.
type flaky struct {
	catalog.Store
	mu            sync.Mutex
	before, after int // the write, counted from 1, that fails on that side
	full          bool
	writes        int
}

func (f *flaky) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writes++
	if f.writes == f.before || f.full {
		return 0, errors.New("no space left on device")
	}
	rev, err := f.Store.Apply(ctx, changes...)
	if f.writes == f.after {
		return 0, errors.New("input/output error")
	}
	return rev, err
}

func TestCatalogFailsOnce(t *testing.T) {
	for write := 1; write <= 11; write++ {
		for _, side := range []string{"before", "after"} {
			t.Run(fmt.Sprintf("%s write %d", side, write), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, 3)
					store := &flaky{Store: r.disk.Reopen()}
					if side == "before" {
						store.before = write
					} else {
						store.after = write
					}
					if err := r.start(store); err != nil {
						t.Fatal(err)
					}
					defer r.stop()
					s := &story{rig: r}
					s.tell()
					<-time.After(time.Minute) // the janitor has had its turn
					s.check()
					if _, err := r.CreateMasterKey(t.Context(), "red", kms.KeyOptions{}); err != nil && !errors.Is(err, kms.ErrExists) {
						t.Errorf("after that: %v", err)
					}
				})
			})
		}
	}
}

func TestKeysOfAllTypesAreMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		for _, typ := range pluginproto.KeyTypes() {
			if typ == pluginproto.RSA3072 || typ == pluginproto.RSA4096 {
				continue // made like rsa-2048, but for seconds
			}
			name := "k-" + string(typ)
			key, err := r.CreateMasterKey(t.Context(), name, kms.KeyOptions{Type: string(typ)})
			if err != nil {
				t.Fatalf("%s: %v", typ, err)
			}
			if pair := !typ.Symmetric(); pair != (key.Versions[0].PublicKey != nil) {
				t.Errorf("%s: public key %x", typ, key.Versions[0].PublicKey)
			}
			r.wantVerified(name)
		}
	})
}

func TestWrongOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		three, minus := 3, kms.Duration(-1)
		for _, c := range []struct {
			name string
			do   func() error
			text string
		}{
			{"a key type that does not exist", func() error {
				_, err := r.CreateMasterKey(t.Context(), "x", kms.KeyOptions{Type: "des"})
				return err
			}, `there is no key type "des"`},
			{"more copies than members", func() error {
				_, err := r.CreateMasterKey(t.Context(), "x", kms.KeyOptions{MinCopies: 3})
				return err
			}, "min_copies is 3, want 1 to 2"},
			{"more copies than members, later", func() error {
				_, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{MinCopies: &three})
				return err
			}, "min_copies is 3, want 1 to 2"},
			{"a rotation period that lies in the past", func() error {
				_, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{RotationPeriod: &minus})
				return err
			}, "rotation_period is -1ns"},
			{"a page without keys", func() error {
				_, err := r.Keys(t.Context(), kms.ListOptions{Limit: -1})
				return err
			}, "limit is -1, want 1 to 1000"},
		} {
			wantError(t, c.do(), kms.ErrBadRequest, c.text)
		}
	})
}

func TestOpenNamesAllFaults(t *testing.T) {
	_, err := kms.Open(t.Context(), kms.Config{Groups: []kms.GroupConfig{
		{Members: []kms.MemberConfig{{Name: "hsm-a", Driver: "../softhsm", SHA256: "xyz"}}},
		{MinCopies: 5, Domain: func(context.Context) ([]byte, error) { return nil, nil }, Members: []kms.MemberConfig{{Name: "hsm-b", Driver: "softhsm"}}},
	}})
	if !errors.Is(err, kms.ErrBadRequest) {
		t.Fatalf("Open = %v, want ErrBadRequest", err)
	}
	for _, fault := range []string{
		"no catalog",
		`group "default": no domain secret`,
		`group "default": member "hsm-a": no driver directory`,
		`driver "../softhsm" is not the name of a driver`,
		`group "default": member "hsm-a": no PIN`,
		"is not 64 hexadecimal digits",
		`two groups are named "default"`,
		"min_copies is 5, want 1 to the number of members, 1",
		`member "hsm-b": no SHA-256 of its driver`,
	} {
		if !strings.Contains(err.Error(), fault) {
			t.Errorf("the error does not name the fault %q:\n%v", fault, err)
		}
	}
}

func TestMissingDriverProgramIsAMemberThatFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.group.MinCopies = 1
		r.group.Members[1].Open = nil
		k, err := kms.Open(t.Context(), kms.Config{
			Catalog: r.disk.Reopen(), Groups: []kms.GroupConfig{r.group}, DriverDir: t.TempDir(), Insecure: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		r.KMS = k
		defer r.stop()
		m := r.Status().Groups[0].Members[1]
		if m.State != api.MemberFailed || !strings.Contains(m.Reason, "kmsd-driver-memory") {
			t.Errorf("hsm-b is %s: %s", m.State, m.Reason)
		}
	})
}

func TestChangeWithAnOpenEndIsFoundOut(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*rig) error
		want   kms.State
	}{
		{"disabling", func(r *rig) error { _, err := r.Disable(r.t.Context(), "shop"); return err }, kms.StateDisabled},
		{"destroying now", func(r *rig) error { _, err := r.Destroy(r.t.Context(), "shop", 0); return err }, kms.StateDestroyed},
		{"destroying later", func(r *rig) error { _, err := r.Destroy(r.t.Context(), "shop", time.Hour); return err }, kms.StateDestroyScheduled},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3)
				store := &flaky{Store: r.disk.Reopen()}
				if err := r.start(store); err != nil {
					t.Fatal(err)
				}
				defer r.stop()
				r.create("shop")
				store.mu.Lock()
				store.after = store.writes + 1
				store.mu.Unlock()
				wantError(t, c.change(r), kms.ErrInternal, "input/output error")
				synctest.Wait()
				if key, err := r.Key(t.Context(), "shop"); err != nil || key.State != c.want {
					t.Errorf("the key is %s, %v; the catalog has it %s", key.State, err, c.want)
				}
				_, err := r.Wrap(t.Context(), "shop", []byte("data"), nil)
				wantError(t, err, kms.ErrState, "key shop is ")
				r.wantConsistent()
			})
		})
	}
}

// onLine calls a function for each line of a log, before the log goes on.
type onLine func(string)

func (f onLine) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}

func TestKeyIsThereWhenItIsTold(t *testing.T) {
	for _, c := range []struct {
		name  string
		after int // the write that says it failed, though it is done; 0: none
	}{{"as usual", 0}, {"after a commit with an open end", 2}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3)
				told := 0
				k, err := kms.Open(t.Context(), kms.Config{
					Catalog: &flaky{Store: r.disk, after: c.after}, Groups: []kms.GroupConfig{r.group},
					Logger: hclog.New(&hclog.LoggerOptions{Output: onLine(func(line string) {
						if strings.Contains(line, "key created") {
							told++
							if _, err := r.Key(t.Context(), "shop"); err != nil {
								t.Errorf("told of a key that is not there: %v", err)
							}
						}
					})}),
				})
				if err != nil {
					t.Fatal(err)
				}
				r.KMS = k
				defer r.stop()
				r.create("shop")
				if told != 1 {
					t.Errorf("the key was told %d times", told)
				}
			})
		})
	}
}

func TestMemberThatIsFullIsNotAskedForEveryKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		full := &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: 0x31, Op: "unwrapping a key"} // CKR_DEVICE_MEMORY
		r.hsms[2].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: full})
		const keys = 50
		for i := range keys {
			r.create(fmt.Sprintf("key-%d", i))
		}
		<-time.After(time.Minute) // the janitor has given it up for the moment
		before := r.hsms[2].driver().Calls(memdriver.CallCloneStep)
		<-time.After(time.Minute)
		if n := r.hsms[2].driver().Calls(memdriver.CallCloneStep) - before; n == 0 || n > 50 {
			t.Errorf("a member without room was asked %d times in a minute, want a few", n)
		}
		r.hsms[2].driver().Clear()
		r.wantConsistent()
	})
}

func TestStartWithAFullDiskAndWithoutMembersAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		crashing := catalogtest.NewCrasher(r.disk.Reopen(), 0)
		if err := r.start(crashing); err != nil {
			t.Fatal(err)
		}
		r.create("old")
		wrapped := r.wrap("old")
		r.hsms[1].setStep(func(*hsm) { crashing.Crash() }) // while it takes its copy
		if _, err := r.CreateMasterKey(t.Context(), "half", kms.KeyOptions{}); err == nil {
			t.Fatal("a key was made across the crash")
		}
		r.hsms[1].setStep(nil)
		r.stop()
		for _, h := range r.hsms {
			h.leave()
		}

		store := &flaky{Store: r.disk.Reopen(), full: true}
		if err := r.start(store); err != nil {
			t.Fatalf("starting with a full disk: %v", err)
		}
		defer r.stop()
		for _, h := range r.hsms {
			h.come()
		}
		r.wantStates(active, active, active)
		r.wantUnwrap("old", wrapped)
		_, err := r.CreateMasterKey(t.Context(), "new", kms.KeyOptions{})
		wantError(t, err, kms.ErrInternal, "no space left on device")
		store.mu.Lock()
		store.full = false
		store.mu.Unlock()
		r.wantConsistent()
		r.create("half")
		r.wantConsistent()
	})
}
