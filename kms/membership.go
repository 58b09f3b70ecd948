package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// maxMembers is the largest group, as with Luna.
const maxMembers = 32

// What an operator changes has to be true in two places: in the group that runs and in
// the catalog, from which the next start takes it. Whatever a crash leaves between the two
// is the state before or the state after, and nothing was answered yet:
//
//   - A member that joins is written down when it has been admitted, before it serves
//     ([KMS.pin]). Before that it is nobody's.
//   - A member that leaves is drained, which can be refused and undone; then its removal
//     is written down; then it goes, which cannot fail. What a crash leaves of its copies
//     is forgotten at the next start.
//   - A role and a drain are done first, since the group may refuse, and then written
//     down. When they cannot be, they are undone.

// AddMember takes a member into a group.
func (k *KMS) AddMember(ctx context.Context, groupName string, spec api.MemberSpec) (api.Member, error) {
	return k.change(ctx, "adding member "+spec.Name, groupName, spec.Name, func(ctx context.Context, g *keyGroup) error {
		return k.addMember(ctx, g, spec)
	})
}

func (k *KMS) addMember(ctx context.Context, g *keyGroup, spec api.MemberSpec) error {
	if _, there := g.table.get(spec.Name); there {
		return api.NewError(api.CodeExists, fmt.Sprintf("group %s has a member %s already", g.name, spec.Name), group.ErrMemberExists)
	}
	if n := len(g.Names()); n >= maxMembers {
		return stateError("remove a member first", "group %s has %d members, which is the most", g.name, n)
	}
	s, err := k.seatFor(g, spec)
	if err != nil {
		return err
	}
	before, err := k.record(ctx, g, s.name)
	if err != nil {
		return err
	}
	g.table.put(s)
	g.table.swap(s.name, true) // of an earlier member of that name something may be known
	err = g.Add(ctx, k.memberConfig(g, s))
	g.table.swap(s.name, false)
	if err == nil {
		return nil
	}
	return errors.Join(memberFailed(ctx, "adding member "+s.name, s.name, err), k.strike(ctx, g, s.name, before))
}

// strike takes back what was written down of a member that has not joined. With the
// lease nobody is at that any more, though the attempt may have outlived its caller.
func (k *KMS) strike(ctx context.Context, g *keyGroup, member string, before *catalog.Member) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if release, err := g.Lease(ctx); err == nil { // else it is done all the same
		defer release()
	}
	g.table.remove(member)
	return errors.Join(k.forgetMember(ctx, g, member), k.restore(ctx, g, member, before))
}

// record returns what is remembered of a member, nil when that is nothing.
func (k *KMS) record(ctx context.Context, g *keyGroup, member string) (*catalog.Member, error) {
	rec, err := k.catalog.Member(ctx, g.name, member)
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &rec, nil
}

// restore takes back what was written down of a member in an attempt that failed.
func (k *KMS) restore(ctx context.Context, g *keyGroup, member string, before *catalog.Member) error {
	now, err := k.record(ctx, g, member)
	switch {
	case err != nil:
		return err
	case before == nil:
		return k.catalog.ForgetMember(ctx, g.name, member)
	case now != nil && now.Rev == before.Rev:
		return nil
	}
	_, err = k.catalog.UpdateMember(ctx, g.name, member, func(rec *catalog.Member) error {
		rev := rec.Rev
		*rec = *before
		rec.Rev = rev
		return nil
	})
	return err
}

// RemoveMember drains a member and forgets it.
func (k *KMS) RemoveMember(ctx context.Context, groupName, member string, force bool) error {
	_, err := k.change(ctx, "removing member "+member, groupName, "", func(ctx context.Context, g *keyGroup) error {
		s, err := g.seat(member)
		if err != nil {
			return err
		}
		return k.removeMember(ctx, g, s, force)
	})
	return blame(member, err)
}

func (k *KMS) removeMember(ctx context.Context, g *keyGroup, s seat, force bool) error {
	if err := k.mayLeave(g, s.name, force); err != nil {
		return err
	}
	err := g.Group.Drain(ctx, s.name, force)
	undo, cancel := cleanup(ctx) // the time for it begins when the member is at rest
	defer cancel()
	if err != nil && (ctx.Err() == nil || !force) { // by force it goes with what it has in flight
		return errors.Join(err, k.undrain(undo, g, s, ctx.Err() != nil))
	}
	if err := k.recordRemoval(undo, g, s, force); err != nil {
		return errors.Join(err, k.undrain(undo, g, s, true))
	}
	for slices.Contains(g.Names(), s.name) { // again when somebody has ended its drain meanwhile
		if err := g.Group.Remove(ctx, s.name, true); err != nil && !errors.Is(err, group.ErrUnknownMember) {
			k.log.Warn("a member is removed before it has finished", "group", g.name, "member", s.name, "error", err)
		}
		if k.life.Err() != nil {
			return errClosed
		}
	}
	k.dismiss(ctx, g, s)
	return nil
}

