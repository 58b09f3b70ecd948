package kms_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// refuse makes all HSMs refuse to decrypt: many items together, or anything.
func (r *rig) refuse(many bool) {
	const mechanismInvalid = 0x70 // PKCS#11 2.40, pkcs11t.h
	for _, h := range r.hsms {
		h.driver().Script(memdriver.Fault{
			Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Many: many,
			Err: &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: mechanismInvalid, Op: "decrypting"},
		})
	}
}

func TestRekeyGoesOnOneByOneWhenManyTogetherAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.mustStart()
		defer r.stop()
		n := r.fillShop(60)
		r.refuse(true)
		done := r.wantJob(r.rekey(api.RekeyOptions{}).ID, api.JobDone)
		if done.Progress.Done != n || done.Failed != 0 {
			t.Errorf("it ends as %+v, want all %d versions of data keys done", done, n)
		}
		r.wantShop(60, 2)
	})
}

func TestRekeyLosesNothingWhenTheHSMsRefuseAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.mustStart()
		defer r.stop()
		n := r.fillShop(60)
		r.refuse(false)
		done := r.wantJob(r.rekey(api.RekeyOptions{Retire: api.RetireDestroy}).ID, api.JobDone)
		if done.Failed != n || !strings.Contains(done.Reason, "stay under older versions") {
			t.Errorf("it ends as %+v, want all %d versions of data keys failed", done, n)
		}
		for _, h := range r.hsms {
			h.driver().Clear()
		}
		if got := r.states("shop"); got[0] != "enabled" {
			t.Errorf("the version that data keys need is %s", got[0])
		}
		r.wantJob(r.rekey(api.RekeyOptions{}).ID, api.JobDone)
		r.wantShop(60, 2)
	})
}
