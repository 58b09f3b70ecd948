package p11_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// What commands do to what the driver knows of the token, while a transfer's HSM is at work.

// meanwhile has f run within a step.
func (e *ends) meanwhile(step string, f func()) {
	e.do(func() {
		e.before = func(name string) {
			if name == step {
				f()
			}
		}
	})
}

// last is the step of a target in which objects come.
var last = map[string]string{"relay": "target 2", "batch": "target 1", "alone": "target 0", "a proof": "target 0"} // never written to

// way is the transfer of one key, or the proof of its blob.
func (e *ends) way(name string, id pluginproto.KeyID) *relay {
	if name != "a proof" {
		return e.relay(name, id)
	}
	r := e.relay("alone", id)
	r.target.Prove = true
	return r
}

// A command whose key was removed has all handles forgotten. What was on the token before the
// transfer is no less there.
func TestAnObjectThatWasThereIsNotDestroyedWhenHandlesAreForgotten(t *testing.T) {
	for way := range last {
		t.Run(way, func(t *testing.T) {
			e := newEnds(t)
			made, gone := generate(t, e.from, pluginproto.AES256), generate(t, e.to, pluginproto.AES256).ID
			e.arrives(t, made)
			there := e.identify(t, made.ID, []byte{7})
			if err := roundTrip(t.Context(), e.to, gone); err != nil {
				t.Fatal(err)
			}
			remove(t, e.to, gone, pkcs11.CKO_SECRET_KEY)
			e.do(func() { e.blind = true; e.answers(there) })
			e.meanwhile(last[way], func() {
				if err := roundTrip(t.Context(), e.to, gone); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
					t.Errorf("the key that is gone: %v", err)
				}
			})
			if _, err := e.way(way, made.ID).run(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("%v", err)
			}
			e.stands(t, there)
		})
	}
}

// A command may find an object that has come before the transfer has judged it. It was not
// there before for that.
func TestWhatIsRefusedIsDestroyedAlthoughACommandHasSeenIt(t *testing.T) {
	for way := range last {
		t.Run(way, func(t *testing.T) {
			e := newEnds(t)
			made, other := generate(t, e.from, pluginproto.AES256), generate(t, e.from, pluginproto.AES256)
			wrapped := e.packed(t, other.ID).Wrapped
			e.do(func() { e.bend = func(p *parcel) { p.Wrapped = wrapped } })
			e.meanwhile("target ends", func() {
				if err := roundTrip(t.Context(), e.to, made.ID); err != nil {
					t.Errorf("the key that has come: %v", err)
				}
			})
			if _, err := e.way(way, made.ID).run(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("%v", err)
			}
			e.clean(t, made.ID)
		})
	}
}

// A key that comes to be while a command looks for it in vain is there, whatever the command
// says of it afterwards.
func TestAKeyIsNotForgottenThatWasLookedForTooEarly(t *testing.T) {
	b, lib := faultyBench(t)
	q := quirks()
	q.SessionCopies, q.OnToken, q.FindsByID = false, true, true
	d := p11.New(q, p11.Options{})
	if _, err := d.Open(t.Context(), b.request()); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	// A look at the whole token is believed for longer the longer it took.
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Sleep, Function: "C_FindObjectsInit", Arg: 200})
	if _, err := d.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec := pluginproto.KeySpec{ID: newID(), Type: pluginproto.AES256}
	lib.Arm(t, 1, faultlib.Fault{What: faultlib.Hang, Function: "C_GetSessionInfo", After: 1}) // it has found nothing twice
	early := make(chan error, 1)
	go func() { early <- roundTrip(t.Context(), d, spec.ID) }()
	waitFired(t, lib, 1)
	if _, err := d.Generate(t.Context(), spec); err != nil {
		t.Error(err)
	}
	lib.Disarm(t, 1)
	if err := <-early; pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("using it too early: %v", err)
	}
	if _, err := d.Generate(t.Context(), spec); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		t.Errorf("generating it again: %v", err)
	}
	if err := roundTrip(t.Context(), d, spec.ID); err != nil {
		t.Errorf("using it: %v", err)
	}
}

// An identity of which the token has half a pair is taken, also while another worker has all
// handles forgotten.
func TestAnIdentityIsTakenWhateverIsForgottenMeanwhile(t *testing.T) {
	e := newEnds(t)
	spec := pluginproto.KeySpec{ID: generate(t, e.to, pluginproto.ECP256).ID, Type: pluginproto.AES256}
	remove(t, e.to, spec.ID, pkcs11.CKO_PRIVATE_KEY)
	for range 200 {
		if _, err := e.to.List(t.Context()); err != nil { // believed for a moment
			t.Fatal(err)
		}
		forgotten := make(chan struct{})
		go func() {
			defer close(forgotten)
			e.to.Forget()
		}()
		_, err := e.to.Generate(t.Context(), spec)
		<-forgotten
		if pluginproto.ClassOf(err) != pluginproto.ClassCaller {
			t.Fatalf("generating over half a pair: %v", err)
		}
	}
}
