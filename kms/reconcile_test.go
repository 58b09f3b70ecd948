package kms_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// valueOn is the check value of a key on a member's token.
func (r *rig) valueOn(h *hsm, id pluginproto.KeyID) []byte {
	r.t.Helper()
	d := memdriver.New(memdriver.Options{Token: h.token})
	defer d.Kill()
	o, err := openAs(r.t, d).Inspect(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return o.CheckValue
}

// openAs opens a driver of the test's own, as somebody does who goes around kmsd.
func openAs(t testing.TB, d *memdriver.Driver) *memdriver.Driver {
	t.Helper()
	req := pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: bytes.Repeat([]byte{7}, 32)}
	if _, err := d.Open(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	return d
}

// alarms returns the causes of the alarms that events tells of a member, so far.
func alarms(events []api.Event, member string) (causes []string) {
	for _, e := range events {
		if e.Alarm && e.Type == api.EventSync && e.Member == member {
			causes = append(causes, e.Key+": "+e.Cause)
		}
	}
	return causes
}

// listen collects what happens until stop is called.
func (r *rig) listen() (stop func() []api.Event) {
	ctx, cancel := context.WithCancel(r.t.Context())
	events := r.Events(ctx)
	all := make(chan []api.Event)
	go func() {
		var seen []api.Event
		for e := range events {
			seen = append(seen, e)
		}
		all <- seen
	}()
	return func() []api.Event {
		synctest.Wait()
		cancel()
		return <-all
	}
}

func TestDifferentValueIsNeverServedNorOverwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		r.create("till")
		wrapped, other := r.wrap("shop"), r.wrap("till")
		r.hsms[1].leave()
		r.wantStates(active, down, active)
		id := r.identity("shop", 1)
		r.hsms[1].token.Corrupt(id)
		wrong := r.valueOn(r.hsms[1], id)
		stop := r.listen()
		r.hsms[1].come()
		r.wantStates(active, active, active)
		if m := r.Status().Groups[0].Members[1]; m.Quarantined != 1 || m.Missing != 0 || m.Keys != 1 {
			t.Errorf("hsm-b: %d quarantined, %d missing, %d keys", m.Quarantined, m.Missing, m.Keys)
		}
		for range 20 {
			r.wantUnwrap("shop", wrapped)
			r.wantUnwrap("shop", r.wrap("shop"))
		}
		r.wantUnwrapOn(r.hsms[1], "till", other) // it serves all other keys
		<-time.After(10 * time.Minute)           // and nobody heals it away
		if got := r.valueOn(r.hsms[1], id); !bytes.Equal(got, wrong) {
			t.Error("the other key was overwritten")
		}
		key, err := r.Key(t.Context(), "shop")
		if err != nil || fmt.Sprint(key.Versions[0].Copies) != "[hsm-a hsm-c]" {
			t.Errorf("copies are %v, %v: the wrong one does not count", key.Versions[0].Copies, err)
		}
		told := alarms(stop(), "hsm-b")
		if len(told) == 0 || !strings.Contains(told[0], fmt.Sprintf("shop: another key under a known identity: key shop version 1: check value is %x, want", wrong)) ||
			!strings.Contains(told[0], "remove the wrong object and run kmsd group sync") {
			t.Errorf("alarms: %q", told)
		}

		r.hsms[1].token.Lose(id) // the operator removes the wrong one
		r.hsms[1].leave()
		r.wantStates(active, down, active)
		r.hsms[1].come()
		r.wantStates(active, active, active)
		r.wantConsistent()
		r.wantUnwrapOn(r.hsms[1], "shop", wrapped)
		if m := r.Status().Groups[0].Members[1]; m.Quarantined != 0 || m.Keys != 2 {
			t.Errorf("hsm-b: %d quarantined, %d keys", m.Quarantined, m.Keys)
		}
	})
}

func TestKeyOfWhichOnlyAWrongCopyIsLeftIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		id := r.identity("shop", 1)
		r.hsms[1].leave()
		r.wantStates(active, down)
		r.hsms[1].token.Corrupt(id)
		r.hsms[1].come()
		r.wantStates(active, active)
		r.hsms[0].leave()
		r.wantStates(down, active)
		_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
		wantError(t, err, kms.ErrUnavailable, "")
		r.hsms[0].come()
		r.wantStates(active, active)
		r.wantUnwrap("shop", wrapped)
	})
}

