package app

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newMember(s *session) *cobra.Command {
	return family("member", "Change the members of a group while it serves",
		newMemberAdd(s), newMemberReplace(s), newMemberRemove(s), newMemberRole(s, api.RoleStandby), newMemberRole(s, api.RoleActive),
		newMemberDrain(s), newMemberRecover(s))
}

// memberFlags are those that commands on members share.
type memberFlags struct {
	group   string
	timeout time.Duration
	force   bool
}

// define adds the flags. without says what --force is in spite of; "" leaves it out.
func (f *memberFlags) define(cmd *cobra.Command, without string) {
	cmd.Flags().StringVar(&f.group, "group", "", "group of the member (default: the one that has it)")
	defineTimeout(cmd, &f.timeout)
	if without != "" {
		cmd.Flags().BoolVar(&f.force, "force", false, "also when "+without+"; this is audited")
	}
}

func defineTimeout(cmd *cobra.Command, timeout *time.Duration) {
	const enough = 10 * time.Minute // for some ten thousand keys
	cmd.Flags().DurationVar(timeout, "timeout", enough, "how long to wait for the end")
}

// within gives a command its time.
func within(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc, error) {
	if timeout <= 0 {
		return nil, nil, &usageError{msg: "--timeout is not positive"}
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	return ctx, cancel, nil
}

// onMember completes a command on a member that is there: run gets its time and its
// group, and a person sees how far it is.
func (s *session) onMember(cmd *cobra.Command, f *memberFlags, run func(ctx context.Context, svc service, group, name string) error) *cobra.Command {
	cmd.Args = oneArg("member NAME")
	cmd.ValidArgsFunction = s.completeMembers
	completeFlag(cmd, "group", s.completeGroupFlag)
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		ctx, cancel, err := within(cmd.Context(), f.timeout)
		if err != nil {
			return err
		}
		defer cancel()
		group, name := f.group, args[0]
		if group == "" {
			if group, err = groupOf(ctx, svc, name); err != nil {
				return err
			}
		}
		return run(ctx, svc, group, name)
	})
}

func newMemberRemove(s *session) *cobra.Command {
	var f memberFlags
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Let a member finish what it has, and forget it",
		Long: "Let a member finish what it has, and forget it. Its token keeps its keys. The last active\n" +
			"member, and one that holds the only copy of a key, is refused unless --force is given.",
		Example: "  kmsd member remove hsm-c",
	}
	f.define(cmd, "nobody else serves, or a key loses its last copy")
	return s.onMember(cmd, &f, func(ctx context.Context, svc service, group, name string) error {
		err := s.watching(ctx, svc, group, name, func(ctx context.Context) error { return svc.RemoveMember(ctx, group, name, f.force) })
		if err != nil {
			return err
		}
		g, err := svc.Group(ctx, group)
		if err != nil {
			return err
		}
		return s.print(g, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s: removed; its token keeps its keys\ngroup %s: %s, %d of %d members serve\n", name, group, g.State, serving(g), len(g.Members))
			return err
		})
	})
}

// newMemberRole is member standby or member active.
func newMemberRole(s *session, role string) *cobra.Command {
	var f memberFlags
	cmd := &cobra.Command{
		Use:     "active NAME",
		Short:   "Make a member active, and end a drain",
		Long:    "Make a member active. A member that was drained is brought in step and serves again.",
		Example: "  kmsd member active hsm-c",
	}
	without := ""
	if role == api.RoleStandby {
		cmd.Use, cmd.Short = "standby NAME", "Keep a member in step, and use it only when no active one is left"
		cmd.Long = cmd.Short + ".\nThe last active member is refused unless --force is given."
		cmd.Example = "  kmsd member standby hsm-c"
		without = "no other member is active"
	}
	f.define(cmd, without)
	return s.onMember(cmd, &f, func(ctx context.Context, svc service, group, name string) error {
		var m api.Member
		err := s.watching(ctx, svc, group, name, func(ctx context.Context) (err error) {
			m, err = svc.SetRole(ctx, group, name, role, f.force)
			return err
		})
		if err != nil {
			return err
		}
		return s.printMember(m, "")
	})
}

func newMemberDrain(s *session) *cobra.Command {
	var f memberFlags
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Let a member finish what it has, and give it nothing new",
		Long: "Let a member finish what it has, and give it nothing new, for work on the HSM. It is a member\n" +
			"still; kmsd member active, standby or recover ends the drain.",
		Example: "  kmsd member drain hsm-c",
	}
	f.define(cmd, "nobody else serves")
	return s.onMember(cmd, &f, func(ctx context.Context, svc service, group, name string) error {
		var m api.Member
		err := s.watching(ctx, svc, group, name, func(ctx context.Context) (err error) {
			m, err = svc.Drain(ctx, group, name, f.force)
			return err
		})
		if err != nil {
			return err
		}
		return s.printMember(m, fmt.Sprintf("; to end it: kmsd member %s %s", m.Role, m.Name))
	})
}

func newMemberRecover(s *session) *cobra.Command {
	var f memberFlags
	cmd := &cobra.Command{
		Use:   "recover NAME",
		Short: "Try now to bring a lost member back",
		Long: "Try now to bring a lost member back, without waiting for the next attempt, and say how that\n" +
			"ended. When an attempt is under way, its end is waited for.",
		Example: "  kmsd member recover hsm-c",
	}
	f.define(cmd, "")
	return s.onMember(cmd, &f, func(ctx context.Context, svc service, group, name string) error {
		before, err := memberOf(ctx, svc, group, name)
		if err != nil {
			return err
		}
		err = s.watching(ctx, svc, group, name, func(ctx context.Context) error { return svc.Recover(ctx, group, name) })
		if err != nil {
			return err
		}
		after, err := memberOf(ctx, svc, group, name)
		switch {
		case err != nil:
			return err
		case isInStep(before) && isInStep(after):
			return s.printMember(after, ", it needs no recovery")
		default:
			return s.printMember(after, fmt.Sprintf(" (was %s)", before.State))
		}
	})
}

func isInStep(m api.Member) bool { return m.State == api.MemberActive || m.State == api.MemberStandby }

// printMember says how a member is after something was done to it.
func (s *session) printMember(m api.Member, more string) error {
	return s.print(m, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, clean(fmt.Sprintf("%s: %s, %s, %d missing%s", m.Name, m.State, counted(m.Keys, "key version"), m.Missing, more)))
		return err
	})
}

func memberOf(ctx context.Context, svc service, group, name string) (api.Member, error) {
	g, err := svc.Group(ctx, group)
	if err != nil {
		return api.Member{}, err
	}
	for _, m := range g.Members {
		if m.Name == name {
			return m, nil
		}
	}
	return api.Member{}, api.NewError(api.CodeNotFound, fmt.Sprintf("group %s has no member %q", group, name), nil)
}

// groupOf finds the one group that has a member of that name.
func groupOf(ctx context.Context, svc service, member string) (string, error) {
	st, err := svc.Groups(ctx)
	if err != nil {
		return "", err
	}
	var found []string
	for _, g := range st.Groups {
		if slices.ContainsFunc(g.Members, func(m api.Member) bool { return m.Name == member }) {
			found = append(found, g.Name)
		}
	}
	switch len(found) {
	case 0:
		e := api.NewError(api.CodeNotFound, fmt.Sprintf("no group has a member %q", member), nil)
		e.Hint = "kmsd status shows the members"
		return "", e
	case 1:
		return found[0], nil
	default:
		return "", &usageError{msg: fmt.Sprintf("member %s is in several groups, say which with --group: %s", member, strings.Join(found, ", "))}
	}
}
