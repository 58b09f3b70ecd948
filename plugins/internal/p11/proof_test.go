package p11_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// A proof leaves the token as it was, whatever its library does with an object that it has
// already: it takes it in a second time, does not take it, or answers with the one it has.
func TestAProofLeavesTheTokenAsItWas(t *testing.T) {
	e := newEnds(t)
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		made := generate(t, e.from, typ)
		r := e.relay("alone", made.ID)
		if _, err := r.give(t); err != nil {
			t.Fatal(err)
		}
		r.target.Prove = true
		proves := func(t *testing.T) {
			t.Helper()
			r.target.Step = 0
			out, err := r.take(t)
			e.do(e.heal)
			if err != nil || !out.Done || out.Keys[0].Object == nil || !bytes.Equal(out.Keys[0].Object.CheckValue, made.CheckValue) {
				t.Errorf("%+v, %v", out, err)
			}
		}
		t.Run(string(typ)+" that is not there", func(t *testing.T) {
			proves(t)
			e.clean(t, made.ID)
		})
		t.Run(string(typ)+" that is not there, is taken in and not answered", func(t *testing.T) {
			e.do(func() { e.lost, e.fail["target ends"] = true, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) })
			r.target.Step = 0
			_, err := r.take(t)
			e.do(e.heal)
			if pluginproto.ClassOf(err) != pluginproto.ClassMember {
				t.Errorf("%v", err)
			}
			e.clean(t, made.ID)
		})
		e.arrives(t, made)
		for name, ill := range map[string]func(){
			"is there and is taken in again": func() {},
			"is there and is not taken":      func() { e.bend = func(p *parcel) { p.Err = errTaken } },
			"is there and is answered with": func() {
				e.bend = func(p *parcel) { p.Err = errTaken }
				e.answer = func([]p11.Received) []p11.Received { return []p11.Received{{Object: e.secretHandle(made.ID)}} }
			},
			"is there and is replaced": func() {
				e.answer = func(r []p11.Received) []p11.Received { e.replace(made.ID, r[0].Object); return r }
			},
		} {
			t.Run(string(typ)+" that "+name, func(t *testing.T) {
				e.do(ill)
				proves(t)
				e.clean(t)
				if got, err := e.to.Inspect(t.Context(), made.ID); err != nil || !bytes.Equal(got.CheckValue, made.CheckValue) {
					t.Fatalf("the key that was there: %v", err)
				}
			})
		}
		t.Run(string(typ)+" that is taken in and not answered", func(t *testing.T) {
			e.do(func() { e.lost, e.fail["target ends"] = true, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) })
			r.target.Step = 0
			_, err := r.take(t)
			e.do(e.heal)
			if pluginproto.ClassOf(err) != pluginproto.ClassMember {
				t.Errorf("%v", err)
			}
			e.clean(t)
			if got, err := e.to.Inspect(t.Context(), made.ID); err != nil || !bytes.Equal(got.CheckValue, made.CheckValue) {
				t.Errorf("the key that was there: %v", err)
			}
		})
		t.Run(string(typ)+" that the blob does not hold", func(t *testing.T) {
			e.do(func() { e.bend = func(p *parcel) { p.ID = append([]byte{1}, p.ID[1:]...) } })
			r.target.Step = 0
			_, err := r.take(t)
			e.do(e.heal)
			if pluginproto.ClassOf(err) != pluginproto.ClassCaller || err == nil || !strings.Contains(err.Error(), "not the one") {
				t.Errorf("%v", err)
			}
			e.clean(t)
			if _, err := e.to.Inspect(t.Context(), made.ID); err != nil {
				t.Errorf("the key that was there: %v", err)
			}
		})
	}
}

// target is the fake whose steps are running.
func (e *ends) target() *fake {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := e.lent[len(e.lent)-1]
	return &fake{e.world, last.lib}
}

func (e *ends) place() p11.Place {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lent[len(e.lent)-1].at
}

// secretHandle is the target's secret object under an identity.
func (e *ends) secretHandle(id pluginproto.KeyID) pkcs11.ObjectHandle {
	h, _, _ := e.target().find(e.place(), func(has []byte, _ pkcs11.ObjectHandle) bool { return bytes.Equal(has, id[:]) })
	return h
}

// replace removes the target's secret objects under an identity but for one.
func (e *ends) replace(id pluginproto.KeyID, but pkcs11.ObjectHandle) {
	f, at := e.target(), e.place()
	h, found, err := f.find(at, func(has []byte, h pkcs11.ObjectHandle) bool { return bytes.Equal(has, id[:]) && h != but })
	if found && err == nil {
		_ = f.lib.DestroyObject(at.Session, h)
	}
}