func TestMemberWithADifferentValueIsComparedAnewWhenThatIsFound(t *testing.T) {
	for _, c := range []struct {
		name string
		find func(*rig)
	}{
		{"by verifying", func(r *rig) {
			v, err := r.Verify(r.t.Context(), "shop")
			if err != nil || v.OK {
				r.t.Errorf("verified: %+v, %v", v, err)
			}
		}},
		{"by bringing over a copy that it seemed to lack", func(r *rig) {
			r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpEncrypt, Times: 1,
				Err: &pluginproto.Error{Class: pluginproto.ClassNotFound, CKR: 0x60, Op: "encrypting"}}) // CKR_KEY_HANDLE_INVALID
			for range 3 {
				r.wrap("shop")
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				wrapped := r.wrap("shop")
				r.hsms[1].token.Corrupt(r.hsms[1].token.Keys()[0])
				c.find(r)
				r.eventually(func() error {
					if m := r.Status().Groups[0].Members[1]; m.State != active || m.Quarantined != 1 {
						return fmt.Errorf("hsm-b is %s, %d quarantined", m.State, m.Quarantined)
					}
					return nil
				})
				for range 10 {
					r.wantUnwrap("shop", wrapped)
					r.wantUnwrap("shop", r.wrap("shop"))
				}
				pid := r.Status().Groups[0].Members[1].DriverPID
				c.find(r) // what is known already takes nobody out
				<-time.After(time.Minute)
				if m := r.Status().Groups[0].Members[1]; m.State != active || m.DriverPID != pid {
					t.Errorf("hsm-b is %s, driver %d, was %d", m.State, m.DriverPID, pid)
				}
			})
		})
	}
}

// identity is the identity of a version.
func (r *rig) identity(name string, version int) pluginproto.KeyID {
	r.t.Helper()
	key, err := catalog.New(r.disk.Reopen()).Key(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	id, err := pluginproto.ParseKeyID(key.Versions[version-1].Identity)
	if err != nil {
		r.t.Fatal(err)
	}
	return id
}

// W10, W11 and W29 of the Luna group: what a member has missed is remembered by
// nobody's memory, and a destroyed key does not come back with it.
func TestWhatAMemberMissedOutlivesAKilledDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		path := filepath.Join(t.TempDir(), "catalog.db")
		open := func() (catalog.Store, *catalogtest.Crasher) {
			store, err := boltcat.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			return store, catalogtest.NewCrasher(store, 0)
		}
		store, process := open()
		if err := r.start(process); err != nil {
			t.Fatal(err)
		}
		r.create("doomed")
		r.create("old")
		doomed := r.hsms[2].token.Keys()
		stranger := openAs(t, memdriver.New(memdriver.Options{Token: r.hsms[2].token}))
		if _, err := stranger.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		if key := r.create("new"); fmt.Sprint(key.Versions[0].Copies) != "[hsm-a hsm-b]" {
			t.Errorf("the answer says that %v hold the key", key.Versions[0].Copies)
		}
		if _, err := r.Destroy(t.Context(), "doomed", 0); err != nil {
			t.Fatal(err)
		}
		wrapped := r.wrap("new")

		process.Crash() // nothing of this process is written from here on
		for _, h := range r.hsms {
			h.leave()
		}
		r.stop()
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		store, process = open()
		defer func() {
			if err := store.Close(); err != nil {
				t.Error(err)
			}
		}()
		if err := r.start(process); err != nil {
			t.Fatal(err)
		}
		defer r.stop()
		for _, h := range r.hsms {
			h.come()
		}
		first := make(chan error, 1)
		r.hsms[2].setStep(func(*hsm) { // the last step before it is admitted
			if r.Status().Groups[0].Members[2].State == active {
				select {
				case first <- fmt.Errorf("hsm-c serves and is still being changed"):
				default:
				}
			}
		})
		r.wantStates(active, active, active)
		r.wantUnwrapOn(r.hsms[2], "new", wrapped)
		left := r.hsms[2].token.Keys()
		if len(left) != 3 || !slices.Contains(left, pluginproto.KeyID{1}) {
			t.Errorf("hsm-c holds %v, want old, new and the stranger's", left)
		}
		gone := 0
		for _, id := range doomed {
			if !slices.Contains(left, id) {
				gone++
			}
		}
		if gone != 1 {
			t.Errorf("%d of %d keys are gone, want the destroyed one", gone, len(doomed))
		}
		select {
		case err := <-first:
			t.Error(err)
		default:
		}
	})
}

