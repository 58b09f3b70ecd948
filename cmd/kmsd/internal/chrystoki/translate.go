package chrystoki

import (
	"cmp"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Translation is what a configuration of kmsd says for the HA groups of a file. Its
// groups have the keys of the configuration; what is missing there stands in the notes.
type Translation struct {
	Groups []GroupEntry `json:"groups" yaml:"groups"`
	Notes  []Note       `json:"notes" yaml:"-"`
}

// GroupEntry is one of groups.
type GroupEntry struct {
	Name           string        `json:"name" yaml:"name"`
	Domain         SecretFile    `json:"domain" yaml:"domain"`
	CommandTimeout string        `json:"command_timeout,omitempty" yaml:"command_timeout,omitempty"`
	Recovery       *Recovery     `json:"recovery,omitempty" yaml:"recovery,omitempty"`
	Members        []MemberEntry `json:"members" yaml:"members"`
}

// Recovery is the recovery of a group.
type Recovery struct {
	Mode     string `json:"mode" yaml:"mode"`
	Interval string `json:"interval,omitempty" yaml:"interval,omitempty"`
	Retries  *int   `json:"retries,omitempty" yaml:"retries,omitempty"`
}

// MemberEntry is one of members.
type MemberEntry struct {
	Name     string     `json:"name" yaml:"name"`
	Driver   string     `json:"driver" yaml:"driver"`
	SHA256   string     `json:"sha256" yaml:"sha256"` // "": the operator fills it in
	Standby  bool       `json:"standby,omitempty" yaml:"standby,omitempty"`
	PIN      SecretFile `json:"pin" yaml:"pin"`
	Settings Settings   `json:"settings" yaml:"settings"`
}

// SecretFile names a file that the operator makes, beside the configuration.
type SecretFile struct {
	File string `json:"file" yaml:"file"`
}

// Settings are those of the Luna driver.
type Settings struct {
	Module        string `json:"module,omitempty" yaml:"module,omitempty"`
	TokenSerial   string `json:"token_serial" yaml:"token_serial"`
	ChrystokiConf string `json:"chrystoki_conf,omitempty" yaml:"chrystoki_conf,omitempty"`
}

// Note is something to know about an entry of the configuration: where it comes from,
// or what to do about it.
type Note struct {
	Path string `json:"path"` // groups[0].members[1].sha256; "" for all
	Text string `json:"text"`
	Line int    `json:"line,omitempty"` // of the Chrystoki.conf, 0 when it has no say
}

// noGroups is the fault of a file from which nothing can be made.
const noGroups = "%s has no Luna HA group: no VirtualTokenNNMembers names a partition in a section VirtualToken"

// Translate says the HA groups of the file as a configuration of kmsd. It fails when
// there are none.
func (f *File) Translate() (*Translation, error) {
	t := &translator{File: f, taken: map[string]bool{}, inGroup: map[string]string{}}
	t.preface()
	for _, g := range f.Groups {
		if len(g.all()) == 0 {
			t.note("", Mark{Line: g.line()}, "left out: the Luna HA group %s has no members", g.name())
			continue
		}
		if err := t.group(g); err != nil {
			return nil, err
		}
	}
	if len(t.out.Groups) == 0 {
		return nil, fmt.Errorf(noGroups, f.Path)
	}
	return &t.out, nil
}

type translator struct {
	*File
	out     Translation
	conf    string            // for settings.chrystoki_conf, "" when it is left out
	taken   map[string]bool   // names of groups
	inGroup map[string]string // :: serial number → name of the group that has it
}

func (t *translator) note(path string, at Mark, format string, args ...any) {
	t.out.Notes = append(t.out.Notes, Note{Path: path, Text: fmt.Sprintf(format, args...), Line: at.Line})
}

// preface notes what concerns all groups, in the order of the file.
func (t *translator) preface() {
	t.note("", Mark{}, "Made by kmsd group import-chrystoki from %s, in which nothing was changed.", t.Path)
	t.note("", Mark{}, "To do: put this into kmsd.yaml, beside what kmsd help configuration shows; make the files that domain and pin name "+
		"(domain: openssl rand -base64 32; pin: the PIN of the crypto officer; chmod 600); fill in sha256; then kmsd check -c kmsd.yaml.")
	t.note("", Mark{}, "Before kmsd starts: stop the programs that use these Luna HA groups, because two HA implementations must not manage one partition; "+
		"then delete the groups (lunacm: hagroup deletegroup, which leaves the keys where they are), or %s.", ownCopy)
	t.findConf()
	for _, p := range []struct {
		at   Mark
		text string
	}{
		{onlyIf(t.HAOnly), "no counterpart: kmsd hides the partitions from its clients anyway, but its drivers have to see them, so what they read must not set it"},
		{t.Mode.Mark, "no counterpart: a group of kmsd goes on after the loss of all members, with nothing to finalize"},
		{t.FailoverOnDeactivation.Mark, "no counterpart: kmsd always fails over from a partition that is deactivated"},
		{t.StatusTimeout.Mark, "no counterpart: probe_interval says how often kmsd looks at its members"},
		{t.Log.Status.Mark, "no counterpart: the log of kmsd has it, and kmsd group log"},
		{t.Log.Path.Mark, "no counterpart: the log of kmsd goes to stderr"},
		{t.Log.Length.Mark, "no counterpart: the log of kmsd goes to stderr"},
		{t.Log.Stdout.Mark, "no counterpart: the log of kmsd goes to stderr"},
		{t.AppID, "no counterpart: each driver has its own login; what the drivers read must not set it"},
	} {
		if p.at.Set() {
			t.note("", p.at, "%s: %s", p.at.Key, p.text)
		}
	}
	for _, m := range t.Unknown {
		section, _, _ := strings.Cut(m.Key, ".")
		if slices.ContainsFunc([]string{sectionVirtual, sectionHA, sectionSync}, func(s string) bool { return strings.EqualFold(s, section) }) {
			t.note("", m, "%s: not known here, not taken over", m.Key)
		}
	}
	if !t.Attempts.Set() {
		t.note("", Mark{}, "HAConfiguration.reconnAtt is not set. The Luna client then brings no member back by itself; kmsd does, without end. To have it not do so: recovery: {mode: manual}")
	}
	slices.SortStableFunc(t.out.Notes, func(a, b Note) int { return cmp.Compare(a.Line, b.Line) })
}

// onlyIf is where a switch stands that is on.
func onlyIf(v Value[bool]) Mark {
	if !v.V {
		return Mark{}
	}
	return v.Mark
}

func (t *translator) group(g Group) error {
	at := fmt.Sprintf("groups[%d]", len(t.out.Groups))
	out := GroupEntry{Name: t.name(g)}
	out.Domain.File = out.Name + ".domain"
	t.origin(at+".name", g.Label.Mark)
	if out.Name != g.Label.V {
		t.note(at+".name", Mark{}, "stands for the Luna HA group %s: a name has a-z 0-9 . _ - only, and is given once", g.name())
	}
	if g.Synchronize.Set() && !g.Synchronize.V {
		t.note(at+".name", g.Synchronize.Mark, "%s is off, which has no counterpart: kmsd keeps all members in step", g.Synchronize.Key)
	}
	if v := t.ReceiveTimeout; v.Set() && v.V < minTimeout {
		t.note(at+".name", v.Mark, "%s is left out: it is shorter than the %v that kmsd wants of command_timeout", v.Key, minTimeout)
	} else if v.Set() {
		out.CommandTimeout = seconds(v.V)
		t.origin(at+".command_timeout", v.Mark)
	}
	out.Recovery = t.recovery(at + ".recovery")
	serials := g.all()
	if len(serials) > maxMembers {
		return faultAt(t.Path, g.line(), "the Luna HA group %s has %d members; at most %d", g.name(), len(serials), maxMembers)
	}
	for _, serial := range serials {
		m := t.member(fmt.Sprintf("%s.members[%d]", at, len(out.Members)), g, serial)
		if first, twice := t.inGroup[serial]; twice {
			t.note(fmt.Sprintf("%s.members[%d].name", at, len(out.Members)), Mark{}, "in group %s too: give each group of kmsd partitions of its own", first)
		} else {
			t.inGroup[serial] = out.Name
		}
		out.Members = append(out.Members, m)
	}
	t.out.Groups = append(t.out.Groups, out)
	return nil
}

const (
	maxMembers = 32                    // of a group of kmsd, as of one of Luna
	minTimeout = 10 * time.Millisecond // of a command of kmsd
)

// recovery says what reconnAtt and AutoReconnectInterval mean, nil for the defaults.
func (t *translator) recovery(at string) *Recovery {
	if t.Attempts.Set() && t.Attempts.V == 0 {
		t.note(at+".mode", t.Attempts.Mark, "%s is 0", t.Attempts.Key)
		return &Recovery{Mode: "manual"}
	}
	if !t.Attempts.Set() && !t.Interval.Set() {
		return nil
	}
	out := &Recovery{Mode: "auto"}
	if t.Interval.Set() {
		out.Interval = seconds(t.Interval.V)
		t.origin(at+".interval", t.Interval.Mark)
	}
	if t.Attempts.Set() {
		n := t.Attempts.V
		out.Retries = &n
		t.origin(at+".retries", t.Attempts.Mark)
	}
	return out
}

func (t *translator) member(at string, g Group, serial string) MemberEntry {
	name := "luna-" + strings.ToLower(serial)
	m := MemberEntry{Name: name, Driver: "luna", Standby: slices.Contains(g.Standby.V, serial), PIN: SecretFile{File: name + ".pin"}}
	t.note(at+".sha256", Mark{}, "fill in: kmsd check --offline prints it")
	if m.Standby {
		t.origin(at+".standby", g.Standby.Mark)
	}
	m.Settings = Settings{Module: t.Library.V, TokenSerial: serial, ChrystokiConf: t.conf}
	switch {
	case m.Settings.Module == "":
		t.note(at+".settings", Mark{}, "module is left out: the file names no library in %s.LibUNIX64", sectionLibrary)
	case !filepath.IsAbs(m.Settings.Module):
		t.note(at+".settings.module", t.Library.Mark, "%s; make it absolute", t.Library.Key)
	default:
		t.origin(at+".settings.module", t.Library.Mark)
	}
	t.origin(at+".settings.token_serial", t.File.member(g, serial))
	return m
}

// findConf makes the file itself a setting, when the library can be told of it.
func (t *translator) findConf() {
	abs, err := filepath.Abs(t.Path)
	switch {
	case filepath.Base(t.Path) != FileName:
		t.note("", Mark{}, "settings.chrystoki_conf is left out, because %s is not called %s. The drivers then read %s.", t.Path, FileName, DefaultPath)
	case err != nil: // there is no working directory any more
		t.note("", Mark{}, "settings.chrystoki_conf is left out: %v", err)
	default:
		t.conf = abs
	}
}

// origin notes that a value is that of a setting.
func (t *translator) origin(path string, at Mark) {
	if at.Set() {
		t.note(path, at, "%s", at.Key)
	}
}

// unnamed is what a name of kmsd does not have in it.
var unnamed = regexp.MustCompile(`[^a-z0-9._-]+`)

const maxGroupName = 63 // characters, as the configuration of kmsd has it

// name makes the label of a group a name that kmsd takes, and that no other group has.
func (t *translator) name(g Group) string {
	name := strings.TrimLeft(unnamed.ReplaceAllString(strings.ToLower(g.Label.V), "-"), "._-")
	name = strings.TrimRight(name[:min(len(name), maxGroupName)], "._-")
	if name == "" {
		name = "ha"
	}
	free := name
	for i := 2; t.taken[free]; i++ {
		tail := fmt.Sprintf("-%d", i)
		free = name[:min(len(name), maxGroupName-len(tail))] + tail
	}
	t.taken[free] = true
	return free
}

// seconds says a time as people write it: 60s, not 1m0s.
func seconds(d time.Duration) string {
	if d%time.Second == 0 {
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return d.String()
}
