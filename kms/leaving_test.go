package kms_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// script has a fault happen to the driver that a member has now, and to all later ones.
func (h *hsm) script(f memdriver.Fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, f)
	h.current.Script(f)
}

// noRoom is what a token says that takes no more keys.
var noRoom = memdriver.Fault{Call: memdriver.CallCloneStep, Err: &pluginproto.Error{
	Class: pluginproto.ClassCaller, CKR: 0x31, Op: "unwrapping", Msg: "no room", // CKR_DEVICE_MEMORY
}}

func TestAMemberIsRemovedWhenItHasMadeAPair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3)
		r.mustStart()
		defer func() { r.stop() }()
		r.hsms[0].script(memdriver.Fault{Call: memdriver.CallGenerate, Delay: 20 * time.Second})
		made := make(chan error, 1)
		go func() {
			_, err := r.CreateMasterKey(t.Context(), "pair", kms.KeyOptions{Type: string(pluginproto.ECP256)})
			made <- err
		}()
		<-time.After(time.Second)
		if err := r.RemoveMember(t.Context(), "", "hsm-a", false); err != nil {
			t.Error(err)
		}
		r.wantMembers("hsm-b hsm-c")
		if err := <-made; err != nil {
			t.Error(err)
		}
		r.wantVerified("pair")
	})
}

// A member is not let go while nobody else is certain to hold its keys: not one that is
// away, and may never come back with them, and not one that has left.
func TestWhoIsAwayOrHasLeftIsNoOtherHolder(t *testing.T) {
	for _, hasLeft := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newReserve(t, 4)
			disk := &brokenDisk{Store: r.disk.Reopen()}
			if err := r.start(disk); err != nil {
				t.Fatal(err)
			}
			defer func() { r.stop() }()
			ctx := t.Context()
			for _, h := range r.hsms[2:] {
				h.script(noRoom)
			}
			r.create("shop") // on hsm-a and hsm-b
			wrapped := r.wrap("shop")
			if hasLeft {
				disk.breaks(catalog.KindKey)
				if err := r.RemoveMember(ctx, "", "hsm-a", false); err != nil {
					t.Fatal(err)
				}
				disk.breaks("")
			} else {
				r.hsms[0].leave()
				r.eventually(func() error { return r.memberIs("hsm-a", down) })
			}
			wantError(t, r.RemoveMember(ctx, "", "hsm-b", false), api.ErrState, "key shop")
			r.wantUnwrap("shop", wrapped)
		})
	}
}

// memberIs checks the state of a member.
func (r *rig) memberIs(name string, want api.MemberState) error {
	for _, m := range r.Status().Groups[0].Members {
		if m.Name == name && m.State != want {
			return fmt.Errorf("member %s is %s (%s), want %s", name, m.State, m.Reason, want)
		}
	}
	return nil
}

// brokenDisk is a store that cannot write records of one kind.
type brokenDisk struct {
	catalog.Store
	mu   sync.Mutex // guards kind
	kind catalog.Kind
}

func (d *brokenDisk) breaks(kind catalog.Kind) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kind = kind
}

func (d *brokenDisk) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	d.mu.Lock()
	kind := d.kind
	d.mu.Unlock()
	for _, r := range changes {
		if r.Kind == kind {
			return 0, catalog.ErrFull
		}
	}
	return d.Store.Apply(ctx, changes...)
}

// An HSM that works is not given up for another one while keys are on it alone.
func TestTheOnlyHolderOfAKeyIsNotReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3, "hsm-x")
		r.mustStart()
		defer func() { r.stop() }()
		ctx := t.Context()
		for _, h := range r.hsms[1:] {
			h.script(noRoom)
		}
		if _, err := r.CreateMasterKey(ctx, "shop", kms.KeyOptions{AllowDegraded: true}); err != nil {
			t.Fatal(err)
		}
		wrapped := r.wrap("shop")
		spec := r.spec("hsm-a", "hsm-x")
		_, err := r.ReplaceMember(ctx, "", "hsm-a", &spec)
		wantError(t, err, api.ErrState, "no other member is known to hold key shop")
		r.wantUnwrap("shop", wrapped)

		r.add("hsm-x") // which takes the key
		if err := r.RemoveMember(ctx, "", "hsm-a", false); err != nil {
			t.Fatal(err)
		}
		r.wantMembers("hsm-b hsm-c hsm-x")
		r.wantUnwrap("shop", wrapped)
	})
}

