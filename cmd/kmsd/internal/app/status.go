package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

const watchInterval = time.Second

func newStatus(s *session) *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show groups and members: states, load, keys, missing copies",
		Long: "Show groups and members: states, load, keys, missing copies.\n\n" +
			"LOAD is commands in flight; P99 is of recent commands; MISSING counts key versions that a\nmember should hold and does not. Below stands what is wrong with a member, if anything is,\nand what to do about it; and the\nrekeys that run, wait or have left something undone.\nWith --watch and -o json there is one line for every look.",
		Example: "  kmsd status --watch",
		Args:    usageArgs(cobra.NoArgs),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "look again every second until interrupted")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		if watch {
			return s.watchStatus(cmd.Context(), svc)
		}
		st, err := svc.Groups(cmd.Context())
		if err != nil {
			return err
		}
		return s.print(st, func(w io.Writer) error { return writeStatus(w, s.Out, st, time.Now()) })
	})
}

// watchStatus shows the status every second. A server that does not answer is
// shown as that: it may be what one is waiting for.
func (s *session) watchStatus(ctx context.Context, svc service) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		st, err := svc.Groups(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if failure := (*api.Error)(nil); errors.As(err, &failure) && exitOf(failure.Code) != exitUnavailable {
			return err
		}
		if err := s.printLook(st, err); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// printLook prints one look of a watch in one write, so that a terminal does not
// flicker.
func (s *session) printLook(st api.Status, failed error) error {
	if failed != nil {
		st.Error = failed.Error()
	}
	if s.output == "json" {
		return s.printJSON(st)
	}
	var b bytes.Buffer
	if terminal(s.Out) {
		b.WriteString("\x1b[H\x1b[2J") // home, clear
	}
	fmt.Fprintln(&b, when(time.Now()))
	if failed != nil {
		fmt.Fprintf(&b, "no answer: %s\n", failed)
	} else if err := writeStatus(&b, s.Out, st, time.Now()); err != nil {
		return err
	}
	_, err := s.Out.Write(b.Bytes())
	return err
}

// writeStatus writes every group to w, in colours if target is a terminal.
func writeStatus(w io.Writer, target any, st api.Status, now time.Time) error {
	for i, g := range st.Groups {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := writeGroup(w, target, g, now); err != nil {
			return err
		}
	}
	for i, job := range st.Jobs {
		if i == 0 {
			fmt.Fprintln(w)
		}
		if _, err := fmt.Fprintf(w, "rekey of %s: %s\n", job.Database, clean(jobState(job))); err != nil {
			return err
		}
	}
	return nil
}

// jobState says of a job how far it is, or what it has left to do.
func jobState(job api.Job) string {
	show := "; kmsd database show " + job.Database
	switch {
	case job.State == api.JobFailed:
		return "has failed: " + job.Reason + show
	case job.State == api.JobDone:
		return counted(job.Failed, "data key version") + " could not be wrapped anew" + show
	}
	text := progressText(job.Progress)
	if job.Failed > 0 {
		text += ", " + thousands(job.Failed) + " failed" + show
	}
	if job.State == api.JobWaiting {
		text += ", waiting: " + job.Reason
	}
	return text
}

func writeGroup(w io.Writer, target any, g api.Group, now time.Time) error {
	primary := g.Primary
	if primary == "" {
		primary = "none"
	}
	least := "1 copy"
	if g.MinCopies != 1 {
		least = fmt.Sprintf("%d copies", g.MinCopies)
	}
	fmt.Fprintf(w, "group %s: %s, primary %s, %s, at least %s\n", g.Name, g.State, primary, counted(g.Keys, "key version"), least)
	// What every member has fits into 80 columns; what is wrong with some, and may be
	// long, is told below.
	t := newTable(target, "member", "state", "role", "since", "load", "commands", "errors", "p99", "keys", "missing")
	for _, m := range g.Members {
		t.row(m.Name, memberState(m.State), m.Role, ago(now, m.Since), m.InFlight, m.Commands, m.Errors,
			microseconds(m.LatencyP99), m.Keys, alarming(m.Missing))
	}
	if err := t.writeTo(w); err != nil {
		return err
	}
	for _, m := range g.Members {
		for _, text := range troubles(m, now) {
			if _, err := fmt.Fprintf(w, "%s: %s\n", m.Name, clean(text)); err != nil {
				return err
			}
		}
	}
	for _, text := range scarcity(g) {
		if _, err := fmt.Fprintf(w, "keys: %s\n", text); err != nil {
			return err
		}
	}
	return nil
}

// scarcity are the lines about keys that one more loss may end, and those that are lost
// already unless somebody comes back.
func scarcity(g api.Group) []string {
	var lines []string
	if g.WithoutCopy > 0 {
		lines = append(lines, fmt.Sprintf("no member is known to hold %s; kmsd group check names them", counted(g.WithoutCopy, "key version")))
	}
	if few := g.BelowMinCopies - g.WithoutCopy; few > 0 {
		lines = append(lines, fmt.Sprintf("fewer members than min_copies hold %s; bring the others back", counted(few, "key version")))
	}
	return lines
}

func memberState(state api.MemberState) cell {
	switch state {
	case api.MemberActive, api.MemberStandby:
		return cell{string(state), green}
	case api.MemberDown, api.MemberFailed:
		return cell{string(state), red}
	default:
		return cell{string(state), yellow}
	}
}

// troubles are the lines about a member that is not as it should be: what is wrong,
// how far it is being mended, and what is for the operator to do.
func troubles(m api.Member, now time.Time) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if text := trouble(m, now); text != "" {
		add("%s", text)
	}
	if m.Sync != nil {
		add("syncing %s", progressText(*m.Sync))
	}
	told := strings.Contains(m.Reason, "kmsd member ") // the reason says itself what to do
	if m.GaveUp && !told {
		add("recovery has given up, attempts: %d", m.RecoveryAttempts)
	}
	switch {
	case told:
	case m.State == api.MemberDraining:
		add("takes nothing new; to end that: kmsd member %s %s", m.Role, m.Name)
	case m.State == api.MemberFailed:
		add("when it is mended: kmsd member recover %s", m.Name)
		add("if it has another token now: kmsd member replace %s", m.Name)
	case m.GaveUp:
		add("when it is mended: kmsd member recover %s", m.Name)
	case m.State == api.MemberDown && m.NextRecovery == nil: // recovery is manual
		add("no attempt is planned; to make one: kmsd member recover %s", m.Name)
	}
	if m.Quarantined > 0 {
		add("copies with another value, in quarantine: %d; kmsd group sync names them", m.Quarantined)
	}
	for _, f := range m.Token.Facts {
		if f.Warning {
			add("warning: %s: %s", f.Name, f.Value)
		}
	}
	if m.Foreign > 0 {
		add("objects that nobody here knows: %d; kmsd group sync lists them", m.Foreign)
	}
	return lines
}

