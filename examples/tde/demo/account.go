package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"kmsd/kms/api"
)

// account prints what happens, as it happens, and in the end what survived.
type account struct {
	w     io.Writer
	begin time.Time
	rows  [][2]string // of the summary
}

func newAccount(w io.Writer) *account {
	a := &account{w: w, begin: time.Now()}
	fmt.Fprintf(w, "kmsd demo: databases on three HSMs, two failures, a re-key and a restart\n\n")
	return a
}

// note prints one line of the story.
func (a *account) note(format string, args ...any) {
	fmt.Fprintf(a.w, "  %5.1f s  %s\n", time.Since(a.begin).Seconds(), fmt.Sprintf(format, args...))
}

// fact adds a line to the summary.
func (a *account) fact(name, format string, args ...any) {
	a.rows = append(a.rows, [2]string{name, fmt.Sprintf(format, args...)})
}

// timing describes the slowest operation of a kind.
func (a *account) timing(t timing) string {
	if t.op == "" {
		return "none"
	}
	return fmt.Sprintf("%s (%s, at %.1f s)", milliseconds(t.took), t.op, t.at.Sub(a.begin).Seconds())
}

// summary prints the facts and the copies of each key.
func (a *account) summary(members []string, keys []api.Verification) {
	fmt.Fprintf(a.w, "\nWhat survived\n\n")
	t := tabwriter.NewWriter(a.w, 0, 0, 2, ' ', 0)
	for _, r := range a.rows {
		fmt.Fprintf(t, "  %s\t%s\n", r[0], r[1])
	}
	t.Flush()

	fmt.Fprintf(a.w, "\nCopies of each key, as the HSMs say now\n\n")
	fmt.Fprintf(t, "  key\tversion\t%s\n", strings.Join(members, "\t"))
	for _, v := range keys {
		for _, line := range copiesByVersion(v, members) {
			fmt.Fprintf(t, "  %s\t%s\n", v.Name, strings.Join(line, "\t"))
		}
	}
	t.Flush()
}

// copiesByVersion returns a line for each version: its number, then the state on
// each member.
func copiesByVersion(v api.Verification, members []string) [][]string {
	var lines [][]string
	at := map[int][]string{} // :: version → its line
	for _, c := range v.Copies {
		line := at[c.Version]
		if line == nil {
			line = make([]string, 1+len(members))
			line[0] = strconv.Itoa(c.Version)
			at[c.Version] = line
			lines = append(lines, line)
		}
		for i, m := range members {
			if m == c.Member {
				line[1+i] = c.State
			}
		}
	}
	return lines
}

// milliseconds rounds to what matters here.
func milliseconds(d time.Duration) string {
	return strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', 1, 64) + " ms"
}

// thousands writes 1234567 as 1,234,567.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
