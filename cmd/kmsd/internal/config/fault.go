package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Fault is one thing that is wrong with a configuration.
type Fault struct {
	Origin string `json:"origin"`  // "kmsd.yaml:12", "KMSD_TLS_CERT" or "--listen"
	Path   string `json:"path"`    // "groups[0].members[1].pin"; "" for the whole
	Msg    string `json:"message"` // what is wrong and what to do

	line int // for the order; 0 when it is not in the file
}

func (f Fault) String() string {
	s := f.Origin + ": "
	if f.Path != "" {
		s += f.Path + ": "
	}
	return s + f.Msg
}

// Faults is everything that is wrong with a configuration, in the order of its
// lines.
type Faults []Fault

func (fs Faults) Error() string {
	var b strings.Builder
	if len(fs) == 1 {
		b.WriteString("the configuration has a fault:")
	} else {
		fmt.Fprintf(&b, "the configuration has %d faults:", len(fs))
	}
	for _, f := range fs {
		b.WriteString("\n  " + f.String())
	}
	return b.String()
}

// Sort puts the faults in the order of their lines.
func (fs Faults) Sort() {
	slices.SortStableFunc(fs, func(a, b Fault) int { return cmp.Compare(a.line, b.line) })
}

// origins says where each value was given.
type origins struct {
	file string
	at   map[string]origin // :: path of a value → where it was given
}

type origin struct {
	name string // variable or flag; "" means the file
	line int    // of the file
}

func (o origins) note(path string, at origin) { o.at[path] = at }

// find returns where path was given, or where the nearest thing around it was.
func (o origins) find(path string) origin {
	for p := path; p != ""; p = parent(p) {
		if at, ok := o.at[p]; ok {
			return at
		}
	}
	return origin{line: 1}
}

func (o origins) fault(path, format string, args ...any) Fault {
	at := o.find(path)
	name := at.name
	if name == "" {
		name = fmt.Sprintf("%s:%d", o.file, at.line)
	}
	return Fault{Origin: name, Path: path, Msg: fmt.Sprintf(format, args...), line: at.line}
}

// Fault is one that was found elsewhere, in what stands at path.
func (cfg *Config) Fault(path, msg string) Fault { return cfg.origins.fault(path, "%s", msg) }

// MemberFault is a fault of a member that only its driver could tell.
func (cfg *Config) MemberFault(m Member, msg string) Fault { return cfg.Fault(m.at, msg) }

// parent cuts the last step off a path: "a[0].b" → "a[0]" → "a" → "".
func parent(path string) string {
	if i := strings.LastIndexAny(path, ".["); i >= 0 {
		return path[:i]
	}
	return ""
}

// Has says whether there is a fault in what stands at path, in something around it,
// or in a part of it.
func (fs Faults) Has(path string) bool {
	return slices.ContainsFunc(fs, func(f Fault) bool { return contains(f.Path, path) || contains(path, f.Path) })
}

// contains says whether the value at inner is the one at outer or a part of it.
func contains(outer, inner string) bool {
	rest, ok := strings.CutPrefix(inner, outer)
	return ok && (outer == "" || rest == "" || rest[0] == '.' || rest[0] == '[')
}

// collector gathers faults while a configuration is read.
type collector struct {
	origins
	faults Faults
}

func (c *collector) add(path, format string, args ...any) {
	c.faults = append(c.faults, c.fault(path, format, args...))
}

// check adds a fault unless the value, or something around it, has one already:
// what could not be read is not also missing.
func (c *collector) check(path, format string, args ...any) {
	for _, f := range c.faults {
		if f.Path != "" && contains(f.Path, path) {
			return
		}
	}
	c.add(path, format, args...)
}

// err returns the faults, nil when there are none.
func (c *collector) err() error {
	if len(c.faults) == 0 {
		return nil
	}
	c.faults.Sort()
	return c.faults
}
