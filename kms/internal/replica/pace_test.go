package replica_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// laborious is a member that answers nobody while it takes keys, and is given up when that
// takes too long.
type laborious struct {
	*member
	perKey time.Duration
	sizes  []int // of the transfers that were begun
}

const patience = 2 * time.Second

func (l *laborious) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if req.Role == pluginproto.CloneTarget && req.Step == 0 && !req.End {
		l.sizes = append(l.sizes, len(req.Keys))
		takes := time.Duration(len(req.Keys)) * l.perKey
		time.Sleep(min(takes, patience))
		if takes > patience {
			return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassMember, "waiting for an answer", "the member has stopped answering")
		}
	}
	return l.member.CloneStep(ctx, req)
}

// A member that is cut off in a transfer that is too much for it gets smaller ones at its next
// attempt, or it would never be in step; and larger ones again when it is faster.
func TestAMemberThatIsSlowGetsSmallerTransfers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newCarrier(t, "hsm-a", 50), &laborious{member: newCarrier(t, "hsm-b", 50), perKey: 100 * time.Millisecond}
		h := newHall(2)
		h.in = []replica.Token{a}
		h.plan.Copies = a.makeMany(t, 200)
		cut := 0
		for ; cut < 10; cut++ {
			if _, err := h.Admit(t.Context(), b, false); err == nil {
				break
			}
		}
		if cut == 0 || cut > 3 || len(b.hsm().Keys()) != 200 || !slices.Equal(b.sizes[:4], []int{50, 25, 12, 6}) {
			t.Errorf("cut off %d times, it holds %d keys; transfers of %v", cut, len(b.hsm().Keys()), b.sizes)
		}

		for _, c := range h.plan.Copies {
			b.hsm().Lose(c.ID)
		}
		b.perKey, b.sizes = time.Millisecond, nil
		if _, err := h.Admit(t.Context(), b, false); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(b.sizes, []int{6, 12, 24, 48, 50, 50, 10}) {
			t.Errorf("transfers of %v", b.sizes)
		}
	})
}
