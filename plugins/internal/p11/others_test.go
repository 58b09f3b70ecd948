package p11_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// answers has the target answer with an object that it has, instead of taking one in.
func (e *ends) answers(there pkcs11.ObjectHandle) {
	e.bend = func(p *parcel) { p.Err = errTaken }
	e.answer = func(r []p11.Received) []p11.Received {
		for i := range r {
			r[i] = p11.Received{Object: there}
		}
		return r
	}
}

// identify gives the target's secret object under an identity another CKA_ID.
func (e *ends) identify(t testing.TB, id pluginproto.KeyID, as []byte) (there pkcs11.ObjectHandle) {
	t.Helper()
	err := e.to.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		for _, h := range search(t, lib, sh, id) {
			v, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
			if err != nil {
				return err
			}
			if v[0].Value[0] != pkcs11.CKO_PUBLIC_KEY {
				there = h
			}
		}
		return lib.SetAttributeValue(sh, there, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, as)})
	})
	if err != nil {
		t.Fatal(err)
	}
	return there
}

// stands wants an object to be on the target.
func (e *ends) stands(t testing.TB, h pkcs11.ObjectHandle) {
	t.Helper()
	err := e.to.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		_, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
		return err
	})
	if err != nil {
		t.Errorf("the object that was there: %v", err)
	}
}

// An HSM that is offered an object that it has may answer with that one. It is not the
// transfer's to destroy, whatever its CKA_ID is.
func TestAnObjectThatWasThereIsNotDestroyed(t *testing.T) {
	for name, as := range map[string][]byte{"another key's": []byte("sixteen bytes ab"), "not one of ours": {7}, "empty": {}} {
		for _, way := range []string{"relay", "batch", "alone", "a proof"} {
			t.Run("its CKA_ID is "+name+", "+way, func(t *testing.T) {
				e := newEnds(t)
				made := generate(t, e.from, pluginproto.AES256)
				e.arrives(t, made)
				there := e.identify(t, made.ID, as)
				e.do(func() { e.blind = true; e.answers(there) })
				r := e.relay(way, made.ID)
				if way == "a proof" {
					r = e.relay("alone", made.ID)
					r.target.Prove = true
				}
				if _, err := r.run(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
					t.Errorf("%v", err)
				}
				e.stands(t, there)
			})
		}
	}
}

// Nor is it when it comes although nobody wanted it.
func TestASurplusObjectThatWasThereIsNotDestroyed(t *testing.T) {
	e := newEnds(t)
	made, other := generate(t, e.from, pluginproto.AES256), generate(t, e.from, pluginproto.AES256)
	e.arrives(t, made)
	var twin pkcs11.ObjectHandle
	err := e.to.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) (err error) { // as a second clone leaves it
		twin, err = lib.CopyObject(sh, search(t, lib, sh, made.ID)[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "twin")})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	e.do(func() { e.answers(twin) })
	if _, err := e.relay("alone", made.ID, other.ID).run(t); err != nil {
		t.Error(err)
	}
	e.stands(t, twin)
}

// Two transfers may carry one key to one token at the same time. The second to arrive finds
// the first one's, whatever the HSM makes of it, and costs nobody that copy.
func TestTwoTransfersOfOneKey(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		for name, ill := range map[string]func(*ends, pkcs11.ObjectHandle){
			"the HSM takes it in again":                 func(*ends, pkcs11.ObjectHandle) {},
			"the HSM does not take it":                  func(e *ends, _ pkcs11.ObjectHandle) { e.bend = func(p *parcel) { p.Err = errTaken } },
			"the HSM answers with the one that it has":  func(e *ends, h pkcs11.ObjectHandle) { e.answers(h) },
			"the HSM answers with it, and is then lost": func(e *ends, h pkcs11.ObjectHandle) { e.answers(h); e.fail["uid"] = errors.New("lost") },
		} {
			t.Run(name+", "+string(typ), func(t *testing.T) {
				e := newEnds(t)
				made := generate(t, e.from, typ)
				second := e.relay("batch", made.ID)
				if _, err := second.give(t); err != nil {
					t.Fatal(err)
				}
				if _, err := second.take(t); err != nil {
					t.Fatal(err)
				}
				e.arrives(t, made)
				there := e.identify(t, made.ID, made.ID[:])
				e.do(func() { ill(e, there) })
				if _, err := second.give(t); err != nil {
					t.Fatal(err)
				}
				out, err := second.take(t)
				e.do(e.heal)
				if err != nil || len(out.Keys) != 1 || out.Keys[0].Object == nil || !bytes.Equal(out.Keys[0].Object.CheckValue, made.CheckValue) {
					t.Errorf("the second: %+v, %v", out.Keys, err)
				}
				second.end(t)
				if o, err := e.to.Inspect(t.Context(), made.ID); err != nil || !bytes.Equal(o.CheckValue, made.CheckValue) {
					t.Errorf("the key: %v", err)
				}
				e.stands(t, there)
			})
		}
	}
}

