package auth

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"

	"kmsd/cmd/kmsd/internal/owned"
)

// Limits of the files.
const (
	maxFile = 4 << 20 // bytes
	maxText = 256     // bytes of a name or a glob
)

// Fault is one thing that is wrong with a file.
type Fault struct {
	File string
	Line int // 0: the file as a whole
	Msg  string
}

func (f Fault) String() string {
	if f.Line == 0 {
		return f.File + ": " + f.Msg
	}
	return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Msg)
}

// Faults is everything that is wrong with the files, in the order of their lines.
type Faults []Fault

func (fs Faults) Error() string {
	lines := make([]string, len(fs))
	for i, f := range fs {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// document is one YAML file and what is wrong with it. Reading goes on after a
// fault, so that all of them are found.
type document struct {
	path   string
	faults Faults
}

// open reads a file whose mode has none of the forbidden bits, and returns the
// root of its one document, nil for an empty one.
func (d *document) open(forbidden os.FileMode, who string) *yaml.Node {
	b, err := readFile(d.path, forbidden, who)
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err // the path is in the fault
		}
		d.add(0, "%v", err)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	var root, more yaml.Node
	switch err := dec.Decode(&root); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		d.syntax(err)
		return nil
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		d.add(0, "there is a second document after ---")
	}
	return root.Content[0]
}

// readFile looks at the file that it has opened, so that nobody can exchange it in
// between.
func readFile(path string, forbidden os.FileMode, who string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case !owned.ByUs(info):
		return nil, fmt.Errorf("it belongs to another user, who could let anybody in (%s)", owned.Advice(info))
	case info.Mode().Perm()&forbidden != 0:
		return nil, fmt.Errorf("its mode is %04o, but %s (chmod %04o)", info.Mode().Perm(), who, info.Mode().Perm()&^forbidden)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	return b, nil
}

func (d *document) add(line int, format string, args ...any) {
	d.faults = append(d.faults, Fault{d.path, line, fmt.Sprintf(format, args...)})
}

// syntaxLine finds the line in the messages of the YAML parser, which has no type
// for it.
var syntaxLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func (d *document) syntax(err error) {
	m := syntaxLine.FindStringSubmatch(err.Error())
	if m == nil {
		m = []string{"", ""}
	}
	line, _ := strconv.Atoi(m[1]) // without a number it is the file as a whole
	d.add(line, "not YAML: %s", err.Error()[len(m[0]):])
}

// sorted returns the faults in the order of their lines.
func (d *document) sorted() Faults {
	slices.SortStableFunc(d.faults, func(a, b Fault) int { return cmp.Compare(a.Line, b.Line) })
	return d.faults
}

// fields calls for each field of a mapping what known has for its name. Fields that
// are not known, or there twice, are faults.
func (d *document) fields(n *yaml.Node, what string, known map[string]func(key, value *yaml.Node)) {
	seen := make(map[string]int)
	d.eachField(n, what, func(key, value *yaml.Node) {
		f, ok := known[key.Value]
		switch {
		case !ok:
			d.add(key.Line, "%s has no field %q", what, key.Value)
		case seen[key.Value] != 0:
			d.add(key.Line, "field %q is there already in line %d", key.Value, seen[key.Value])
		default:
			seen[key.Value] = key.Line
			f(key, value)
		}
	})
}

// eachField calls f for the fields of a mapping.
func (d *document) eachField(n *yaml.Node, what string, f func(key, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		d.add(n.Line, "%s must be a mapping (name: value)", what)
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
			d.add(key.Line, "%s has a field whose name is not plain text", what)
			continue
		}
		f(key, n.Content[i+1])
	}
}

// each calls f for the elements of a list.
func (d *document) each(n *yaml.Node, what string, f func(*yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		d.add(n.Line, "%s must be a list", what)
		return
	}
	for _, e := range n.Content {
		f(e)
	}
}

// text returns a plain value. "" means that a fault was added.
func (d *document) text(n *yaml.Node, what string) string {
	switch {
	case n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "":
		d.add(n.Line, "%s must be plain text", what)
		return ""
	case len(n.Value) > maxText:
		d.add(n.Line, "%s has more than %d bytes", what, maxText)
		return ""
	}
	return n.Value
}

// texts returns a list of plain values with their nodes.
func (d *document) texts(n *yaml.Node, what string, f func(text string, at *yaml.Node)) {
	d.each(n, what, func(e *yaml.Node) {
		if t := d.text(e, "an element of "+what); t != "" {
			f(t, e)
		}
	})
}
