package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// admit decides whether a member may serve. A token that the group does not know yet
// has to fit it before anything is put on it; when it holds what it should, it is
// written down as the member's, before the member serves.
func (k *KMS) admit(ctx context.Context, g *keyGroup, m group.Member, last bool) (group.Admission, error) {
	if err := k.checkJoin(ctx, g, m, last); err != nil {
		return group.Admission{}, err
	}
	found, err := g.admit(ctx, m, last)
	if err == nil && last {
		err = k.pin(ctx, g, m)
	}
	return found, err
}

// checkJoin proves that a token that the group does not know fits it. For one that
// was admitted before, recognise has done all. At last, under the lease, it is compared
// once more: several that are new may have been looked at while nobody was in step.
func (k *KMS) checkJoin(ctx context.Context, g *keyGroup, m group.Member, last bool) error {
	rec, err := k.catalog.Member(ctx, g.name, m.Name())
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	if rec.Token != nil && rec.Token.Is(pinOf(MemberConfig{}, m.Token())) && !g.table.swapping(m.Name()) {
		return nil
	}
	others := slices.DeleteFunc(g.InStep(), func(other group.Member) bool { return other.Name() == m.Name() })
	for _, other := range others {
		if err := compareTokens(m, other); err != nil {
			return explained(m, err)
		}
		if last {
			k.warnOfDifference(g, m, other)
		}
	}
	if err := takesFromSome(m, others); err != nil {
		return explained(m, err)
	}
	keys, _ := k.ring.count(g.name, "")
	switch fresh := keys == 0 && !g.table.swapping(m.Name()); {
	case fresh != last:
		// The members of a new group come all at once: only the last look is sure to
		// find another one in step.
		return nil
	case fresh && provenBySecret(m, others):
		return nil
	}
	if !last {
		release, err := g.Lease(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	return explained(m, k.proveClone(ctx, g, m))
}

// provenBySecret reports whether the first clone could fail for no reason that the domain
// secret does not show already.
func provenBySecret(m group.Member, others []group.Member) bool {
	return !slices.ContainsFunc(others, func(other group.Member) bool {
		p, _ := pluginproto.CommonProtocol(other.Token().Cloning, m.Token().Cloning)
		return !p.BySecret
	})
}

// explained adds to a refusal for good what the driver warns of: why it offers no protocol
// is not for the group to know.
func explained(m group.Member, err error) error {
	e, ok := errors.AsType[*pluginproto.Error](err)
	if !ok || !e.Permanent {
		return err
	}
	because := *e
	for _, fact := range m.Token().Facts {
		if fact.Warning {
			because.Msg += fmt.Sprintf("; its driver warns: %s: %s", fact.Name, fact.Value)
		}
	}
	return &because
}

// compareTokens refuses a token that cannot exchange keys with a member's.
func compareTokens(m, other group.Member) error {
	mine, theirs := m.Token(), other.Token()
	op := "joining the group with member " + m.Name()
	switch {
	case kindOf(mine) != kindOf(theirs):
		return ownFault(pluginproto.CKROK, op, "its driver is %q and that of member %s is %q: keys cannot be cloned between them; give it an HSM of the same kind",
			mine.Driver, other.Name(), theirs.Driver)
	case string(mine.DomainCheck) != string(theirs.DomainCheck):
		return ownFault(ckrTokenNotRecognized, op, "its domain secret is not that of member %s: both need the same one", other.Name())
	}
	if lacks := lacking(mine.Mechanisms, theirs.Mechanisms); len(lacks) > 0 {
		return ownFault(pluginproto.CKROK, op, "it does not offer %s as member %s does: give both the same policies, FIPS mode too, or commands would fail on it",
			strings.Join(lacks, ", "), other.Name())
	}
	if replica.Together(m, other) == 0 && replica.Together(other, m) == 0 {
		return ownFault(pluginproto.CKROK, op, "%v; and %v: give both firmware and settings with a protocol that they share",
			replica.NoCommonProtocol(other, m), replica.NoCommonProtocol(m, other))
	}
	return nil
}

// lacking names the mechanisms that one token offers and the other, if it says what it
// offers, does not.
func lacking(mine, theirs []pluginproto.Mechanism) (names []string) {
	for _, m := range theirs {
		if mine != nil && !slices.Contains(mine, m) {
			names = append(names, m.String())
		}
	}
	return names
}

// kindOf is the driver without its version: two versions may serve side by side while
// a group is upgraded member by member.
func kindOf(t pluginproto.TokenInfo) string {
	kind, _, _ := strings.Cut(t.Driver, " ")
	return kind
}

// warnOfDifference tells of what an upgrade in progress explains, and nothing else
// does.
func (k *KMS) warnOfDifference(g *keyGroup, m, other group.Member) {
	mine, theirs := m.Token(), other.Token()
	for _, d := range []struct{ what, mine, theirs string }{
		{"firmware", mine.Firmware, theirs.Firmware},
		{"model", mine.Model, theirs.Model},
		{"driver", mine.Driver, theirs.Driver},
	} {
		if d.mine != d.theirs {
			k.warnOf(g, m, fmt.Sprintf("its %s is %s, that of member %s is %s", d.what, d.mine, other.Name(), d.theirs))
		}
	}
	if text := oneWay(m, other); text != "" {
		k.warnOf(g, m, text)
	}
}

func (k *KMS) warnOf(g *keyGroup, m group.Member, text string) {
	state := string(api.MemberSyncing)
	k.events.publish(api.Event{
		Type: api.EventMember, Group: g.name, Member: m.Name(), From: state, To: state, Cause: "warning: " + text,
	})
}

// pin writes down with which token a member is admitted, and what it was added or
// replaced with, in one step. What is known already costs no write.
func (k *KMS) pin(ctx context.Context, g *keyGroup, m group.Member) error {
	s, ok := g.table.get(m.Name())
	if !ok {
		return nil // it is being removed
	}
	config, err := k.resolve(g, s)
	if err != nil {
		return err
	}
	token := pinOf(config, m.Token())
	var spec json.RawMessage
	if s.spec != nil {
		if spec, err = json.Marshal(s.spec); err != nil {
			return fmt.Errorf("describing member %s: %w", s.name, err)
		}
	}
	old, err := k.catalog.Member(ctx, g.name, s.name)
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	if old.Token != nil && reflect.DeepEqual(*old.Token, token) && string(old.Spec) == string(spec) && !old.Removed {
		return nil
	}
	_, err = k.catalog.UpdateMember(ctx, g.name, s.name, func(rec *catalog.Member) error {
		if s.spec != nil && string(rec.Spec) != string(spec) { // it is new: nothing else was said of it yet
			rec.Standby, rec.Drained = nil, false
		}
		rec.Token, rec.Spec, rec.Seen, rec.Removed = &token, spec, s.entry, false
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing down the token of member %s: %w", s.name, err)
	}
	k.log.Info("the member is known by its token from now on", "group", g.name, "member", s.name,
		"serial", token.Serial, "label", token.Label, "model", token.Model)
	return nil
}
