package chrystoki

import (
	"fmt"
	"slices"
	"strings"
)

// Finding is something in a file that a driver would suffer from.
type Finding struct {
	Setting string // of the member, that the finding is about: token_label
	Wrong   bool   // the member must not be served like that; else it is a warning
	Text    string // what is set, what it does, and what to do
}

// Choice is how a member of kmsd chooses its token: by its label, its serial number or
// both.
type Choice struct{ Label, Serial string }

// ownCopy is the way out for whoever needs the file as it is for other programs.
const ownCopy = "give kmsd a copy of the file without VirtualToken, HASynchronize and HAConfiguration, called " + FileName +
	" in a directory of its own, as settings.chrystoki_conf"

// Review says what the file does to a driver that is given it.
func (f *File) Review(c Choice) []Finding {
	for _, g := range f.Groups {
		if found, is := f.virtual(g, c); is {
			return []Finding{found}
		}
	}
	var out []Finding
	warn := func(m Mark, format string, args ...any) {
		out = append(out, Finding{Setting: "chrystoki_conf", Text: fmt.Sprintf("%s:%d: ", f.Path, m.Line) + fmt.Sprintf(format, args...)})
	}
	if f.HAOnly.V {
		warn(f.HAOnly.Mark, "%s hides the physical slots, so the token will not be found; %s", f.HAOnly.Key, ownCopy)
	}
	if text, at := f.shared(c); text != "" {
		warn(at, "%s", text)
	}
	if f.AppID.Set() {
		warn(f.AppID, "%s is fixed, so all programs that read this file share one login: whichever logs out takes it from the driver, "+
			"and whoever uses that id is logged in without a PIN; take the setting out, or do so in a copy of the file for kmsd", f.AppID.Key)
	}
	return out
}

// virtual finds out whether the token that is meant is the virtual slot of an HA group.
func (f *File) virtual(g Group, c Choice) (Finding, bool) {
	at, setting := g.Serial.Mark, "token_serial"
	switch {
	case c.Serial != "" && c.Serial == g.Serial.V:
	case c.Serial == "" && c.Label != "" && c.Label == g.Label.V:
		at, setting = g.Label.Mark, "token_label"
	default:
		return Finding{}, false
	}
	how := "choose a partition by its serial number"
	if all := g.all(); len(all) > 0 {
		how = "choose a partition by token_serial; its members are " + strings.Join(all, ", ")
	}
	return Finding{Setting: setting, Wrong: true, Text: fmt.Sprintf("%s:%d: that is the virtual slot of the Luna HA group %s, "+
		"behind which the Luna client replicates and recovers by itself; %s", f.Path, at.Line, g.name(), how)}, true
}

// shared says what the HA groups of the file are to the token that is meant, "" when
// there are none.
func (f *File) shared(c Choice) (string, Mark) {
	if len(f.Groups) == 0 {
		return "", Mark{}
	}
	var names []string
	for _, g := range f.Groups {
		if c.Serial != "" && slices.Contains(g.all(), c.Serial) {
			return fmt.Sprintf("partition %s is in the Luna HA group %s; two HA implementations must not manage one partition, because recoveries that meet can corrupt keys; "+
				"stop the programs that use the group, then take the partition out of it (lunacm: hagroup removemember, or hagroup deletegroup, which leaves the keys where they are)", c.Serial, g.name()), f.member(g, c.Serial)
		}
		names = append(names, g.name())
	}
	first := Mark{Line: f.Groups[0].line()}
	groups := "the Luna HA group " + names[0]
	if len(names) > 1 {
		groups = "the Luna HA groups " + strings.Join(names, ", ")
	}
	if c.Serial == "" {
		return fmt.Sprintf("the file has %s, and two HA implementations must not manage one partition; choose the token by token_serial, "+
			"so that it can be told whether it is a member there, and %s", groups, ownCopy), first
	}
	return fmt.Sprintf("the file has %s, without partition %s; the driver sees a virtual slot beside the partitions, and has no use for it; %s", groups, c.Serial, ownCopy), first
}

// member returns where a group names a member.
func (f *File) member(g Group, serial string) Mark {
	if slices.Contains(g.Members.V, serial) {
		return g.Members.Mark
	}
	return g.Standby.Mark
}
