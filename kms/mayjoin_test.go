package kms_test

import (
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

func TestARefusedPINIsHeldAgainstItsTokenAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2, "hsm-d", "hsm-e")
		r.mustStart()
		defer func() { r.stop() }()
		ctx, wrong := t.Context(), r.spare["hsm-e"].token
		wrong.SetPIN("another")
		for range 2 { // the wrong label was given
			_, err := r.AddMember(ctx, "", r.spec("hsm-d", "hsm-e"))
			wantError(t, err, api.ErrMemberFailed, "CKR_PIN_INCORRECT")
		}
		if n := wrong.PINTries(); n != 1 {
			t.Errorf("the wrong PIN was tried %d times", n)
		}
		if _, err := r.AddMember(ctx, "", r.spec("hsm-d", "hsm-d")); err != nil {
			t.Errorf("the token that was meant: %v", err)
		}
		_, err := r.AddMember(ctx, "", r.spec("hsm-f", "hsm-d"))
		wantError(t, err, api.ErrBadRequest, "member hsm-f has the settings of member hsm-d; every member needs its own token")

		spare := r.spare["hsm-d"]
		spare.token.SetPIN("another")
		spare.leave()
		spare.come()
		r.wantStates(active, active, failed)
		wantError(t, r.Recover(ctx, "", "hsm-d"), api.ErrMemberFailed, "when the token has been given this PIN, with: kmsd member replace hsm-d")
		spare.token.SetPIN(memdriver.PIN)
		wantError(t, r.Recover(ctx, "", "hsm-d"), api.ErrMemberFailed, "CKR_PIN_INCORRECT")
		if _, err := r.ReplaceMember(ctx, "", "hsm-d", nil); err != nil {
			t.Errorf("after the token was mended: %v", err)
		}
	})
}

func TestMembersThatMayNotJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2, "hsm-d", "hsm-e")
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		ctx := t.Context()
		before := records(t, r.disk)

		_, err := r.AddMember(ctx, "", r.spec("hsm-x", "nowhere"))
		wantError(t, err, api.ErrBadRequest, `there is no token "nowhere"`)
		_, err = r.AddMember(ctx, "", r.spec("", "hsm-d"))
		wantError(t, err, api.ErrBadRequest, "not the name of a member")

		r.spare["hsm-d"].leave()
		_, err = r.AddMember(ctx, "", r.spec("hsm-d", "hsm-d"))
		wantError(t, err, api.ErrMemberFailed, "adding member hsm-d")
		r.spare["hsm-d"].come()

		r.spare["twin"] = &hsm{name: "twin", token: r.hsms[0].token, pin: memdriver.PIN}
		_, err = r.AddMember(ctx, "", r.spec("hsm-d", "twin"))
		wantError(t, err, api.ErrBadRequest, "member hsm-d has the settings of member hsm-a")
		elsewhere := r.spec("hsm-d", "twin")
		elsewhere.Driver = "another"
		elsewhere.Settings["token_serial"] = r.Status().Groups[0].Members[0].Token.Serial
		_, err = r.AddMember(ctx, "", elsewhere)
		wantError(t, err, api.ErrBadRequest, "member hsm-d has the settings of member hsm-a")
		delete(elsewhere.Settings, "token_serial")
		_, err = r.AddMember(ctx, "", elsewhere)
		wantError(t, err, api.ErrMemberFailed, "is that of member hsm-a")

		r.spare["hsm-e"].faults = []memdriver.Fault{{Call: memdriver.CallCloneStep, Times: 99, Err: &pluginproto.Error{
			Class: pluginproto.ClassCaller, CKR: 0x6A, Op: "unwrapping", Msg: "refused by the policy of the partition"}}}
		_, err = r.AddMember(ctx, "", r.spec("hsm-e", "hsm-e"))
		wantError(t, err, api.ErrMemberFailed, "member hsm-a: CKR_KEY_UNEXTRACTABLE: refused by the policy of the partition (it refuses a clone of a canary key)")

		r.wantMembers("hsm-a hsm-b")
		if after := records(t, r.disk); after != before {
			t.Errorf("what is remembered of members was\n%s\nand is\n%s", before, after)
		}
		for _, h := range r.spare {
			if h.name != "twin" && len(h.token.Keys()) > 0 {
				t.Errorf("%s was left with keys", h.name)
			}
		}
		r.wantConsistent()
	})
}
