package app

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newGroup(s *session) *cobra.Command {
	return family("group", "Look at groups of HSMs", newGroupList(s), newGroupShow(s), newGroupLog(s))
}

func newGroupList(s *session) *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List groups", Args: usageArgs(cobra.NoArgs)}
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		st, err := svc.Groups(cmd.Context())
		if err != nil {
			return err
		}
		return s.print(st, func(w io.Writer) error {
			t := newTable(w, "group", "state", "primary", "serving", "members", "keys", "min copies")
			for _, g := range st.Groups {
				t.row(g.Name, groupState(g.State), g.Primary, serving(g), len(g.Members), g.Keys, g.MinCopies)
			}
			return t.writeTo(w)
		})
	})
}

func newGroupShow(s *session) *cobra.Command {
	cmd := &cobra.Command{Use: "show NAME", Short: "Show a group, its members and their tokens", Args: oneArg("group NAME")}
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		g, err := svc.Group(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return s.print(g, func(w io.Writer) error {
			if err := writeGroup(w, s.Out, g, time.Now()); err != nil {
				return err
			}
			fmt.Fprintln(w)
			t := newTable(w, "member", "driver", "pid", "token", "serial", "manufacturer", "model", "firmware")
			for _, m := range g.Members {
				pid := ""
				if m.DriverPID != 0 {
					pid = fmt.Sprint(m.DriverPID)
				}
				t.row(m.Name, m.Driver, pid, m.Token.Label, m.Token.Serial, m.Token.Manufacturer, m.Token.Model, m.Token.Firmware)
			}
			return t.writeTo(w)
		})
	})
}

func newGroupLog(s *session) *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Show the last change of every member and, with --follow, what happens from now on",
		Args:  usageArgs(cobra.NoArgs),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		st, err := svc.Groups(cmd.Context())
		if err != nil {
			return err
		}
		for _, ev := range lastChanges(st) {
			if err := s.printEvent(ev); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		return s.follow(cmd.Context(), svc)
	})
}

// follow prints events until ctx ends. A stream that ends by itself has been
// refused: the client opens one that breaks again.
func (s *session) follow(ctx context.Context, svc service) error {
	for ev := range svc.Events(ctx) {
		if err := s.printEvent(ev); err != nil {
			return err
		}
	}
	if ctx.Err() == nil {
		return api.NewError(api.CodeUnavailable, "the server has ended the stream of events", nil)
	}
	return nil
}

// lastChanges says of every member, as an event, how it got where it is.
func lastChanges(st api.Status) []api.Event {
	var events []api.Event
	for _, g := range st.Groups {
		for _, m := range g.Members {
			events = append(events, api.Event{Time: m.Since, Type: "member", Group: g.Name, Member: m.Name, To: string(m.State), CKR: m.CKR, Cause: m.Reason})
		}
	}
	slices.SortStableFunc(events, func(a, b api.Event) int { return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Member, b.Member)) })
	return events
}

func (s *session) printEvent(ev api.Event) error {
	return s.print(ev, func(w io.Writer) error {
		what := ev.To
		if ev.From != "" {
			what = ev.From + " → " + ev.To
		}
		words := []string{when(ev.Time), ev.Type, strings.Trim(ev.Group+"/"+cmp.Or(ev.Member, ev.Key), "/"), what}
		if ev.CKR != "" && ev.CKR != "CKR_OK" {
			words = append(words, ev.CKR)
		}
		if ev.Cause != "" {
			words = append(words, "("+ev.Cause+")")
		}
		_, err := fmt.Fprintln(w, clean(strings.Join(words, "  ")))
		return err
	})
}

func groupState(state api.GroupState) cell {
	switch state {
	case api.GroupNormal:
		return cell{string(state), green}
	case api.GroupLost:
		return cell{string(state), red}
	default:
		return cell{string(state), yellow}
	}
}

// serving counts the members that are in step.
func serving(g api.Group) int {
	n := 0
	for _, m := range g.Members {
		if m.State == api.MemberActive || m.State == api.MemberStandby {
			n++
		}
	}
	return n
}

func newMember(s *session) *cobra.Command {
	return family("member", "Act on one HSM", newMemberRecover(s))
}

func newMemberRecover(s *session) *cobra.Command {
	var group string
	cmd := &cobra.Command{
		Use:   "recover NAME",
		Short: "Try now to bring a lost member back",
		Long:  "Try now to bring a lost member back, without waiting for the next attempt. It returns when the\nattempt is under way; kmsd status tells how it went.",
		Args:  oneArg("member NAME"),
	}
	cmd.Flags().StringVar(&group, "group", "", "group of the member (default: the one that has it)")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		ctx, name := cmd.Context(), args[0]
		if group == "" {
			var err error
			if group, err = groupOf(ctx, svc, name); err != nil {
				return err
			}
		}
		if err := svc.Recover(ctx, group, name); err != nil {
			return err
		}
		return s.print(map[string]string{"group": group, "member": name}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s: recovery is under way; see kmsd status\n", name)
			return err
		})
	})
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
		return "", api.NewError(api.CodeNotFound, fmt.Sprintf("no group has a member %q", member), nil)
	case 1:
		return found[0], nil
	default:
		return "", &usageError{msg: fmt.Sprintf("member %s is in several groups, say which with --group: %s", member, strings.Join(found, ", "))}
	}
}
