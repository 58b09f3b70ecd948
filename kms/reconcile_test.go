package kms_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
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