// recordRemoval writes down that a drained member leaves. Under the lease no key is
// being made, so whether it holds the last copy of one is certain.
func (k *KMS) recordRemoval(ctx context.Context, g *keyGroup, s seat, force bool) error {
	release, err := g.Lease(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := k.mayLeave(g, s.name, force); err != nil {
		return err
	}
	if err := k.remember(ctx, g, s, func(rec *catalog.Member) { rec.Removed = true }); err != nil {
		return err
	}
	g.table.remove(s.name) // whoever has the lease next, and what it was making, is told by this
	return nil
}

// mayLeave refuses a removal that would leave the group worse than an operator may
// expect.
func (k *KMS) mayLeave(g *keyGroup, member string, force bool) error {
	left := len(g.Names()) - 1
	if left < 1 {
		return stateError("add another member first", "%s is the only member of group %s", member, g.name)
	}
	if force {
		return nil
	}
	if sole := k.soleCopies(g, member); len(sole) > 0 {
		return stateError("bring the other members back, look with: kmsd key verify NAME, or force it, and these keys are lost",
			"no other member is known to hold %s", someKeys(sole))
	}
	if least := g.minCopies(); left < least {
		return stateError("add another member first, or force it, and keys are made only with allow_degraded",
			"group %s would have %d members, and new keys need %d copies", g.name, left, least)
	}
	return nil
}

// someKeys names a few of many.
func someKeys(names []string) string {
	const few = 5
	if len(names) == 1 {
		return "key " + names[0]
	}
	if len(names) <= few {
		return "keys " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("keys %s and %d more", strings.Join(names[:few], ", "), len(names)-few)
}

// dismiss forgets a member that the group has no more. What the configuration says of it
// stays overruled, when it says anything. What cannot be written now is forgotten at the
// next start.
func (k *KMS) dismiss(ctx context.Context, g *keyGroup, s seat) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	err := k.forgetMember(ctx, g, s.name)
	if err == nil && g.table.entry(s.name) == "" {
		err = k.catalog.ForgetMember(ctx, g.name, s.name)
	}
	if err != nil {
		k.log.Warn("what a removed member held is forgotten at the next start", "group", g.name, "member", s.name, "error", err)
	}
}

// ReplaceMember accepts another token under the name of a member.
func (k *KMS) ReplaceMember(ctx context.Context, groupName, member string, spec *api.MemberSpec) (api.Member, error) {
	return k.change(ctx, "replacing member "+member, groupName, member, func(ctx context.Context, g *keyGroup) error {
		old, err := g.seat(member)
		if err != nil {
			return err
		}
		next := old
		if spec != nil {
			described := *spec
			if described.Name == "" {
				described.Name = member
			}
			if described.Name != member {
				return badRequest("member %s cannot get another name; remove it and add %s", member, described.Name)
			}
			if next, err = k.seatFor(g, described); err != nil {
				return err
			}
			if err := k.mayGiveUp(g, old, next); err != nil {
				return err
			}
		}
		next.drained = false
		return k.replace(ctx, g, old, next)
	})
}

// mayGiveUp refuses to exchange an HSM that works for another one while keys are on it
// alone. One that does not work keeps nobody from it: its keys are lost, or come back
// with it as another member.
func (k *KMS) mayGiveUp(g *keyGroup, old, next seat) error {
	if before, err := k.resolve(g, old); err != nil {
		return nil
	} else if after, err := k.resolve(g, next); err == nil && placeOf(before) == placeOf(after) {
		return nil // it is the same HSM
	}
	works := slices.ContainsFunc(g.InStep(), func(m group.Member) bool { return m.Name() == old.name })
	if sole := k.soleCopies(g, old.name); works && len(sole) > 0 {
		return stateError("bring the other members back, or add the other HSM as a new member and remove this one after that",
			"no other member is known to hold %s", someKeys(sole))
	}
	return nil
}

// replace gives a member another seat, and takes the old one back when the member
// does not pass with the new. The new one is written down when it is admitted.
func (k *KMS) replace(ctx context.Context, g *keyGroup, old, next seat) error {
	before, err := k.record(ctx, g, next.name)
	if err != nil {
		return err
	}
	g.table.put(next)
	g.table.swap(next.name, true)
	if m, err := k.resolve(g, next); err == nil { // else connecting it says why not
		k.connector.pins.forget(slotOf(g.name, m))
	}
	err = g.Group.Replace(ctx, k.memberConfig(g, next))
	g.table.swap(next.name, false)
	err = memberFailed(ctx, "replacing member "+next.name, next.name, err)
	if err == nil || next.spec == old.spec { // the same HSM is tried again as any that is away
		if old.drained {
			undo, cancel := cleanup(ctx)
			defer cancel()
			err = errors.Join(err, k.remember(undo, g, next, func(rec *catalog.Member) { rec.Drained = false }))
		}
		return err
	}
	k.takeBack(ctx, g, old, before)
	return err
}

// takeBack gives a member its old seat after a replacement that has failed. The new one
// may be at its admission still, and is stopped first: it must not be written down as
// the old one's token.
func (k *KMS) takeBack(ctx context.Context, g *keyGroup, old seat, before *catalog.Member) {
	undo, cancel := cleanup(ctx)
	defer cancel()
	err := g.Group.Drain(undo, old.name, true)
	g.table.put(old)
	if err = errors.Join(err, k.restore(undo, g, old.name, before)); err != nil {
		k.log.Warn("what was remembered of a member is not back after a replacement that failed", "group", g.name, "member", old.name, "error", err)
	}
	undo, cancel = cleanup(ctx)
	defer cancel()
	if err := g.Group.Replace(undo, k.memberConfig(g, old)); err != nil {
		k.log.Warn("a member is not back after a replacement that failed", "group", g.name, "member", old.name, "error", err)
	}
}

// inOrder runs a change of who belongs to a group, one at a time, to its end.
func inOrder[T any](ctx context.Context, k *KMS, g *keyGroup, do func(context.Context) (T, error)) (T, error) {
	return detached(ctx, k, func(ctx context.Context) (T, error) {
		select {
		case g.order <- struct{}{}:
		case <-ctx.Done():
			var none T
			return none, fmt.Errorf("waiting for another change of group %s: %w", g.name, ctx.Err())
		}
		defer func() { <-g.order }()
		return do(ctx)
	})
}

// change runs a change of a member in order and returns the member as it is after that;
// none for the name "".
func (k *KMS) change(ctx context.Context, doing, groupName, member string, do func(context.Context, *keyGroup) error) (api.Member, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	g, err := k.group(groupName)
	if err != nil {
		return api.Member{}, err
	}
	_, err = inOrder(ctx, k, g, func(ctx context.Context) (struct{}, error) { return struct{}{}, do(ctx, g) })
	if err != nil || member == "" {
		return api.Member{}, blame(member, translate(doing, err))
	}
	s := k.groupStatus(g)
	i := slices.IndexFunc(s.Members, func(m api.Member) bool { return m.Name == member })
	if i < 0 {
		return api.Member{}, translate(doing, group.ErrUnknownMember) // removed in this moment
	}
	return s.Members[i], nil
}

// blame names the member that a change was about in its error, unless that names one.
func blame(member string, err error) error {
	e, ok := errors.AsType[*api.Error](err)
	if !ok || e.Member != "" {
		return err
	}
	named := *e
	named.Member = member
	return &named
}

// remember writes down what was decided about a member.
func (k *KMS) remember(ctx context.Context, g *keyGroup, s seat, change func(*catalog.Member)) error {
	_, err := k.catalog.UpdateMember(ctx, g.name, s.name, func(rec *catalog.Member) error {
		rec.Seen = s.entry
		if s.spec != nil && rec.Spec == nil { // it never was admitted, so pin has not written it
			spec, err := json.Marshal(s.spec)
			if err != nil {
				return fmt.Errorf("describing member %s: %w", s.name, err)
			}
			rec.Spec = spec
		}
		change(rec)
		return nil
	})
	return err
}

// seat returns a member's place, or ErrNotFound.
func (g *keyGroup) seat(member string) (seat, error) {
	s, ok := g.table.get(member)
	if !ok {
		return seat{}, api.NewError(api.CodeNotFound, fmt.Sprintf("group %s has no member %q", g.name, member), group.ErrUnknownMember)
	}
	return s, nil
}

// memberFailed names the outcome of an attempt with one member: its failure is the
// answer.
func memberFailed(ctx context.Context, doing, member string, err error) error {
	switch {
	case err == nil:
		return nil
	case isEnd(ctx, err), errors.Is(err, group.ErrLastActive), errors.Is(err, group.ErrMemberExists), errors.Is(err, group.ErrClosed):
		return err
	}
	e := api.NewError(api.CodeMemberFailed, fmt.Sprintf("%s: %v", doing, err), err)
	e.Member = member
	if ckr := pluginproto.CKROf(err); ckr != pluginproto.CKROK {
		e.CKR = pluginproto.CKRName(ckr)
	}
	return e
}
