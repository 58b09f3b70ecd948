package kms

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime/debug"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// Status returns the truth about every group, from memory.
func (k *KMS) Status() Status {
	s := Status{Version: version(), Groups: make([]api.Group, len(k.groups))}
	for i, g := range k.groups {
		s.Groups[i] = k.groupStatus(g)
	}
	s.Jobs = k.openJobs()
	return s
}

func (k *KMS) groupStatus(g *keyGroup) api.Group {
	s := g.Status()
	s.MinCopies = g.minCopies()
	s.BelowMinCopies, s.WithoutCopy = k.ring.scarce(g.name)
	s.WearingOut = k.ring.wearing(g.name)
	for i := range s.Members {
		m := &s.Members[i]
		s.Keys, m.Keys = k.ring.count(g.name, m.Name)
		m.Foreign, m.Quarantined = k.oddities(g, m.Name)
		m.Missing = max(0, s.Keys-m.Keys-m.Quarantined)
		m.Sync = g.admission.Progress(m.Name)
	}
	return s
}

// oddities returns how many objects on a member nobody here knew when it was last
// admitted, and how many of its copies are another key.
func (k *KMS) oddities(g *keyGroup, member string) (foreign, quarantined int) {
	found, _ := g.admission.Found(member)
	for _, w := range found.Quarantined {
		if key, err := k.ring.get(w.Key); err == nil {
			if i, ok := key.byID[w.ID]; ok && living(key.rec.Versions[i]) {
				quarantined++
			}
		}
	}
	return len(found.Foreign), quarantined
}

// Recover makes an attempt to bring a member back now and returns how it ended.
func (k *KMS) Recover(ctx context.Context, groupName, member string) error {
	ctx, cancel := begin(ctx)
	defer cancel()
	g, err := k.group(groupName)
	if err != nil {
		return err
	}
	if err := k.endDrain(ctx, g, member); err != nil {
		return translate("recovering member "+member, err)
	}
	return recovered(ctx, member, g.Group.Recover(ctx, member))
}

// recovered names the outcome of an attempt: here one member was addressed, so its
// failure is the answer.
func recovered(ctx context.Context, member string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, group.ErrUnknownMember):
		return api.NewError(api.CodeNotFound, fmt.Sprintf("there is no member %q", member), err)
	case isEnd(ctx, err), errors.Is(err, group.ErrClosed):
		return translate("recovering member "+member, err)
	}
	e := api.NewError(api.CodeMemberFailed, fmt.Sprintf("recovering member %s: %v", member, err), err)
	e.Member = member
	if ckr := pluginproto.CKROf(err); ckr != pluginproto.CKROK {
		e.CKR = pluginproto.CKRName(ckr)
	}
	return e
}

// Events yields what happens from now on.
func (k *KMS) Events(ctx context.Context) iter.Seq[Event] { return k.events.listen(ctx) }

// Ready says which members have lately done what a database needs of them.
func (k *KMS) Ready() Readiness {
	var r Readiness
	r.Members = []api.MemberReadiness{}
	for _, g := range k.groups {
		for _, m := range g.Status().Members {
			last := lastTrip(g.table.trip(m.Name))
			ok := serves(m.State) && time.Since(last) <= g.fresh
			r.Members = append(r.Members, api.MemberReadiness{Group: g.name, Member: m.Name, OK: ok, Last: last})
			r.Ready = r.Ready || ok
		}
	}
	return r
}

// serves reports whether a member in this state is asked by commands.
func serves(s api.MemberState) bool { return s == api.MemberActive || s == api.MemberStandby }

// version is that of the program this package is built into.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
