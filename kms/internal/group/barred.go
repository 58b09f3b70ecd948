package group

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// bars reports whether the member must not be asked for a key, because its copy is
// not what it should be.
func (l *link) bars(id pluginproto.KeyID) bool { return len(l.barred) > 0 && l.barred[id] }

func (l *link) barsOne(ids []pluginproto.KeyID) bool {
	return len(l.barred) > 0 && slices.ContainsFunc(ids, l.bars)
}

// Bar has a member asked no more for keys, from now until its next admission is over
// and has decided which. It is for what turns out while the member serves.
func (g *Group) Bar(name string, ids []pluginproto.KeyID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m := g.byName[name]; m != nil && m.link != nil {
		m.link.bar(slices.AppendSeq(slices.Clone(ids), maps.Keys(m.link.barred)))
	}
}

// quarantined is the refusal of a member to use its copy of a key. It is a member's
// failure, so whoever gets it may ask another member, and nobody takes it for the
// absence of the key.
func quarantined(m *member, id pluginproto.KeyID) error {
	return &MemberError{Member: m.cfg.Name, Err: fmt.Errorf("%w: %w", ErrBarred, &pluginproto.Error{
		Class: pluginproto.ClassMember, Op: "using key " + id.String(),
		Msg: "its copy has another value than it should, and is quarantined",
	})}
}

// barredLocked is the error for a caller whose key could be used only on members
// with a quarantined copy. Nil: there are none, and something else is the reason.
func (g *Group) barredLocked(id pluginproto.KeyID, last error) error {
	if g.state == api.GroupLost {
		return nil
	}
	var errs []error
	var names []string
	for _, m := range g.members {
		if m.link != nil && m.link.bars(id) {
			errs = append(errs, quarantined(m, id))
			names = append(names, m.cfg.Name)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	if last != nil && !errors.Is(last, ErrBarred) {
		errs = append(errs, last)
	}
	return &barredError{group: g.cfg.Name, key: id, members: names, errs: errs}
}

// barredError is [ErrBarred] with the members that have the key.
type barredError struct {
	group   string
	key     pluginproto.KeyID
	members []string
	errs    []error // of each of them, and of the last attempt elsewhere
}

func (e *barredError) Error() string {
	s := fmt.Sprintf("group %s: key %s cannot be used now: no member that serves has a sound copy, and that on %s is quarantined",
		e.group, e.key, strings.Join(e.members, ", "))
	if last := e.errs[len(e.errs)-1]; len(e.errs) > len(e.members) {
		s += fmt.Sprintf(" (last: %v)", last)
	}
	return s
}

func (e *barredError) Unwrap() []error { return e.errs }
