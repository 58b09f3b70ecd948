package chrystoki

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits on what is read. A file of a client with a hundred servers has some ten KiB.
const (
	maxFile    = 1 << 20 // bytes
	maxEntries = 10_000  // settings of a file
	maxName    = 128     // bytes of a section's or a setting's name
	maxValue   = 4096    // bytes
)

// entry is one setting as it was written.
type entry struct {
	section, key, value string
	line                int
	used                bool // somebody has asked for it
}

// scanner goes through a file by the byte. Its errors never hold a value.
type scanner struct {
	path string
	rest []byte
	line int
	out  []*entry
}

// scan takes a file apart. Sections do not nest, a value ends with a semicolon on the
// line where it begins, and a # begins a comment wherever a name could begin.
func scan(path string, text []byte) ([]*entry, error) {
	s := &scanner{path: path, rest: bytes.TrimPrefix(text, []byte("\ufeff")), line: 1}
	if len(text) > maxFile {
		return nil, s.fault("longer than %d bytes; that is no Chrystoki.conf", maxFile)
	}
	for s.skip() {
		if s.rest[0] == '[' {
			return nil, s.fault("this is the syntax of crystoki.ini, of a Windows client; use the Chrystoki.conf of a Unix client")
		}
		section, err := s.name("no section begins here, as in HAConfiguration = { … }; is this a Chrystoki.conf?")
		if err != nil {
			return nil, err
		}
		if !s.skip() || s.rest[0] != '{' {
			return nil, s.fault("after %s = there has to be a {", section)
		}
		s.rest = s.rest[1:]
		if err := s.entries(section); err != nil {
			return nil, err
		}
	}
	return s.out, nil
}

// entries reads a section after its {, to its }.
func (s *scanner) entries(section string) error {
	begun := s.line
	for s.skip() {
		if s.rest[0] == '}' {
			s.rest = s.rest[1:]
			return nil
		}
		key, err := s.name("no setting begins here, as in HAOnly = 0;")
		if err != nil {
			return err
		}
		line := s.line
		value, err := s.value(key)
		if err != nil {
			return err
		}
		if len(s.out) == maxEntries {
			return s.fault("more than %d settings", maxEntries)
		}
		s.out = append(s.out, &entry{section: section, key: key, value: value, line: line})
	}
	return s.fault("section %s, of line %d, has no }", section, begun)
}

// skip goes to what is next and says whether there is anything.
func (s *scanner) skip() bool {
	for len(s.rest) > 0 {
		switch c := s.rest[0]; {
		case c == '\n':
			s.line++
		case c == '#':
			if i := bytes.IndexByte(s.rest, '\n'); i >= 0 {
				s.rest = s.rest[i:]
			} else {
				s.rest = nil
			}
			continue
		case c != ' ' && c != '\t' && c != '\r' && c != ';':
			return true
		}
		s.rest = s.rest[1:]
	}
	return false
}

// name reads up to and with the = after a name. Without one the fault is none.
func (s *scanner) name(none string) (string, error) {
	i := bytes.IndexAny(s.rest, "=\n{};")
	if i < 0 || s.rest[i] != '=' {
		return "", s.fault("%s", none)
	}
	name := strings.TrimSpace(string(s.rest[:i]))
	if name == "" || len(name) > maxName || !readable(name) {
		return "", s.fault("%s", none)
	}
	s.rest = s.rest[i+1:]
	return name, nil
}

// value reads up to and with the semicolon after a value, which may be quoted.
func (s *scanner) value(key string) (string, error) {
	line, _, _ := bytes.Cut(s.rest, []byte("\n"))
	text := strings.TrimLeft(string(line), " \t\r")
	value, tail, ended := "", "", false
	if quoted := strings.HasPrefix(text, `"`) || strings.HasPrefix(text, "'"); quoted {
		if value, tail, ended = strings.Cut(text[1:], text[:1]); !ended {
			return "", s.fault("the quote of %s is not closed", key)
		}
		tail = strings.TrimLeft(tail, " \t\r")
		tail, ended = strings.CutPrefix(tail, ";")
	} else {
		value, tail, ended = strings.Cut(text, ";")
		value = strings.TrimSpace(value)
	}
	switch {
	case strings.HasPrefix(text, "{"):
		return "", s.fault("%s is a section in a section; is a } missing before it?", key)
	case !ended:
		return "", s.fault("the value of %s does not end with a ;", key)
	case len(value) > maxValue:
		return "", s.fault("the value of %s is longer than %d bytes", key, maxValue)
	case !readable(value):
		return "", s.fault("the value of %s has characters that cannot be shown", key)
	}
	s.rest = s.rest[len(line)-len(tail):]
	return value, nil
}

func (s *scanner) fault(format string, args ...any) error {
	return faultAt(s.path, s.line, format, args...)
}

func faultAt(path string, line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %s", path, line, fmt.Sprintf(format, args...))
}

// readable says whether text shows itself as it is: no control characters, nothing that
// changes the order on a terminal.
func readable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return r != '\t' && !unicode.IsGraphic(r) })
}
