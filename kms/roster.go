package kms

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// seat is one member's place in a group: what the configuration says of it, and what
// was decided since.
type seat struct {
	name    string
	config  MemberConfig // unused when there is a spec, but for Standby
	spec    *api.MemberSpec
	drained bool
	// entry is the digest of its entry in the configuration; "" when there is none.
	entry string
}

// roster is who belongs to a group.
type roster struct {
	seats []seat // those of the configuration in its order, then the others by name
	// renewed are records that do not hold any more, as they are to be: the entries of
	// these members have changed, or are new.
	renewed []catalog.Member
	// gone are names that are remembered and belong to nobody any more.
	gone []string
}

// merge says who belongs to a group, from its members in the configuration and from
// what is remembered. The configuration is the base. What an operator has changed at
// run time lasts until the member's entry changes; then the entry counts alone. A
// member that was added at run time has no entry and stays until it is removed. A
// group that nobody would be left of is as configured.
func merge(file []MemberConfig, known []catalog.Member) (roster, error) {
	remembered := make(map[string]catalog.Member, len(known))
	for _, m := range known {
		remembered[m.Name] = m
	}
	var r roster
	for _, config := range file {
		s := seat{name: config.Name, config: config, entry: digestOf(config)}
		m, ok := remembered[config.Name]
		delete(remembered, config.Name)
		switch {
		case ok && m.Seen != s.entry:
			r.renewed = append(r.renewed, catalog.Member{Rev: m.Rev, Group: m.Group, Name: m.Name, Token: m.Token, Seen: s.entry})
		case ok && m.Removed:
			continue
		case ok:
			if err := s.overlay(m); err != nil {
				return roster{}, err
			}
		}
		r.seats = append(r.seats, s)
	}
	for _, m := range known {
		if _, left := remembered[m.Name]; !left {
			continue
		}
		if m.Seen != "" || m.Removed || m.Spec == nil {
			r.gone = append(r.gone, m.Name)
			continue
		}
		s := seat{name: m.Name}
		if err := s.overlay(m); err != nil {
			return roster{}, err
		}
		r.seats = append(r.seats, s)
	}
	if len(r.seats) == 0 {
		return merge(file, nil)
	}
	return r, nil
}

// overlay lays what was decided at run time over the seat.
func (s *seat) overlay(m catalog.Member) error {
	if m.Spec != nil {
		s.spec = new(api.MemberSpec)
		if err := json.Unmarshal(m.Spec, s.spec); err != nil {
			return fmt.Errorf("reading the description of member %s of group %s: %w", m.Name, m.Group, err)
		}
		s.config = MemberConfig{Name: m.Name, Driver: s.spec.Driver, Standby: s.spec.Standby}
	}
	if m.Standby != nil {
		s.config.Standby = *m.Standby
	}
	s.drained = m.Drained
	return nil
}

// digestOf tells an entry of the configuration from any other of the same name.
func digestOf(m MemberConfig) string {
	return digest(struct {
		Driver, SHA256 string
		Standby        bool
		Settings       map[string]string `json:",omitempty"`
		Source         string
	}{m.Driver, m.SHA256, m.Standby, m.Settings, m.Source})
}

// placeOf tells where a member's token is looked for.
func placeOf(m MemberConfig) string {
	return digest(struct {
		Driver   string
		Settings map[string]string `json:",omitempty"`
	}{m.Driver, m.Settings})
}

// digest is over the JSON of v, in which maps are sorted. It is kept in catalogs, so it
// must stay the same.
func digest(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic("kms: describing a member: " + err.Error()) // there is nothing in it that JSON has not
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
