package kms

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// alone runs a chore under the lease.
func (j *janitor) alone(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	release, err := j.g.Lease(ctx)
	if err != nil {
		return err
	}
	defer release()
	return do(ctx)
}

// clearUp decides operations with an open end: under the lease nothing is committed,
// so an intent that is there and that nobody is at will never be, and what is committed
// is in the catalog. It takes the word that was left before it looks: what is said
// meanwhile, perhaps of what it has looked at already, is for the next round.
func (j *janitor) clearUp(ctx context.Context) error {
	j.mu.Lock()
	suspects := slices.Sorted(maps.Keys(j.suspects))
	clear(j.suspects)
	j.mu.Unlock()
	if len(suspects) == 0 {
		return nil
	}
	err := j.alone(ctx, func(ctx context.Context) error {
		atWork, err := j.takeBack(ctx)
		if err != nil {
			return err
		}
		for _, name := range suspects {
			if _, err := j.kms.refresh(ctx, name); err != nil && !errors.Is(err, catalog.ErrNotFound) {
				return err
			}
		}
		suspects = slices.DeleteFunc(suspects, func(name string) bool { return !atWork[name] })
		return nil
	})
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, name := range suspects {
		j.suspects[name] = true // and no reason to look again at once
	}
	return err
}

// takeBack takes back what is open, but for what is being made. It returns the keys of
// which a version is: that may yet be given up.
func (j *janitor) takeBack(ctx context.Context) (atWork map[string]bool, err error) {
	var open []catalog.Intent
	atWork = make(map[string]bool)
	for in, err := range j.kms.catalog.Intents(ctx) {
		if err != nil {
			return nil, err
		}
		switch {
		case in.Group != j.g.name:
		case j.g.making.has(in.Identity):
			atWork[in.Key] = true
		default:
			open = append(open, in)
		}
	}
	for _, in := range open {
		tomb, err := j.kms.catalog.Abandon(ctx, in, j.g.Names())
		if errors.Is(err, catalog.ErrConflict) {
			continue // whoever was making it has taken it back since the list was read
		}
		if err != nil {
			return nil, err
		}
		j.kms.destroyUndone(ctx, j.g, tomb)
	}
	return atWork, nil
}

// settle destroys on members in step what should have been destroyed there.
// Members that are away are dealt with when they are admitted. As with clearUp, what is
// said meanwhile is for the next round: a version can be given up without the lease.
func (j *janitor) settle(ctx context.Context) error {
	j.mu.Lock()
	unsettled := j.unsettled
	j.unsettled = false
	j.mu.Unlock()
	if !unsettled {
		return nil
	}
	err := j.alone(ctx, j.destroyPending)
	if err != nil {
		j.settleLater()
	}
	return err
}

// destroyPending destroys what tombstones say is still on members in step.
func (j *janitor) destroyPending(ctx context.Context) error {
	inStep := names(j.g.InStep())
	var ids []pluginproto.KeyID
	for t, err := range j.kms.catalog.Tombstones(ctx) {
		if err != nil {
			return err
		}
		here := slices.ContainsFunc(t.Pending, func(m string) bool { return slices.Contains(inStep, m) })
		if t.Group != j.g.name || !here {
			continue
		}
		id, err := pluginproto.ParseKeyID(t.Identity)
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return nil
	}
	return j.kms.destroyCopies(ctx, j.g, ids)
}

