package p11_test

import (
	"math/rand/v2"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// Transfers of any kind that fail at any step in any way, and are ended or left alone, leave
// no session that does not wait for its next step, and nothing on the token that is not a key.
func TestNothingLeaksWhateverFails(t *testing.T) {
	const transfers, seed = 400, 1
	chance := rand.New(rand.NewPCG(seed, seed))
	e := newEnds(t)
	var ids []pluginproto.KeyID
	for i := range 6 {
		ids = append(ids, generate(t, e.from, []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256}[i%2]).ID)
	}
	codes := []pkcs11.Error{pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_DEVICE_ERROR}
	steps := []string{"source begins", "target begins", "source 0", "source 1", "source 2", "target 0", "target 1", "target 2", "target ends", "uid"}
	for n := range transfers {
		e.do(func() {
			e.heal()
			if chance.IntN(2) == 0 {
				e.fail[steps[chance.IntN(len(steps))]] = codes[chance.IntN(len(codes))]
				e.lost = chance.IntN(2) == 0
			}
		})
		way, some := []string{"relay", "batch", "alone"}[chance.IntN(3)], ids[:1+chance.IntN(len(ids))]
		if way == "relay" {
			some = some[:1]
		}
		r := e.relay(way, some...)
		for range 1 + chance.IntN(4) {
			if _, err := r.give(t); err != nil {
				break
			}
			if out, err := r.take(t); err != nil || out.Done {
				break
			}
		}
		if chance.IntN(10) > 0 {
			r.end(t)
		}
		if n%10 == 9 {
			e.do(e.heal)
			e.destroyAll(t, ids)
		}
	}
	waiting := e.from.Transfers() + e.to.Transfers()
	e.do(func() {
		if e.open != waiting {
			t.Errorf("%d ends are open, %d transfers wait", e.open, waiting)
		}
	})
	if n := e.sessions(); n != waiting {
		t.Errorf("%d sessions of transfers are open, %d transfers wait", n, waiting)
	}
}

// destroyAll destroys keys on the target, and wants nothing else to be there.
func (e *ends) destroyAll(t testing.TB, ids []pluginproto.KeyID) {
	t.Helper()
	for _, id := range ids {
		if err := e.to.Destroy(t.Context(), id); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Error(err)
		}
	}
	err := e.to.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		if err := lib.FindObjectsInit(sh, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)}); err != nil {
			return err
		}
		left, _, err := lib.FindObjects(sh, 100)
		if len(left) > 0 {
			t.Errorf("%d objects are left", len(left))
		}
		if err != nil {
			return err
		}
		return lib.FindObjectsFinal(sh)
	})
	if err != nil {
		t.Error(err)
	}
}
