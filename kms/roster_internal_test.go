package kms

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"kmsd/kms/catalog"
)

// entry is a member in a configuration.
func entry(name string, settings ...string) MemberConfig {
	m := MemberConfig{Name: name, Driver: "softhsm", Settings: map[string]string{"token_label": name}}
	for _, s := range settings {
		key, value, _ := strings.Cut(s, "=")
		switch key {
		case "standby":
			m.Standby = true
		case "sha256":
			m.SHA256 = value
		case "source":
			m.Source = value
		default:
			m.Settings[key] = value
		}
	}
	return m
}

// known is a record that was written when the member's entry was as given.
func known(m MemberConfig, what ...string) catalog.Member {
	rec := catalog.Member{Rev: 1, Group: "g", Name: m.Name, Seen: digestOf(m), Token: &catalog.Token{Serial: "1"}}
	for _, w := range what {
		switch yes, no := true, false; w {
		case "added":
			rec.Seen = ""
			rec.Spec = json.RawMessage(fmt.Sprintf(`{"name":%q,"driver":"softhsm","settings":{"token_label":"other"},"pin":{"file":"/pin"}}`, m.Name))
		case "replaced":
			rec.Spec = json.RawMessage(fmt.Sprintf(`{"name":%q,"driver":"softhsm","standby":true,"pin":{"file":"/pin"}}`, m.Name))
		case "removed":
			rec.Removed = true
		case "standby":
			rec.Standby = &yes
		case "active":
			rec.Standby = &no
		case "drained":
			rec.Drained = true
		}
	}
	return rec
}

func TestMerge(t *testing.T) {
	a, b := entry("a"), entry("b")
	type members = []MemberConfig
	type records = []catalog.Member
	for _, c := range []struct {
		name    string
		file    members
		known   records
		seats   string // each with what is peculiar about it
		renewed string // each with the entry that it now goes by
		gone    string
	}{
		{name: "a member that was never seen is new", file: members{a, b}, seats: "a b"},
		{name: "a member that is as it was stays", file: members{a, b}, known: records{known(a), known(b)}, seats: "a b"},
		{name: "a member that is in the file no more is gone", file: members{a}, known: records{known(a), known(b)}, seats: "a", gone: "b"},
		{name: "one that is in the file no more and was changed at run time is gone too", file: members{a}, known: records{known(b, "standby", "drained", "replaced")}, seats: "a", gone: "b"},
		{name: "a member that was added at run time stays", file: members{a}, known: records{known(b, "added")}, seats: "a b(spec)"},
		{name: "members that were added at run time come last, by name", file: members{entry("z")}, known: records{known(a, "added"), known(b, "added")}, seats: "z a(spec) b(spec)"},
		{name: "a member that was added and removed at run time is gone", file: members{a}, known: records{known(b, "added", "removed")}, seats: "a", gone: "b"},
		{name: "one that was added at run time keeps the role that it got", file: members{a}, known: records{known(b, "added", "standby", "drained")}, seats: "a b(spec,standby,drained)"},
		{name: "a member that was removed at run time stays away while its entry is the same", file: members{a, b}, known: records{known(b, "removed")}, seats: "a"},
		{name: "a member that was removed at run time is back when its settings change", file: members{a, entry("b", "module=/new")}, known: records{known(b, "removed")}, seats: "a b", renewed: "b"},
		{name: "a member that was removed at run time is back when the source of its PIN changes", file: members{a, entry("b", "source=file:/new")}, known: records{known(b, "removed")}, seats: "a b", renewed: "b"},
		{name: "a role that was given at run time stays while the entry is the same", file: members{a, b}, known: records{known(b, "standby")}, seats: "a b(standby)"},
		{name: "a standby of the file that was made active stays active", file: members{a, entry("b", "standby")}, known: records{known(entry("b", "standby"), "active")}, seats: "a b"},
		{name: "the role is the file's when the entry's role changes", file: members{a, entry("b", "standby")}, known: records{known(b, "active")}, seats: "a b(standby)", renewed: "b"},
		{name: "the role is the file's when anything else of the entry changes", file: members{a, entry("b", "sha256=ab")}, known: records{known(b, "standby")}, seats: "a b", renewed: "b"},
		{name: "a drain outlives a restart", file: members{a, b}, known: records{known(b, "drained")}, seats: "a b(drained)"},
		{name: "a drain ends when the entry changes", file: members{a, entry("b", "sha256=ab")}, known: records{known(b, "drained")}, seats: "a b", renewed: "b"},
		{name: "a replacement stays while the entry is the same", file: members{a, b}, known: records{known(b, "replaced")}, seats: "a b(spec,standby)"},
		{name: "a replacement ends when the entry changes", file: members{a, entry("b", "module=/new")}, known: records{known(b, "replaced")}, seats: "a b", renewed: "b"},
		{name: "one that was added at run time is the file's when the file gets it", file: members{a, b}, known: records{known(b, "added", "standby")}, seats: "a b", renewed: "b"},
		{name: "the order of the file counts when it changes", file: members{b, a}, known: records{known(a), known(b)}, seats: "b a"},
		{name: "a group of which nobody would be left is as configured", file: members{a}, known: records{known(a, "removed")}, seats: "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := merge(c.file, c.known)
			if err != nil {
				t.Fatal(err)
			}
			var seats, renewed []string
			for _, s := range r.seats {
				seats = append(seats, s.name+peculiar(s))
				for _, m := range c.file {
					if m.Name == s.name && s.entry != digestOf(m) {
						t.Errorf("the seat of %s is not that of its entry", s.name)
					}
				}
			}
			for _, m := range r.renewed {
				renewed = append(renewed, m.Name)
				if m.Removed || m.Drained || m.Standby != nil || m.Spec != nil || m.Token == nil || m.Seen == "" {
					t.Errorf("the record of %s is to be %+v: want nothing but its token and its entry", m.Name, m)
				}
			}
			for _, got := range []struct{ what, got, want string }{
				{"the seats are", strings.Join(seats, " "), c.seats},
				{"renewed are", strings.Join(renewed, " "), c.renewed},
				{"gone are", strings.Join(r.gone, " "), c.gone},
			} {
				if got.got != got.want {
					t.Errorf("%s %q, want %q", got.what, got.got, got.want)
				}
			}
		})
	}
}

// peculiar says what a seat has beside its entry.
func peculiar(s seat) string {
	var with []string
	if s.spec != nil {
		with = append(with, "spec")
	}
	if s.config.Standby {
		with = append(with, "standby")
	}
	if s.drained {
		with = append(with, "drained")
	}
	if with == nil {
		return ""
	}
	return "(" + strings.Join(with, ",") + ")"
}

// Digests are kept in catalogs, so another way to make them would end what operators
// have changed, and take every token for another.
func TestDigestsStayTheSame(t *testing.T) {
	m := MemberConfig{Name: "a", Driver: "softhsm", SHA256: "ab", Standby: true, Settings: map[string]string{"token_label": "x", "module": "/m"}, Source: "file:/pin"}
	for what, c := range map[string]struct{ got, want string }{
		"entry": {digestOf(m), "c7d0ca9d47f867956d77d072159c7a9881a64aebe774808f905a35d49c104e10"},
		"place": {placeOf(m), "b6b4b443052b34192ce75b1a4d5e03873633be6de663ef8803d828f9c7a18517"},
	} {
		if c.got != c.want {
			t.Errorf("the digest of the %s is %s, want %s", what, c.got, c.want)
		}
	}
}