// What came without an answer is found by the next attempt, also when the whole token was
// looked at a moment before it came.
func TestAnArrivalThatWasNotAnswered(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		t.Run(string(typ), func(t *testing.T) {
			e := newEnds(t)
			for range 20 { // a look at the token takes a while, and is believed longer
				generate(t, e.to, pluginproto.AES256)
			}
			made := generate(t, e.from, typ)
			e.do(func() { e.lost, e.fail["target ends"] = true, pkcs11.Error(pkcs11.CKR_DEVICE_MEMORY) })
			if _, err := e.relay("batch", made.ID).run(t); pluginproto.ClassOf(err) != pluginproto.ClassBusy {
				t.Errorf("%v", err)
			}
			e.do(e.heal)
			e.do(func() { e.blind, e.bend = true, func(p *parcel) { p.Err = errTaken } })
			e.arrives(t, made)
		})
	}
}

// The public half of a pair is on the token before the private one: a driver that is killed
// in between leaves nothing secret that nobody knows of.
func TestAPrivateHalfNeverComesAlone(t *testing.T) {
	e := newEnds(t)
	made, gone := generate(t, e.from, pluginproto.ECP256), pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED)
	for name, last := range map[string]string{"relay": "target 2", "batch": "target 1", "alone": "target 0", "a proof": "target 0"} {
		r := e.relay(name, made.ID)
		if name == "a proof" {
			r = e.relay("alone", made.ID)
			r.target.Prove = true
		}
		public := -1
		e.do(func() {
			e.before = func(step string) {
				if step == last {
					public = len(e.objectsOf(t, made.ID))
				}
			}
			e.fail["target ends"] = gone
		})
		if _, err := r.run(t); pluginproto.ClassOf(err) != pluginproto.ClassMember {
			t.Errorf("%s: %v", name, err)
		}
		e.do(e.heal)
		if public != 1 {
			t.Errorf("%s: %d objects are there when the private half comes", name, public)
		}
		e.clean(t, made.ID) // not the public half, either
	}
}

// A key that is gone from the token costs the others nothing while the HSM is at a long work.
func TestAStaleHandleKeepsNobodyWaiting(t *testing.T) {
	e := newEnds(t)
	made, gone, used := generate(t, e.from, pluginproto.AES256), generate(t, e.to, pluginproto.AES256).ID, generate(t, e.to, pluginproto.AES256).ID
	for _, id := range []pluginproto.KeyID{gone, used} {
		if err := roundTrip(t.Context(), e.to, id); err != nil {
			t.Fatal(err)
		}
	}
	remove(t, e.to, gone, pkcs11.CKO_SECRET_KEY)
	working, enough := make(chan struct{}), make(chan struct{})
	e.do(func() {
		e.before = func(step string) {
			if step == "target 1" {
				close(working)
				<-enough
			}
		}
	})
	ended := make(chan error, 1)
	go func() {
		_, err := e.relay("batch", made.ID).run(t)
		ended <- err
	}()
	<-working
	if err := roundTrip(t.Context(), e.to, gone); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("the key that is gone: %v", err)
	}
	if err := roundTrip(t.Context(), e.to, used); err != nil {
		t.Errorf("another key: %v", err)
	}
	close(enough)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// objectsOf returns the target's objects under an identity; within a step.
func (e *ends) objectsOf(t testing.TB, id pluginproto.KeyID) []pkcs11.ObjectHandle {
	return search(t, e.target().lib, e.place().Session, id)
}
