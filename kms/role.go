package kms

import (
	"context"
	"errors"
	"fmt"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// SetRole makes a member active or standby, and ends a drain.
func (k *KMS) SetRole(ctx context.Context, groupName, member, role string, force bool) (api.Member, error) {
	return k.change(ctx, "making member "+member+" "+role, groupName, member, func(ctx context.Context, g *keyGroup) error {
		if role != api.RoleActive && role != api.RoleStandby {
			return badRequest("there is no role %q; choose %s or %s", role, api.RoleActive, api.RoleStandby)
		}
		old, err := g.seat(member)
		if err != nil {
			return err
		}
		next := old
		next.config.Standby, next.drained = role == api.RoleStandby, false
		return k.setRole(ctx, g, old, next, force)
	})
}

func (k *KMS) setRole(ctx context.Context, g *keyGroup, old, next seat, force bool) error {
	standby := next.config.Standby
	if err := g.SetStandby(next.name, standby, force); err != nil {
		return err
	}
	undo, cancel := cleanup(ctx)
	defer cancel()
	err := k.remember(undo, g, next, func(rec *catalog.Member) { rec.Standby, rec.Drained = &standby, false })
	if err != nil {
		return errors.Join(err, g.SetStandby(next.name, old.config.Standby, true))
	}
	g.table.put(next)
	if !old.drained {
		return nil
	}
	return memberFailed(ctx, "bringing member "+next.name+" back", next.name, g.Resume(ctx, next.name))
}

// Drain lets a member finish what it has and gives it nothing new.
func (k *KMS) Drain(ctx context.Context, groupName, member string, force bool) (api.Member, error) {
	return k.change(ctx, "draining member "+member, groupName, member, func(ctx context.Context, g *keyGroup) error {
		old, err := g.seat(member)
		if err != nil {
			return err
		}
		s := old
		drained := g.Group.Drain(ctx, member, force)
		if drained != nil && !errors.Is(drained, ctx.Err()) {
			return drained // also when ctx has ended since
		}
		// Also when somebody is tired of waiting: it gets nothing new all the same.
		undo, cancel := cleanup(ctx)
		defer cancel()
		s.drained = true
		if err := k.remember(undo, g, s, func(rec *catalog.Member) { rec.Drained = true }); err != nil {
			return errors.Join(err, k.undrain(undo, g, old, true))
		}
		g.table.put(s)
		return drained
	})
}

// endDrain has a member not be drained any more, before it is recovered.
func (k *KMS) endDrain(ctx context.Context, g *keyGroup, member string) error {
	s, ok := g.table.get(member)
	if !ok || !s.drained {
		return nil
	}
	_, err := k.change(ctx, "ending the drain of member "+member, g.name, "", func(ctx context.Context, g *keyGroup) error {
		s, err := g.seat(member)
		if err != nil {
			return err
		}
		s.drained = false
		if err := k.remember(ctx, g, s, func(rec *catalog.Member) { rec.Drained = false }); err != nil {
			return err
		}
		g.table.put(s)
		return nil
	})
	return err
}

// undrain takes back a drain that has begun, of a member that was not drained before.
func (k *KMS) undrain(ctx context.Context, g *keyGroup, s seat, begun bool) error {
	if !begun || s.drained {
		return nil
	}
	if err := g.Resume(ctx, s.name); err != nil {
		return fmt.Errorf("and member %s is not back after that: %w", s.name, err)
	}
	return nil
}
