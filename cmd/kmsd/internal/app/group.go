package app

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newGroup(s *session) *cobra.Command {
	return family("group", "Look at groups of HSMs, and bring all their members in step",
		newGroupList(s), newGroupShow(s), newGroupLog(s), newGroupSync(s), newGroupReinitialize(s), newGroupCheck(s), newGroupImport(s))
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
	cmd := &cobra.Command{Use: "show NAME", Short: "Show a group, its members and their tokens", Args: oneArg("group NAME"), ValidArgsFunction: s.completeGroups}
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
			if err := t.writeTo(w); err != nil {
				return err
			}
			return writeFacts(w, g.Members)
		})
	})
}

// writeFacts writes what else members say of their tokens, when any says something.
func writeFacts(w io.Writer, members []api.Member) error {
	t := newTable(w, "member", "fact", "value")
	head := len(t.rows)
	for _, m := range members {
		for _, f := range m.Token.Facts {
			value := cell{text: f.Value}
			if f.Warning {
				value = cell{"warning: " + f.Value, yellow}
			}
			t.row(m.Name, f.Name, value)
		}
	}
	if len(t.rows) == head {
		return nil
	}
	fmt.Fprintln(w)
	return t.writeTo(w)
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