// destroyDue destroys versions whose waiting period is over.
func (j *janitor) destroyDue(ctx context.Context) error {
	var failures []error
	for _, name := range j.due(destroyTime) {
		ctx, cancel := context.WithTimeout(ctx, choreTimeout)
		_, err := j.kms.destroyNow(ctx, j.g, name, isDue)
		if errors.Is(err, errNeeded) {
			err = j.keepNeeded(ctx, name)
		}
		cancel()
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}

// keepNeeded brings back what should be destroyed now though data keys need it. That is
// what a crash can leave, see [KMS.ChangeVersion].
func (j *janitor) keepNeeded(ctx context.Context, name string) error {
	key, err := j.kms.ring.get(name)
	if err != nil {
		return err
	}
	for _, v := range key.rec.Versions {
		if !isDue(v) {
			continue
		}
		why := j.kms.mustBeUnused(ctx, key.rec, []int{v.Number})
		if why == nil {
			continue // the next round destroys it
		}
		if !errors.Is(why, errNeeded) {
			return why
		}
		if _, err := j.kms.bringBack(ctx, name, v.Number, api.ActionRestore); err != nil {
			return err
		}
		j.log.Warn("kept a version that was to be destroyed now", "key", name, "version", v.Number, "reason", why)
		j.kms.events.publish(api.Event{Type: api.EventKey, Group: j.g.name, Key: name, To: "version_kept", Cause: why.Error(), Alarm: true})
	}
	return nil
}

// rotateDue makes the next version of keys whose newest is old enough, or has wrapped
// often enough.
func (j *janitor) rotateDue(ctx context.Context) error {
	var failures []error
	for _, name := range j.due(rotationTime) {
		ctx, cancel := context.WithTimeout(ctx, choreTimeout)
		_, err := j.kms.rotate(ctx, name, api.RotateOptions{})
		cancel()
		failures = append(failures, translate("rotating key "+name, err))
	}
	return errors.Join(failures...)
}

// due returns the names of the keys whose time has come, in order.
func (j *janitor) due(when func(*key) time.Time) (keys []string) {
	now := time.Now()
	j.kms.ring.inGroup(j.g.name, func(k *key) bool {
		if at := when(k); !at.IsZero() && !at.After(now) {
			keys = append(keys, k.rec.Name)
		}
		return true
	})
	slices.Sort(keys)
	return keys
}

// nextDue is the first time after another at which something is to be done that is known of
// now.
func (j *janitor) nextDue(after time.Time) time.Time {
	next := time.Now().Add(idle)
	j.kms.ring.inGroup(j.g.name, func(k *key) bool {
		for _, at := range []time.Time{destroyTime(k), rotationTime(k)} {
			if at.After(after) && at.Before(next) {
				next = at
			}
		}
		return true
	})
	return next
}

// destroyTime is when the next version of a key is to be destroyed; zero: none is.
func destroyTime(k *key) (at time.Time) {
	for _, v := range k.rec.Versions {
		if v.State == catalog.DestroyScheduled && v.DestroyAt != nil && (at.IsZero() || v.DestroyAt.Before(at)) {
			at = *v.DestroyAt
		}
	}
	return at
}

func isDue(v catalog.Version) bool {
	return v.State == catalog.DestroyScheduled && v.DestroyAt != nil && !v.DestroyAt.After(time.Now())
}

// rotationTime is when a key gets its next version by itself; zero: never.
func rotationTime(k *key) time.Time {
	if k.primary < 0 {
		return time.Time{}
	}
	if k.alg != 0 && k.uses[k.primary].spent() {
		return k.rec.Versions[k.primary].Created // at once
	}
	if k.rec.RotationPeriod <= 0 {
		return time.Time{}
	}
	return k.rec.Versions[k.primary].Created.Add(k.rec.RotationPeriod)
}

// noteLost takes copies off the catalog that members in step do not have.
func (j *janitor) noteLost(ctx context.Context) error {
	j.mu.Lock()
	var lost []loss
	for l, noted := range j.lost {
		if !noted {
			lost = append(lost, l)
		}
	}
	j.mu.Unlock()
	if len(lost) == 0 {
		return nil
	}
	moves := make(map[string][]move)
	for _, l := range lost {
		moves[l.key] = append(moves[l.key], move{l.version, l.member, false})
		j.log.Warn("a member in step lacks a key", "member", l.member, "key", l.key, "version", l.version)
	}
	if err := j.kms.noteCopies(ctx, moves); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, l := range lost {
		if _, still := j.lost[l]; still {
			j.lost[l] = true
		}
	}
	return nil
}

// heal clones to members in step the copies they lack. Each clone takes the lease
// anew, so that key operations come in between.
func (j *janitor) heal(ctx context.Context) error {
	members := j.g.InStep()
	if len(members) < 2 {
		return nil
	}
	var failures []error
	failed := make(map[string]int) // :: member → failures in this round
	for _, l := range j.lacking(names(members)) {
		if failed[l.member] == maxRefusals {
			continue // it is full, perhaps; others come first in the next round
		}
		err := j.alone(ctx, func(ctx context.Context) error { return j.healOne(ctx, l) })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			failed[l.member]++
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// lacking returns the copies that members are without and another one has, but for
// those in whose place there is another key: nothing is ever put there.
func (j *janitor) lacking(members []string) (all []loss) {
	here := func(m string) bool { return slices.Contains(members, m) }
	j.kms.ring.inGroup(j.g.name, func(k *key) bool {
		for i, v := range k.rec.Versions {
			if !living(v) || !slices.ContainsFunc(v.Copies, here) {
				continue
			}
			for _, m := range members {
				if !slices.Contains(v.Copies, m) && !j.g.admission.Quarantined(m, k.ids[i]) {
					all = append(all, loss{k.rec.Name, v.Number, m})
				}
			}
		}
		return true
	})
	return all
}

func (j *janitor) healOne(ctx context.Context, l loss) error {
	k, err := j.kms.ring.get(l.key)
	if err != nil {
		return err
	}
	i := k.index(l.version)
	if i < 0 || !living(k.rec.Versions[i]) {
		return nil
	}
	to, err := j.g.Member(l.member)
	if err != nil {
		return nil // it is seen to when it is admitted
	}
	holders := slices.DeleteFunc(j.g.InStep(), func(m group.Member) bool {
		return !slices.Contains(k.rec.Versions[i].Copies, m.Name())
	})
	_, found, err := replica.Fetch(ctx, to, k.copyOf(i), tokens(holders), j.g.Distrust)
	if err != nil {
		j.kms.inspect(ctx, j.g, to, k, i) // it may hold a different one
		return err
	}
	if !found {
		return nil
	}
	j.log.Info("brought over a missing copy", "member", l.member, "key", l.key, "version", l.version)
	if err := j.kms.noteCopies(ctx, map[string][]move{l.key: {{l.version, l.member, true}}}); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.lost, l)
	return nil
}

// look has members in step compared with the catalog, as when they were admitted, one
// after the other and while they serve. One that is lost meanwhile is compared when it
// comes back.
func (j *janitor) look(ctx context.Context) error {
	if time.Since(j.looked) < lookEvery {
		return nil
	}
	j.looked = time.Now()
	var failures []error
	for _, member := range names(j.g.InStep()) {
		if err := j.g.Readmit(ctx, member); err != nil && !errors.Is(err, group.ErrNotInStep) {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}
