package app

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// onGroup completes a command that takes the name of a group, or none when there is
// only one.
func (s *session) onGroup(cmd *cobra.Command, run func(ctx context.Context, svc service, group string) error) *cobra.Command {
	var flag string
	cmd.Flags().StringVar(&flag, "group", "", "the same as GROUP")
	cmd.ValidArgsFunction = s.completeGroups
	completeFlag(cmd, "group", s.completeGroupFlag)
	cmd.Args = usageArgs(cobra.MaximumNArgs(1))
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		name := flag
		if len(args) == 1 {
			if flag != "" && flag != args[0] {
				return &usageError{msg: fmt.Sprintf("group %s or group %s?", args[0], flag)}
			}
			name = args[0]
		}
		group, err := theGroup(cmd.Context(), svc, name)
		if err != nil {
			return err
		}
		return run(cmd.Context(), svc, group)
	})
}

// theGroup is the group that was named, or the only one.
func theGroup(ctx context.Context, svc service, name string) (string, error) {
	if name != "" {
		return name, nil
	}
	st, err := svc.Groups(ctx)
	if err != nil {
		return "", err
	}
	if len(st.Groups) == 1 {
		return st.Groups[0].Name, nil
	}
	var names []string
	for _, g := range st.Groups {
		names = append(names, g.Name)
	}
	return "", &usageError{msg: "there are several groups, say which: " + strings.Join(names, ", ")}
}

func newGroupSync(s *session) *cobra.Command {
	var opts api.SyncOptions
	cmd := &cobra.Command{
		Use:   "sync [GROUP]",
		Short: "Compare every member with the catalog and mend what differs",
		Long: "Compare every member in step with the catalog, past all caches, and mend what differs: keys that\n" +
			"are missing are cloned, keys that were destroyed are destroyed there too. A copy with another\n" +
			"value is quarantined, never overwritten. Objects that nobody here knows are listed and left\n" +
			"alone; with --adopt they become master keys where that is possible, named by their labels.\n\n" +
			"It takes as long as the keys need. Interrupted, it can be started again. The exit code is 1 when\n" +
			"a member could not be compared.",
		Example: "  kmsd group sync",
	}
	cmd.Flags().BoolVar(&opts.Adopt, "adopt", false, "make master keys of unknown objects; this is audited")
	return s.onGroup(cmd, func(ctx context.Context, svc service, group string) error {
		var report api.SyncReport
		err := s.watching(ctx, svc, group, "", func(ctx context.Context) (err error) {
			report, err = svc.Sync(ctx, group, opts)
			return err
		})
		if err != nil {
			return err
		}
		if err := s.print(report, func(w io.Writer) error { return writeSync(w, report, opts.Adopt) }); err != nil {
			return err
		}
		failed := 0
		for _, m := range report.Members {
			if m.Error != "" {
				failed++
			}
		}
		if failed > 0 {
			return fmt.Errorf("%d of %d members of group %s could not be brought in step; mend what is said of them above, then run it again",
				failed, len(report.Members), group)
		}
		return nil
	})
}

func writeSync(w io.Writer, r api.SyncReport, adopted bool) error {
	t := newTable(w, "member", "held", "cloned", "changed", "destroyed", "missing", "quarantined", "foreign")
	for _, m := range r.Members {
		t.row(m.Member, m.Held, m.Cloned, m.Changed, m.Destroyed, alarming(m.Missing), alarming(len(m.Quarantined)), len(m.Foreign))
	}
	if err := t.writeTo(w); err != nil {
		return err
	}
	for _, name := range r.Adopted {
		fmt.Fprintf(w, "adopted: %s is a master key now\n", clean(name))
	}
	for _, m := range r.Members {
		if m.Error != "" {
			fmt.Fprintf(w, "%s: %s\n", m.Member, clean(m.Error))
		}
		if m.Missing > 0 {
			fmt.Fprintf(w, "%s: key versions that no connected member could supply: %d; bring the other members back\n", m.Member, m.Missing)
		}
		for _, q := range m.Quarantined {
			fmt.Fprintf(w, "%s: %s has another value here; it is not used and not overwritten: look at the token, then destroy that copy there\n", m.Member, clean(q))
		}
	}
	return writeForeign(w, r, adopted)
}

