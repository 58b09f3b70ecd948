package kms

import (
	"context"
	"maps"
	"slices"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// forgetMember takes a member out of the copies of every version and out of what is
// still to be destroyed there: its token is not the group's any more, or is another
// one. It may be called again after a crash; what is done already costs no write. When
// the token comes back after all, it is compared with the catalog as any other, and
// tombstones outlive their settling.
func (k *KMS) forgetMember(ctx context.Context, g *keyGroup, name string) error {
	if err := k.forgetCopies(ctx, g, name); err != nil {
		return err
	}
	pending, err := k.pendingOn(ctx, g)
	if err != nil || len(pending[name]) == 0 {
		return err
	}
	return k.catalog.Settle(ctx, []string{name}, pending[name]...)
}

// forgetCopies takes a member out of the copies of every version.
func (k *KMS) forgetCopies(ctx context.Context, g *keyGroup, name string) error {
	moves := make(map[string][]move)
	k.ring.inGroup(g.name, func(key *key) bool {
		for _, v := range key.rec.Versions {
			if slices.Contains(v.Copies, name) {
				moves[key.rec.Name] = append(moves[key.rec.Name], move{v.Number, name, false})
			}
		}
		return true
	})
	g.forget(name)
	return k.noteCopies(ctx, moves)
}

// pendingOn returns which identities are still to be destroyed where. :: member →
// identities
func (k *KMS) pendingOn(ctx context.Context, g *keyGroup) (map[string][]string, error) {
	pending := make(map[string][]string)
	for t, err := range k.catalog.Tombstones(ctx) {
		if err != nil {
			return nil, err
		}
		if t.Group != g.name || t.IsCanary() {
			continue // without its tombstone a canary would be a stranger on a token that is added again
		}
		for _, m := range t.Pending {
			pending[m] = append(pending[m], t.Identity)
		}
	}
	return pending, nil
}

// forgetStrangers forgets all who are mentioned and are no members, such as one that
// was taken out of the configuration, or whose removal a crash has interrupted.
func (k *KMS) forgetStrangers(ctx context.Context, g *keyGroup) error {
	named, err := k.pendingOn(ctx, g)
	if err != nil {
		return err
	}
	k.ring.inGroup(g.name, func(key *key) bool {
		for _, v := range key.rec.Versions {
			for _, m := range v.Copies {
				named[m] = nil
			}
		}
		return true
	})
	for _, name := range slices.Sorted(maps.Keys(named)) {
		if _, member := g.table.get(name); member {
			continue
		}
		if err := k.forgetMember(ctx, g, name); err != nil {
			return err
		}
		k.log.Info("forgot what a former member held", "group", g.name, "member", name)
	}
	return nil
}

// soleCopies returns the keys of which a member holds some living version, and no other
// member that is there is known to. One that is away may never come back with its copy.
func (k *KMS) soleCopies(g *keyGroup, member string) []string {
	others := make(map[string]bool)
	for _, m := range g.Status().Members {
		_, stays := g.table.get(m.Name)
		others[m.Name] = stays && m.Name != member && (serves(m.State) || m.State == api.MemberDraining)
	}
	var names []string
	k.ring.inGroup(g.name, func(key *key) bool {
		if slices.ContainsFunc(key.rec.Versions, func(v catalog.Version) bool {
			return living(v) && slices.Contains(v.Copies, member) &&
				!slices.ContainsFunc(v.Copies, func(m string) bool { return others[m] })
		}) {
			names = append(names, key.rec.Name)
		}
		return true
	})
	slices.Sort(names)
	return names
}