// trouble is what is wrong with a member, and when it is tried again; "" when all is
// well. A reason that names a CKR has the library's own, and the state's says nothing then.
func trouble(m api.Member, now time.Time) string {
	var parts []string
	if m.CKR != "" && m.CKR != "CKR_OK" && !strings.Contains(m.Reason, "CKR_") {
		parts = append(parts, m.CKR)
	}
	if m.Reason != "" {
		parts = append(parts, m.Reason)
	}
	text := strings.Join(parts, ": ")
	if m.NextRecovery != nil {
		in := max(m.NextRecovery.Sub(now), 0).Round(time.Second)
		text = strings.TrimPrefix(fmt.Sprintf("%s; attempt %d in %s", text, m.RecoveryAttempts+1, in), "; ")
	}
	return text
}

// ago prints how long something lasts, in one or two units.
func ago(now, since time.Time) string {
	if since.IsZero() {
		return ""
	}
	d := max(now.Sub(since), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}

func microseconds(us int64) string {
	if us == 0 {
		return ""
	}
	d := time.Duration(us) * time.Microsecond
	switch { // three digits are enough
	case d >= time.Second:
		d = d.Round(10 * time.Millisecond)
	case d >= 100*time.Millisecond:
		d = d.Round(time.Millisecond)
	case d >= time.Millisecond:
		d = d.Round(10 * time.Microsecond)
	}
	return d.String()
}