// writeForeign lists what nobody here knows, and what can be done about it. What has
// been adopted is foreign no more.
func writeForeign(w io.Writer, r api.SyncReport, adopted bool) error {
	t := newTable(w, "member", "identity", "label", "type", "check value", "not adopted because")
	found := false
	for _, m := range r.Members {
		for _, o := range m.Foreign {
			if adopted && o.Refused == "" {
				continue
			}
			found = true
			t.row(m.Member, o.Identity, o.Label, o.Type, o.CheckValue, o.Refused)
		}
	}
	if !found {
		return nil
	}
	head := "objects that nobody here knows; they were left alone. kmsd group sync --adopt makes master keys of\n" +
		"them where that is possible; what another program put there is that program's:"
	if adopted {
		head = "objects that could not be adopted; they were left alone:"
	}
	fmt.Fprintf(w, "\n%s\n", head)
	return t.writeTo(w)
}

// alarming is a number that should be 0.
func alarming(n int) cell {
	c := cell{text: fmt.Sprint(n)}
	if n > 0 {
		c.ink = yellow
	}
	return c
}

func newGroupReinitialize(s *session) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "reinitialize [GROUP]",
		Short: "Try now to bring back every member that is away",
		Long: "Try now to bring back every member that is away, also those that recovery has given up or that\n" +
			"have failed. Keys and clients made before stay valid. The exit code is 3 when the group is lost\n" +
			"after that.",
		Example: "  kmsd group reinitialize",
	}
	defineTimeout(cmd, &timeout)
	return s.onGroup(cmd, func(ctx context.Context, svc service, group string) error {
		ctx, cancel, err := within(ctx, timeout)
		if err != nil {
			return err
		}
		defer cancel()
		var g api.Group
		err = s.watching(ctx, svc, group, "", func(ctx context.Context) (err error) {
			g, err = svc.Reinitialize(ctx, group)
			return err
		})
		if err != nil {
			return err
		}
		if err := s.print(g, func(w io.Writer) error { return writeGroup(w, s.Out, g, time.Now()) }); err != nil {
			return err
		}
		if g.State == api.GroupLost {
			e := api.NewError(api.CodeGroupLost, fmt.Sprintf("group %s is lost: none of its members has come back", group), nil)
			e.Hint = "mend what is said of the members above; recovery goes on by itself"
			return e
		}
		return nil
	})
}

func newGroupCheck(s *session) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "check [GROUP]",
		Short: "Ask every member whether it still fits the group; changes nothing",
		Long: "Ask every member whether it still fits the group: token, firmware, mechanisms, domain, and a\n" +
			"canary key that is cloned to it and destroyed again. Nothing is changed. The exit code is 1 when\n" +
			"there is a fault; warnings may stand.",
		Example: "  kmsd group check",
	}
	defineTimeout(cmd, &timeout)
	return s.onGroup(cmd, func(ctx context.Context, svc service, group string) error {
		ctx, cancel, err := within(ctx, timeout)
		if err != nil {
			return err
		}
		defer cancel()
		var c api.GroupCheck
		err = s.watching(ctx, svc, group, "", func(ctx context.Context) (err error) {
			c, err = svc.Check(ctx, group)
			return err
		})
		if err != nil {
			return err
		}
		if err := s.print(c, func(w io.Writer) error { return writeGroupCheck(w, c) }); err != nil {
			return err
		}
		if !c.OK {
			return fmt.Errorf("group %s has faults, see above", group)
		}
		return nil
	})
}

func writeGroupCheck(w io.Writer, c api.GroupCheck) error {
	if len(c.Findings) == 0 {
		_, err := fmt.Fprintf(w, "group %s: every member fits\n", c.Group)
		return err
	}
	t := newTable(w, "member", "finding", "what")
	for _, f := range c.Findings {
		finding := cell{"warning", yellow}
		if f.Fault {
			finding = cell{"fault", red}
		}
		t.row(f.Member, finding, f.Message)
	}
	return t.writeTo(w)
}
