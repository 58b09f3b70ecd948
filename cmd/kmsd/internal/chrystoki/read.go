package chrystoki

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Sections that kmsd reads.
const (
	sectionVirtual  = "VirtualToken"
	sectionHA       = "HAConfiguration"
	sectionSync     = "HASynchronize"
	sectionRecovery = "HARecovery" // deprecated by Thales: automatic recovery covers it
	sectionLibrary  = "Chrystoki2"
	sectionLogger   = "CkLog2"
	sectionClient   = "LunaSA Client"
	sectionMisc     = "Misc"
)

const (
	standbySuffix = "StandbyMembers"
	loggerPrefix  = "libcklog" // of the library that writes down calls and passes them on
	maxNumber     = 1 << 31    // of seconds, milliseconds, bytes and attempts
	maxSerial     = 32         // characters; CK_TOKEN_INFO.serialNumber has 16
	maxGroups     = 100        // virtual slots of a client, says Thales
)

// Parse reads the text of a file that is called path in messages. All that is wrong
// with the settings that kmsd reads is in one error.
func Parse(path string, text []byte) (*File, error) {
	entries, err := scan(path, text)
	if err != nil {
		return nil, err
	}
	r := &reader{path: path, entries: entries, named: map[string][]*entry{}}
	for _, e := range entries {
		name := folded(e.section, e.key)
		r.named[name] = append(r.named[name], e)
	}
	f := &File{
		Path:    path,
		Library: r.library(),
		Groups:  r.groups(),
		HAOnly:  r.flag(sectionHA, "HAOnly"),

		Interval: r.span(sectionHA, "AutoReconnectInterval", time.Second),
		Attempts: r.number(sectionHA, "reconnAtt", -1),
		Mode:     r.text(sectionVirtual, "VirtualTokenActiveRecovery"),

		ReceiveTimeout:         r.span(sectionClient, "ReceiveTimeout", time.Millisecond),
		StatusTimeout:          r.span(sectionHA, "statusTimeout", time.Second),
		FailoverOnDeactivation: r.flag(sectionHA, "failover_on_deactivation"),

		Log: Log{
			Status: r.flag(sectionHA, "haLogStatus"),
			Path:   r.text(sectionHA, "haLogPath"),
			Length: r.number(sectionHA, "logLen", 0),
			Stdout: r.flag(sectionHA, "haLogToStdout"),
		},
		AppID: r.appID(),
	}
	if err := errors.Join(r.faults...); err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !e.used {
			f.Unknown = append(f.Unknown, e.mark())
		}
	}
	return f, nil
}

func (e *entry) mark() Mark { return Mark{Key: e.section + "." + e.key, Line: e.line} }

// reader looks settings up. Names are compared without regard to case: whether the
// client does so is not documented, and a warning too many harms less than one too few.
type reader struct {
	path    string
	entries []*entry
	named   map[string][]*entry // :: folded section and key → settings of that name
	faults  []error
}

func folded(section, key string) string { return strings.ToLower(section + "\x00" + key) }

func (r *reader) fault(line int, format string, args ...any) {
	r.faults = append(r.faults, faultAt(r.path, line, format, args...))
}

// text returns a setting. It is not documented which of two the client takes, so two
// that differ are a fault.
func (r *reader) text(section, key string) Value[string] {
	var v Value[string]
	for _, e := range r.named[folded(section, key)] {
		e.used = true
		if v.Set() && v.V != e.value {
			r.fault(e.line, "%s says something else than in line %d; keep one", e.mark().Key, v.Line)
			continue
		}
		if !v.Set() {
			v = Value[string]{V: e.value, Mark: e.mark()}
		}
	}
	return v
}

func (r *reader) flag(section, key string) Value[bool] {
	t := r.text(section, key)
	switch strings.ToLower(t.V) {
	case "1", "enabled", "yes", "true":
		return Value[bool]{V: true, Mark: t.Mark}
	case "", "0", "disabled", "no", "false":
	default:
		r.fault(t.Line, "%s is %q, want 0 or 1", t.Key, t.V)
	}
	return Value[bool]{Mark: t.Mark}
}

// number reads a whole number of at least least. An empty value is as none.
func (r *reader) number(section, key string, least int) Value[int] {
	t := r.text(section, key)
	if t.V == "" {
		return Value[int]{}
	}
	n, err := strconv.Atoi(t.V)
	if err != nil || n < least || n > maxNumber {
		r.fault(t.Line, "%s is %q, want a whole number of at least %d", t.Key, t.V, least)
	}
	return Value[int]{V: n, Mark: t.Mark}
}

