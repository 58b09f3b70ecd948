package kms

import (
	"context"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// minFresh is the shortest time for which a round trip proves that a member works:
// two probes at the default interval, and some slack.
const minFresh = 5 * time.Second

// keyGroup is one group of HSMs with all that this package knows about it. Its
// fields do not change after Open.
type keyGroup struct {
	*group.Group
	name      string
	cfg       GroupConfig // but for its members, which are in table
	table     *table
	admission *replica.Admission
	janitor   *janitor
	making    making
	order     chan struct{} // holds one token while somebody changes who belongs to the group
	fresh     time.Duration // for how long a trip proves that a member works
}

// newGroup makes a group that does nothing yet.
func (k *KMS) newGroup(cfg GroupConfig, seats []seat) (*keyGroup, error) {
	log := k.log.With("group", cfg.Name)
	g := &keyGroup{
		name: cfg.Name, cfg: cfg, table: newTable(cfg.Members, seats), fresh: max(minFresh, 3*cfg.ProbeInterval),
		order: make(chan struct{}, 1),
	}
	members := make([]group.MemberConfig, len(seats))
	for i, s := range seats {
		members[i] = k.memberConfig(g, s)
	}
	g.admission = replica.NewAdmission(replica.Config{
		Book:     &book{kms: k, g: g},
		InStep:   func() []replica.Token { return tokens(g.InStep()) },
		Members:  func() int { return len(g.Names()) },
		Distrust: func(member string, why error) { g.Distrust(member, why) },
		Bar:      func(member string, ids []pluginproto.KeyID) { g.Bar(member, ids) },
		Gone:     k.ring.gone,
		Logger:   log,
		Events: func(e api.Event) {
			e.Group = cfg.Name
			k.events.publish(e)
		},
	})
	g.janitor = newJanitor(k, g, log)
	var err error
	g.Group, err = group.New(group.Config{
		Name: cfg.Name, MinCopies: cfg.MinCopies,
		CommandTimeout: cfg.CommandTimeout, ProbeInterval: cfg.ProbeInterval, Hedge: !cfg.NoHedge, PlainCount: cfg.PlainCount,
		Recovery: group.Recovery{Manual: cfg.Recovery.Manual, Interval: cfg.Recovery.Interval, Retries: cfg.Recovery.Retries},
		Members:  members,
		Admit: func(ctx context.Context, m group.Member, last bool) (group.Admission, error) {
			return k.admit(ctx, g, m, last)
		},
		Logger:  k.log,
		OnEvent: func(e api.Event) { k.onGroupEvent(g, e) },
	})
	return g, err
}

// minCopies is how many members must hold a new key of which nobody has said it.
func (g *keyGroup) minCopies() int {
	if g.cfg.MinCopies > 0 {
		return g.cfg.MinCopies
	}
	return min(2, max(1, len(g.Names())))
}

// admit has a member brought in step, and bars the copies of it that are other keys.
func (g *keyGroup) admit(ctx context.Context, m group.Member, last bool) (group.Admission, error) {
	report, err := g.admission.Admit(ctx, m, last)
	var found group.Admission
	for _, w := range report.Quarantined {
		found.Barred = append(found.Barred, w.ID)
	}
	return found, err
}

// ended says that a version is made, or given up: then the janitor looks once more at what it
// may have found at work.
func (g *keyGroup) ended(identity string, err error) {
	g.making.ended(identity)
	if err != nil {
		g.janitor.wake()
	}
}

// forget drops what is known of a member that has left, or is another HSM now.
func (g *keyGroup) forget(member string) {
	g.admission.Forget(member)
	g.janitor.forget(member)
}

// onGroupEvent passes an event on. What a member's move means for those that wait
// for a source, or for copies that are missing, is found out there.
func (k *KMS) onGroupEvent(g *keyGroup, e api.Event) {
	if e.Type == "member" {
		switch api.MemberState(e.To) {
		case api.MemberActive, api.MemberStandby:
			g.admission.Moved(e.Member)
			g.janitor.moved(e.Member)
			k.rekeys.wake()
		case api.MemberDown, api.MemberFailed, api.MemberDraining:
			g.admission.Moved(e.Member)
		}
	}
	k.events.publish(e)
}

// destroyCopies destroys identities on every member in step and settles their
// tombstones for those that say so. The others remain pending, to be settled when
// they are admitted. The caller has the lease, and the tombstones are written.
func (k *KMS) destroyCopies(ctx context.Context, g *keyGroup, ids []pluginproto.KeyID) error {
	results := g.OnEach(ctx, nil, func(ctx context.Context, m group.Member) error {
		for _, id := range ids {
			if err := m.Destroy(ctx, id); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
				return err
			}
		}
		return nil
	})
	var done []string
	var failed error
	for member, err := range results {
		if err == nil {
			done = append(done, member)
		} else if failed == nil {
			failed = err
		}
	}
	if len(done) > 0 {
		slices.Sort(done)
		if err := k.catalog.Settle(ctx, done, identities(ids)...); err != nil {
			return err
		}
	}
	return failed
}

func identities(ids []pluginproto.KeyID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = id.String()
	}
	return out
}

func tokens(members []group.Member) []replica.Token {
	out := make([]replica.Token, len(members))
	for i, m := range members {
		out[i] = m
	}
	return out
}

func names(members []group.Member) []string {
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = m.Name()
	}
	return out
}
