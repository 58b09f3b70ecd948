package app

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newGroupLog(s *session) *cobra.Command {
	var follow bool
	var last int
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Show what has happened to groups and members and, with --follow, what happens from now on",
		Long: "Show what has happened to groups and members, as far as the server remembers, the newest last.\n" +
			"Each line has the time, the kind, group/member, from → to, the CKR and the cause; ALARM marks\n" +
			"what does not mend by itself. With --follow, what happens to keys and how far a\n" +
			"synchronization or a rekey is are shown too.",
		Example: "  kmsd group log --last 20\n  kmsd group log --follow -o json",
		Args:    usageArgs(cobra.NoArgs),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	cmd.Flags().IntVarP(&last, "last", "n", 0, "only so many of the newest (default: all that are remembered)")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		if last < 0 || last > api.MaxLog {
			return &usageError{msg: fmt.Sprintf("--last is 1 to %d, or 0 for all", api.MaxLog)}
		}
		if follow {
			// A stream that is refused only ends; this says why.
			if _, err := svc.Log(cmd.Context(), 1); err != nil {
				return err
			}
			return s.follow(cmd.Context(), svc, cmp.Or(last, api.MaxLog))
		}
		events, err := svc.Log(cmd.Context(), last)
		if err != nil {
			return err
		}
		for _, ev := range events {
			if err := s.printEvent(ev); err != nil {
				return err
			}
		}
		return nil
	})
}

// follow prints the last events and those to come until ctx ends. A stream that ends
// by itself has been refused: the client opens one that breaks again.
func (s *session) follow(ctx context.Context, svc service, last int) error {
	for ev := range svc.EventsAfter(ctx, last) {
		if err := s.printEvent(ev); err != nil {
			return err
		}
	}
	if ctx.Err() == nil {
		return api.NewError(api.CodeUnavailable, "the server has ended the stream of events", nil)
	}
	return nil
}

// printEvent writes one line, however long.
func (s *session) printEvent(ev api.Event) error {
	return s.print(ev, func(w io.Writer) error {
		line := clean(strings.Join(eventWords(ev), "  "))
		if ev.Alarm && colours(s.Out) {
			line = paint(line, red)
		}
		_, err := fmt.Fprintln(w, line)
		return err
	})
}

func eventWords(ev api.Event) []string {
	words := []string{when(ev.Time)}
	if ev.Alarm {
		words = append(words, "ALARM")
	}
	words = append(words, ev.Type)
	what := ev.To
	if ev.From != "" {
		what = ev.From + " → " + cmp.Or(ev.To, "gone")
	}
	for _, word := range []string{strings.Trim(ev.Group+"/"+cmp.Or(ev.Member, ev.Database, ev.Key), "/"), what} {
		if word != "" {
			words = append(words, word)
		}
	}
	if ev.CKR != "" && ev.CKR != "CKR_OK" {
		words = append(words, ev.CKR)
	}
	if ev.Progress != nil {
		words = append(words, progressText(*ev.Progress))
	}
	if ev.Cause != "" && !repeats(ev) {
		words = append(words, "("+ev.Cause+")")
	}
	return words
}

// repeats says whether the cause of an event is its progress in words.
func repeats(ev api.Event) bool {
	p := ev.Progress
	return p != nil && strings.HasPrefix(ev.Cause, fmt.Sprintf("%d of %d", p.Done, p.Total))
}
