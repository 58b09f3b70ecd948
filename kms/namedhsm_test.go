package kms_test

import (
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// All that goes to an HSM for a data key was made or kept by kmsd. A policy of the HSM that
// forbids it is no fault of the database that asks.
func TestWhatAnHSMRefusesIsNoFaultOfTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t).mustStart()
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		r.put("shop", "1")
		for _, h := range r.hsms {
			for _, op := range []pluginproto.Op{pluginproto.OpDecrypt, pluginproto.OpEncrypt} {
				h.driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: op, Err: &pluginproto.Error{
					Class: pluginproto.ClassCaller, CKR: 0x70, Op: "beginning the operation",
				}})
			}
		}
		_, err := r.NamedKey(t.Context(), "shop", "1", 0)
		wantError(t, err, kms.ErrInternal, "CKR_MECHANISM_INVALID")
		_, err = r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: []byte("next")})
		wantError(t, err, kms.ErrInternal, "CKR_MECHANISM_INVALID")
		if e := api.AsError(err); e.CKR != "CKR_MECHANISM_INVALID" {
			t.Errorf("the error names %q", e.CKR)
		}
	})
}
