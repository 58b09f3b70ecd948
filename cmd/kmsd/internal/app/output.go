package app

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

func (s *session) checkOutput() error {
	if s.output != "table" && s.output != "json" {
		return &usageError{msg: fmt.Sprintf("-o %s is neither table nor json", s.output)}
	}
	return nil
}

// print writes v as JSON, or what table makes of it.
func (s *session) print(v any, table func(w io.Writer) error) error {
	if s.output == "json" {
		return s.printJSON(v)
	}
	return table(s.Out)
}

func (s *session) printJSON(v any) error {
	enc := json.NewEncoder(s.Out)
	enc.SetEscapeHTML(false)
	if terminal(s.Out) {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}

// terminal tells whether a person is at the other end of a stream.
func terminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colour is an ANSI attribute.
type colour string

const (
	plain  colour = ""
	bold   colour = "1"
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
	grey   colour = "90"
)

// cell is a word of a table.
type cell struct {
	text string
	ink  colour
}

// table is text in columns. Colour is left out unless a terminal wants it.
type table struct {
	colours bool
	rows    [][]cell
}

// newTable begins a table with the names of its columns. Whether it has colours
// depends on target, where it ends up.
func newTable(target any, head ...string) *table {
	t := &table{colours: colours(target)}
	row := make([]cell, len(head))
	for i, h := range head {
		row[i] = cell{strings.ToUpper(h), bold}
	}
	t.rows = append(t.rows, row)
	return t
}

// colours says whether target wants them.
func colours(target any) bool {
	return terminal(target) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func paint(text string, ink colour) string { return "\x1b[" + string(ink) + "m" + text + "\x1b[0m" }

// row adds a line. A cell is text as it is, or a cell, or anything that prints.
func (t *table) row(values ...any) {
	row := make([]cell, len(values))
	for i, v := range values {
		switch v := v.(type) {
		case cell:
			row[i] = v
		case string:
			row[i] = cell{text: v}
		default:
			row[i] = cell{text: fmt.Sprint(v)}
		}
		row[i].text = clean(row[i].text)
		if row[i].text == "" {
			row[i] = cell{"-", grey}
		}
	}
	t.rows = append(t.rows, row)
}

// writeTo lays the columns out, two spaces apart.
func (t *table) writeTo(w io.Writer) error {
	widths := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		for i, c := range row {
			if t.colours && c.ink != plain {
				b.WriteString(paint(c.text, c.ink))
			} else {
				b.WriteString(c.text)
			}
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// counted is "1 key" or "2 keys".
func counted(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return thousands(n) + " " + what
}

// clean keeps foreign text from moving the cursor of a terminal, and from being shown
// in another order than it has. It is one line then: several errors stand side by side.
func clean(text string) string {
	text = strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) {
			return '?'
		}
		return r
	}, text)
}

// cleanLines is clean for a text of several lines.
func cleanLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = clean(lines[i])
	}
	return strings.Join(lines, "\n")
}

// when prints a time for a person: UTC, to the second.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

func whenPtr(t *time.Time) string {
	if t == nil {
		return ""
	}
	return when(*t)
}
