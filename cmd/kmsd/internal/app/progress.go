package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"kmsd/kms/api"
)

// lookInterval is how often a progress bar is drawn.
const lookInterval = 500 * time.Millisecond

// watching calls do and meanwhile shows how far the members of a group have come, if
// a person is at the other end of stderr. With a name it shows that member alone.
func (s *session) watching(ctx context.Context, svc service, group, member string, do func(ctx context.Context) error) error {
	if !terminal(s.Err) {
		return withHint(do(ctx))
	}
	looking, stop := context.WithCancel(ctx)
	var drawing sync.WaitGroup
	drawing.Go(func() { s.draw(looking, svc, group, member) })
	err := do(ctx)
	stop()
	drawing.Wait()
	return withHint(err)
}

// withHint says of work on members that did not end well what can be done, when the
// server does not.
func withHint(err error) error {
	var failed *api.Error
	if !errors.As(err, &failed) || failed.Hint != "" {
		return err
	}
	e := *failed
	switch e.Code {
	case api.CodeDeadline:
		e.Hint = "what was begun may go on; kmsd status shows how far it is"
	case api.CodeMemberFailed:
		e.Hint = "when that is mended, try again"
	}
	return &e
}

// draw draws one line, over and over, until ctx ends, and takes it away then.
func (s *session) draw(ctx context.Context, svc service, group, member string) {
	const home, clearLine = "\r", "\x1b[K"
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	defer fmt.Fprint(s.Err, home+clearLine)
	for {
		// A server that does not answer has its say at the end of the command.
		if g, err := svc.Group(ctx, group); err == nil {
			fmt.Fprint(s.Err, home+clip(clean(progressLine(g, member)), s.width())+clearLine)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// width is how many characters fit on a line of stderr.
func (s *session) width() int {
	const common = 80
	if f, ok := s.Err.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w - 1 // the last one would begin a new line
		}
	}
	return common - 1
}

// clip shortens text to a number of characters.
func clip(text string, most int) string {
	if r := []rune(text); len(r) > most {
		return string(r[:most])
	}
	return text
}

// progressLine says what goes on with a member, or with the first of the group that
// is being brought in step.
func progressLine(g api.Group, member string) string {
	for _, m := range g.Members {
		switch {
		case member != "" && m.Name != member:
		case m.Sync != nil:
			return m.Name + "  " + bar(*m.Sync) + "  " + progressText(*m.Sync)
		case member == "":
		case m.State == api.MemberDraining:
			return fmt.Sprintf("%s  %s, %d commands in flight", m.Name, m.State, m.InFlight)
		default:
			return m.Name + "  " + string(m.State)
		}
	}
	return "working..."
}

func bar(p api.Progress) string {
	const width = 24
	full := 0
	if p.Total > 0 {
		full = min(max(width*p.Done/p.Total, 0), width)
	}
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", width-full) + "]"
}

// progressText is like "3,120 of 10,000, 850/s, 8 s left".
func progressText(p api.Progress) string {
	text := thousands(p.Done) + " of " + thousands(p.Total)
	if p.Rate > 0 {
		digits := 0
		if p.Rate < 10 {
			digits = 1
		}
		text += ", " + strconv.FormatFloat(p.Rate, 'f', digits, 64) + "/s"
	}
	if left := time.Duration(p.Left).Round(time.Second); left >= time.Minute {
		text += ", " + left.String() + " left"
	} else if left > 0 {
		text += fmt.Sprintf(", %d s left", int(left.Seconds()))
	}
	return text
}

// thousands prints a number with commas.
func thousands(n int) string {
	text := strconv.Itoa(n)
	digits := strings.TrimPrefix(text, "-")
	sign := text[:len(text)-len(digits)]
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}