func TestEmptiedTokenIsFailedUntilItsKeysAreBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		h := r.hsms[1]
		h.leave()
		r.wantStates(active, down, active)
		right := h.token
		h.mu.Lock()
		h.token = memdriver.NewToken(h.name)
		h.mu.Unlock()
		h.come()
		r.wantStates(active, failed, active)
		reason := r.Status().Groups[0].Members[1].Reason
		if !strings.Contains(reason, "holds none of its 1 keys any more") || !strings.Contains(reason, "kmsd member replace hsm-b") {
			t.Errorf("the reason is %q", reason)
		}
		<-time.After(10 * time.Minute)
		r.wantStates(active, failed, active)
		if n := len(h.token.Keys()); n != 0 {
			t.Errorf("%d keys were put on it", n)
		}
		h.mu.Lock()
		h.token = right
		h.mu.Unlock()
		r.wantStates(active, active, active) // at the interval, without anybody's help
		r.wantUnwrapOn(h, "shop", wrapped)
	})
}

// The first key of a group is made between a member's list of its keys and the look at
// what it should hold.
func TestTheFirstKeyOfAGroupDoesNotEmptyItsMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		var steps atomic.Int64
		r.hsms[1].setStep(func(*hsm) {
			if steps.Add(1) == 2 { // the list is made, and not answered yet
				r.create("first")
			}
		})
		report, err := r.Sync(t.Context(), "", api.SyncOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range report.Members {
			if m.Error != "" {
				t.Errorf("%s: %s", m.Member, m.Error)
			}
		}
		r.wantStates(active, active, active)
		r.wantConsistent()
	})
}

// W13: objects are known by identity. A label is for people; ours is set right, and a
// stranger's with the same one changes nothing.
func TestLabelsNameNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		id := r.identity("shop", 1)
		r.hsms[1].leave()
		r.wantStates(active, down, active)
		stranger := openAs(t, memdriver.New(memdriver.Options{Token: r.hsms[1].token}))
		label := "till/7"
		if err := stranger.SetAttributes(t.Context(), id, pluginproto.Attributes{Label: &label}); err != nil {
			t.Fatal(err)
		}
		if _, err := stranger.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256, Label: "shop/1"}); err != nil {
			t.Fatal(err)
		}
		stop := r.listen()
		r.hsms[1].come()
		r.wantStates(active, active, active)
		told := 0
		for _, e := range stop() {
			if e.Type == api.EventSync && strings.Contains(e.Cause, "1 keys that nobody here knows") {
				told++
			}
		}
		if told != 1 {
			t.Errorf("the unknown object was told %d times", told)
		}
		r.wantUnwrapOn(r.hsms[1], "shop", wrapped)
		if o, err := stranger.Inspect(t.Context(), id); err != nil || o.Label != "shop/1" {
			t.Errorf("the label is %q, %v", o.Label, err)
		}
		if m := r.Status().Groups[0].Members[1]; m.Foreign != 1 || m.Keys != 1 { // W31: what came around kmsd is seen
			t.Errorf("hsm-b: %d foreign, %d keys", m.Foreign, m.Keys)
		}
	})
}

// W19: after the loss of all, the catalog says what is current, whoever comes first.
func TestCatalogJudgesAfterTheLossOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.group.MinCopies = 1
		r.mustStart()
		defer r.stop()
		r.create("shop")
		r.create("doomed")
		old := r.wrap("shop")
		r.hsms[0].leave()
		r.wantStates(down, active)
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Destroy(t.Context(), "doomed", 0); err != nil {
			t.Fatal(err)
		}
		current := r.wrap("shop")
		r.hsms[1].leave()
		r.wantStates(down, down)

		r.hsms[0].come() // the stale one
		r.wantStates(active, down)
		if n := len(r.hsms[0].token.Keys()); n != 1 {
			t.Errorf("hsm-a holds %d keys, want the old version only", n)
		}
		r.wantUnwrap("shop", old)
		_, err := r.Unwrap(t.Context(), "shop", current, []byte("aad"))
		wantError(t, err, kms.ErrUnavailable, "")
		r.hsms[1].come()
		r.wantStates(active, active)
		r.wantConsistent()
		r.hsms[1].leave()
		r.wantStates(active, down)
		r.wantUnwrap("shop", current)
	})
}

// W40: whoever changes a key, through whichever member, changes it after the one before.
func TestManyWhoChangeOneKeyNeverDisagree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const writers, rounds = 4, 5
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for n := range rounds {
					if _, err := r.Rotate(t.Context(), "shop"); err != nil {
						t.Errorf("rotating: %v", err)
					}
					if w == 0 {
						r.hsms[n%3].leave() // another member each time, also the primary
						<-time.After(100 * time.Millisecond)
						r.hsms[n%3].come()
						<-time.After(3 * time.Second)
					}
				}
			})
		}
		wg.Wait()
		r.wantStates(active, active, active)
		r.wantConsistent()
		r.wantVerified("shop")
		key, err := r.Key(t.Context(), "shop")
		if err != nil || len(key.Versions) != 1+writers*rounds {
			t.Fatalf("%d versions, %v", len(key.Versions), err)
		}
		for i, v := range key.Versions {
			if v.Number != i+1 {
				t.Errorf("version %d has the number %d", i+1, v.Number)
			}
		}
	})
}

func TestBulkShowsItsProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 40
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		for i := range keys {
			r.create(fmt.Sprintf("key-%d", i))
		}
		r.hsms[2].setStep(func(*hsm) { <-time.After(50 * time.Millisecond) })
		stop := r.listen()
		r.hsms[2].come()
		r.eventually(func() error {
			p := r.Status().Groups[0].Members[2].Sync
			if p == nil || p.Done < keys/2 {
				return fmt.Errorf("progress is %+v", p)
			}
			if p.Total != keys || p.Rate <= 0 || p.Left <= 0 {
				t.Errorf("half way: %+v", p)
			}
			return nil
		})
		r.wantStates(active, active, active)
		if p := r.Status().Groups[0].Members[2].Sync; p != nil {
			t.Errorf("at the end: %+v", p)
		}
		var told []api.Event
		for _, e := range stop() {
			if e.Type == api.EventSync {
				told = append(told, e)
			}
		}
		if len(told) < 3 {
			t.Fatalf("told %d times", len(told))
		}
		for _, e := range told {
			if e.Group != "default" || e.Member != "hsm-c" || e.Progress == nil || e.Progress.Total != keys {
				t.Errorf("event %+v", e)
			}
		}
		if last := told[len(told)-1].Progress; last.Done != keys {
			t.Errorf("the last one says %+v", last)
		}
	})
}

func TestWrongCopyIsUsedNoMoreFromTheMomentItIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const others = 30
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		id := r.identity("shop", 1)
		for i := range others {
			r.create(fmt.Sprintf("key-%d", i))
		}
		h := r.hsms[1]
		for _, lost := range h.token.Keys()[1:] { // the bulk of a comparison
			if lost != id {
				h.token.Lose(lost)
			}
		}
		h.token.Corrupt(id)
		h.setStep(func(*hsm) { <-time.After(50 * time.Millisecond) })
		synced := make(chan error, 1)
		go func() {
			_, err := r.Sync(t.Context(), "", api.SyncOptions{})
			synced <- err
		}()
		<-time.After(time.Second)
		if p := r.Status().Groups[0].Members[1].Sync; p == nil || p.Done == p.Total {
			t.Fatalf("progress is %+v, want a bulk under way", p)
		}
		h.driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpEncrypt,
			Err: &pluginproto.Error{Class: pluginproto.ClassUnknown, Op: "using a key that is in quarantine"}})
		for range 20 {
			r.wrap("shop")
		}
		if err := <-synced; err != nil {
			t.Fatal(err)
		}
		for range 20 {
			r.wrap("shop")
		}
		if m := r.Status().Groups[0].Members[1]; m.State != active || m.Quarantined != 1 {
			t.Errorf("hsm-b is %s with %d in quarantine", m.State, m.Quarantined)
		}
	})
}

// W31: what happens to a token around kmsd is found without anybody's asking.
func TestDriftOnATokenIsFoundWithinAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		for _, name := range []string{"lost", "swapped", "shop"} {
			r.create(name)
		}
		lost, swapped := r.identity("lost", 1), r.identity("swapped", 1)
		h := r.hsms[1]
		stranger := openAs(t, memdriver.New(memdriver.Options{Token: h.token}))
		if _, err := stranger.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		h.token.Lose(lost)
		h.token.Corrupt(swapped)
		stop := r.listen()
		<-time.After(61 * time.Minute)
		if m := r.Status().Groups[0].Members[1]; m.State != active || m.Foreign != 1 || m.Quarantined != 1 || m.Keys != 2 || m.Missing != 0 {
			t.Errorf("hsm-b is %s: %d foreign, %d in quarantine, %d keys, %d missing", m.State, m.Foreign, m.Quarantined, m.Keys, m.Missing)
		}
		if !slices.Contains(h.token.Keys(), lost) {
			t.Error("the lost key is not back")
		}
		if told := alarms(stop(), "hsm-b"); len(told) != 1 || !strings.HasPrefix(told[0], "swapped: ") {
			t.Errorf("alarms: %q, want one", told)
		}
	})
}
