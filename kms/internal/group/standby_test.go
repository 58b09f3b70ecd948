package group_test

import (
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

const ckrUserNotLoggedIn = 0x101 // of PKCS#11

// A standby does nothing for hours, and must not be found useless on the day it is
// needed: it is probed as any other member, and its loss shows at once.
func TestW47_AStandbyThatLosesItsLoginIsNoticedWhileItIsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "s*"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		elapse(time.Hour)
		r.wantGroup(api.GroupNormal)
		r.hsms["s"].set(func(h *hsm) {
			h.fault = func(pluginproto.Command) error {
				return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: ckrUserNotLoggedIn, Op: "probing"}
			}
		})
		elapse(3 * time.Second)
		r.wantState("s", api.MemberDown)
		r.wantGroup(api.GroupSole)
		if by := r.mustDo(); by != "a" {
			t.Errorf("answered by %s, want the active member", by)
		}
	})
}