// A replacement that its caller gave up while it was being admitted must not be written
// down as the token that it should have replaced.
func TestAReplacementThatIsLateIsNotTakenForTheOldToken(t *testing.T) {
	for delay := time.Duration(0); delay < 12*time.Second; delay += 500 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			r := newReserve(t, 3, "hsm-x")
			r.mustStart()
			defer func() { r.stop() }()
			r.create("shop")
			before := records(t, r.disk)
			r.spare["hsm-x"].faults = []memdriver.Fault{{Delay: time.Second}}
			ctx, cancel := context.WithTimeout(t.Context(), delay+250*time.Millisecond)
			defer cancel()
			spec := r.spec("hsm-c", "hsm-x")
			if _, err := r.ReplaceMember(ctx, "", "hsm-c", &spec); err == nil {
				r.wantMembers("hsm-a hsm-b hsm-c")
				return
			}
			<-time.After(time.Minute) // it is taken back when nobody waits any more
			r.wantMembers("hsm-a hsm-b hsm-c")
			if label := r.Status().Groups[0].Members[2].Token.Label; label != "hsm-c" {
				t.Errorf("after %v the token is %s", delay, label)
			}
			if after := records(t, r.disk); after != before {
				t.Errorf("after %v what is remembered of members was\n%s\nand is\n%s", delay, before, after)
			}
			r.wantVerified("shop")
		})
	}
}

// A full disk keeps nobody from unwrapping, also when all members come back with keys to
// destroy, which cannot be written down then.
func TestMembersWithKeysToDestroyServeOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2)
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		r.create("till")
		wrapped := r.wrap("shop")
		for _, h := range r.hsms {
			h.leave()
		}
		r.wantMembers("hsm-a:down hsm-b:down")
		if _, err := r.Destroy(t.Context(), "till", 0); err != nil {
			t.Fatal(err)
		}
		r.stop()
		disk := &brokenDisk{Store: r.disk.Reopen()}
		disk.breaks(catalog.KindTombstone)
		for _, h := range r.hsms {
			h.come()
		}
		if err := r.start(disk); err != nil {
			t.Fatal(err)
		}
		r.wantMembers("hsm-a hsm-b")
		r.wantUnwrap("shop", wrapped)
		for _, h := range r.hsms {
			if n := len(h.token.Keys()); n != 1 {
				t.Errorf("%s holds %d keys", h.name, n)
			}
		}
		disk.breaks("")
		r.wantConsistent()
	})
}

// A drain that is refused is no drain, though its caller may have left in the same moment.
func TestADrainThatIsRefusedIsNotRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1).mustStart()
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		for range 20 { // whether it begins at all is left to chance
			if _, err := r.Drain(gone, "", "hsm-a", false); err == nil {
				t.Fatal("the only member is drained")
			}
			synctest.Wait()
		}
		r.restart()
		defer r.stop()
		r.wantStates(active)
	})
}

// A member that does not come to its token within its own time has failed, whoever else has
// time left.
func TestAMembersOwnDeadlineIsNotItsCallers(t *testing.T) {
	for name, do := range map[string]func(context.Context, *reserve) error{
		"recovering": func(ctx context.Context, r *reserve) error { return r.Recover(ctx, "", "hsm-b") },
		"adding": func(ctx context.Context, r *reserve) error {
			_, err := r.AddMember(ctx, "", r.spec("hsm-c", "hsm-c"))
			return err
		},
		"replacing": func(ctx context.Context, r *reserve) error {
			_, err := r.ReplaceMember(ctx, "", "hsm-b", nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReserve(t, 2, "hsm-c")
				r.mustStart()
				defer r.stop()
				hangs := memdriver.Fault{Call: memdriver.CallOpen, Hang: make(chan struct{})}
				for _, h := range []*hsm{r.hsms[1], r.spare["hsm-c"]} {
					h.mu.Lock()
					h.faults = append(h.faults, hangs)
					h.mu.Unlock()
				}
				r.hsms[1].driver().Crash()
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				defer cancel()
				wantError(t, do(ctx, r), kms.ErrMemberFailed, "within 30s")
			})
		})
	}
}