// span reads a time that is a number of units. Zero is as none.
func (r *reader) span(section, key string, unit time.Duration) Value[time.Duration] {
	n := r.number(section, key, 0)
	if n.V == 0 {
		return Value[time.Duration]{}
	}
	return Value[time.Duration]{V: time.Duration(n.V) * unit, Mark: n.Mark}
}

// library finds the PKCS#11 library: LibUNIX is that of 32-bit programs on a machine
// that has both.
func (r *reader) library() Value[string] {
	pick := func(section string) Value[string] {
		wide, plain := r.text(section, "LibUNIX64"), r.text(section, "LibUNIX")
		if wide.V != "" {
			return wide
		}
		return plain
	}
	lib, logged := pick(sectionLibrary), pick(sectionLogger)
	if logged.V != "" && strings.HasPrefix(filepath.Base(lib.V), loggerPrefix) {
		return logged
	}
	return lib
}

// appID finds a fixed application id. Clients have called it by several names.
func (r *reader) appID() Mark {
	var found Mark
	for _, key := range []string{"AppIdMinor", "AppIdMajor", "AppId"} {
		if v := r.text(sectionMisc, key); v.V != "" {
			found = v.Mark
		}
	}
	return found
}

var virtualKey = regexp.MustCompile(`(?i)^VirtualToken(\d{1,4})(Label|SN|Members|StandbyMembers)$`)

// groups finds the HA groups by the number in the names of their settings.
func (r *reader) groups() []Group {
	numbers := map[string]bool{} // as they are written: 00, 01
	for _, e := range r.entries {
		if m := virtualKey.FindStringSubmatch(e.key); m != nil && strings.EqualFold(e.section, sectionVirtual) {
			numbers[m[1]] = true
		}
	}
	if len(numbers) > maxGroups {
		r.fault(1, "%d HA groups; a Luna client has at most %d", len(numbers), maxGroups)
		return nil
	}
	var out []Group
	for digits := range numbers {
		n, _ := strconv.Atoi(digits) // the pattern admits four digits at most
		out = append(out, r.group(n, sectionVirtual+digits))
	}
	slices.SortFunc(out, func(a, b Group) int { return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.line(), b.line())) })
	return out
}

func (r *reader) group(n int, prefix string) Group {
	g := Group{
		Number:  n,
		Label:   r.text(sectionVirtual, prefix+"Label"),
		Serial:  r.text(sectionVirtual, prefix+"SN"),
		Members: r.serials(r.text(sectionVirtual, prefix+"Members")),
		Standby: r.serials(r.text(sectionVirtual, prefix+standbySuffix)),
	}
	if g.Label.V == "" {
		return g
	}
	// Not documented; files of both kinds have been seen.
	if byLabel := r.serials(r.text(sectionHA, g.Label.V+standbySuffix)); !g.Standby.Set() {
		g.Standby = byLabel
	}
	g.Synchronize = r.flag(sectionSync, g.Label.V)
	r.text(sectionRecovery, g.Label.V)
	return g
}

// line is where the group begins.
func (g Group) line() int {
	first := 0
	for _, m := range []Mark{g.Label.Mark, g.Serial.Mark, g.Members.Mark, g.Standby.Mark} {
		if m.Set() && (first == 0 || m.Line < first) {
			first = m.Line
		}
	}
	return first
}

// name is what people call the group.
func (g Group) name() string {
	if g.Label.V == "" {
		return fmt.Sprintf("number %02d", g.Number)
	}
	return strconv.Quote(g.Label.V)
}

// all are the serial numbers of the members, standby members last.
func (g Group) all() []string {
	var out []string
	for _, serial := range slices.Concat(g.Members.V, g.Standby.V) {
		if !slices.Contains(out, serial) {
			out = append(out, serial)
		}
	}
	return out
}

var serialPattern = regexp.MustCompile(fmt.Sprintf(`^[0-9A-Za-z]{1,%d}$`, maxSerial))

func (r *reader) serials(t Value[string]) Value[[]string] {
	v := Value[[]string]{Mark: t.Mark}
	for _, serial := range strings.FieldsFunc(t.V, func(c rune) bool { return c == ',' || c == ' ' || c == '\t' }) {
		if !serialPattern.MatchString(serial) {
			r.fault(t.Line, "%s: %q is not a serial number", t.Key, serial)
			continue
		}
		v.V = append(v.V, serial)
	}
	return v
}
