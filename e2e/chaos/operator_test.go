package chaos_test

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const group = devserver.DefaultGroup

// drain takes a member out of service and gives it back.
func drain(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	if err := s.admin(ctx, "member drain", func(a api.Admin) error {
		_, err := a.Drain(ctx, group, h.name, false)
		return err
	}); err != nil {
		return err
	}
	pause(ctx, step.Hold)
	return s.activate(ctx, h)
}

func standby(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	if err := s.admin(ctx, "member standby", func(a api.Admin) error {
		_, err := a.SetRole(ctx, group, h.name, api.RoleStandby, false)
		return err
	}); err != nil {
		return err
	}
	pause(ctx, step.Hold)
	return s.activate(ctx, h)
}

// activate makes a member active and waits until it serves.
func (s *site) activate(ctx context.Context, h *hsm) error {
	if err := s.admin(ctx, "member active", func(a api.Admin) error {
		_, err := a.SetRole(ctx, group, h.name, api.RoleActive, false)
		return err
	}); err != nil {
		return err
	}
	_, err := s.whole(ctx, h, 0)
	return err
}

func removeAdd(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	s.leaving.Lock()
	defer s.leaving.Unlock()
	stale := s.load.doomed()
	if err := s.admin(ctx, "member remove", func(a api.Admin) error {
		return a.RemoveMember(ctx, group, h.name, false)
	}, api.CodeNotFound); err != nil {
		return err
	}
	stale()
	pause(ctx, step.Hold)
	spec := api.MemberSpec{
		Name: h.name, Driver: h.conf.Driver, SHA256: h.conf.SHA256,
		PIN: api.PINSource{File: h.conf.PIN.File}, Settings: h.conf.Settings,
	}
	if err := s.admin(ctx, "member add", func(a api.Admin) error {
		_, err := a.AddMember(ctx, group, spec)
		return err
	}, api.CodeExists); err != nil {
		return err
	}
	_, err := s.whole(ctx, h, 0)
	return err
}

// reload makes a standby of a member in kmsd.yaml, and takes it back.
func reload(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	if err := s.amend(h, func(m map[string]any) { m["standby"] = true }); err != nil {
		return err
	}
	if err := s.followed(ctx, s.hasRole(ctx, h, api.RoleStandby)); err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := s.amend(h, func(m map[string]any) { delete(m, "standby") }); err != nil {
		return err
	}
	if err := s.followed(ctx, s.hasRole(ctx, h, api.RoleActive)); err != nil {
		return err
	}
	_, err := s.whole(ctx, h, 0)
	return err
}

// reloadRemove takes a member out of kmsd.yaml, and puts it back with what it held then.
func reloadRemove(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	s.leaving.Lock()
	defer s.leaving.Unlock()
	stale := s.load.doomed()
	entry, err := s.strike(h)
	if err != nil {
		return err
	}
	if err := s.followed(ctx, func() error {
		g, err := s.operator.Group(ctx, group)
		if err != nil {
			return err
		}
		if m, err := devserver.Member(g, h.name); err == nil {
			return fmt.Errorf("%s is there still, and %s", h.name, m.State)
		}
		return nil
	}); err != nil {
		return err
	}
	stale()
	pause(ctx, step.Hold)
	if err := s.enter(entry); err != nil {
		return err
	}
	if err := s.followed(ctx, s.hasRole(ctx, h, api.RoleActive)); err != nil {
		return err
	}
	_, err = s.whole(ctx, h, 0)
	return err
}

// rereading is how often an operator has kmsd read kmsd.yaml until it has done what is in
// it: it refuses what the others cannot do without just then, and anything while the catalog
// has no room, and says so in its log.
const rereading = time.Second

// followed waits until kmsd has done what kmsd.yaml says by now.
func (s *site) followed(ctx context.Context, done func() error) error {
	read := time.Now()
	return devserver.Poll(ctx, func() error {
		err := done()
		if err != nil && time.Since(read) > rereading {
			read = time.Now()
			if err := s.hup(func() {}); err != nil {
				return err
			}
		}
		return err
	})
}

// hasRole says whether a member belongs to the group in a role.
func (s *site) hasRole(ctx context.Context, h *hsm, role string) func() error {
	return func() error {
		m, err := s.now(ctx, h)
		if err == nil && m.Role != role {
			err = fmt.Errorf("%s is %s, and its role %s and not %s", h.name, m.State, m.Role, role)
		}
		return err
	}
}

// tokenReplaced puts another token in the place of a member's, as an HSM that was
// re-initialised: it may serve only when an operator has accepted it.
func tokenReplaced(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	m, err := s.whole(ctx, h, 0)
	if err != nil {
		return err
	}
	forget, err := h.token.replace(ctx)
	if err != nil {
		return err
	}
	defer forget()
	if err := h.signal(m.DriverPID, syscall.SIGKILL); err != nil {
		return err
	}
	if _, err := s.await(ctx, h, "failed", isFailed); err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := s.recoverInVain(ctx, h); err != nil {
		return err
	}
	return s.accept(ctx, h)
}

func isFailed(m api.Member) bool { return m.State == api.MemberFailed }

// recoverInVain has a member that is failed recovered, which may not help.
func (s *site) recoverInVain(ctx context.Context, h *hsm) error {
	if err := s.operator.Recover(ctx, group, h.name); err == nil {
		return fmt.Errorf("%s has recovered", h.name)
	}
	if now, err := s.await(ctx, h, "failed", isFailed); err != nil {
		return fmt.Errorf("after a recovery in vain, %s: %w", now.State, err)
	}
	return nil
}

// accept says that the token in the place of a member's is the member's from now on.
func (s *site) accept(ctx context.Context, h *hsm) error {
	if err := s.admin(ctx, "member replace", func(a api.Admin) error {
		_, err := a.ReplaceMember(ctx, group, h.name, nil)
		return err
	}); err != nil {
		return err
	}
	_, err := s.whole(ctx, h, 0)
	return err
}

// open runs a driver of the test's own on the token of a member.
func (s *site) open(ctx context.Context, h *hsm) (d pluginproto.Driver, end func(), err error) {
	return look.OpenToken(ctx, bin, s.cfg, h.name)
}
