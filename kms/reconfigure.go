package kms

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// seatsOf says who belongs to a group that is about to start, and brings the catalog
// in line with the configuration. A full disk keeps nobody from serving: what cannot be
// written now is decided the same way at the next start.
func (k *KMS) seatsOf(ctx context.Context, cfg GroupConfig) ([]seat, error) {
	r, err := k.rosterOf(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := k.putRoster(ctx, cfg.Name, r); err != nil {
		k.log.Warn("what the configuration has changed about members is still to be written down", "group", cfg.Name, "error", err)
	}
	if len(r.seats) > maxMembers {
		k.log.Error("the group has too many members; those that were added last while kmsd ran are left out",
			"group", cfg.Name, "members", len(r.seats), "at_most", maxMembers)
		r.seats = r.seats[:maxMembers]
	}
	return r.seats, nil
}

func (k *KMS) rosterOf(ctx context.Context, cfg GroupConfig) (roster, error) {
	var known []catalog.Member
	for m, err := range k.catalog.Members(ctx, cfg.Name) {
		if err != nil {
			return roster{}, fmt.Errorf("reading the catalog: %w", err)
		}
		known = append(known, m)
	}
	return merge(cfg.Members, known)
}

// putRoster writes what the entries of the configuration have overruled.
func (k *KMS) putRoster(ctx context.Context, groupName string, r roster) error {
	for _, want := range r.renewed {
		if _, err := k.catalog.UpdateMember(ctx, groupName, want.Name, func(rec *catalog.Member) error {
			want.Rev, want.Token = rec.Rev, rec.Token
			*rec = want
			return nil
		}); err != nil {
			return err
		}
	}
	for _, name := range r.gone {
		if err := k.catalog.ForgetMember(ctx, groupName, name); err != nil {
			return err
		}
	}
	return nil
}

// Reconfigure makes the members of the groups those of another configuration, as far
// as their entries have changed: it takes in who is new, reconnects those that are to be
// connected otherwise, one after the other, and lets go of those that are there no more.
// It goes on serving meanwhile, and waits for each; a context without a deadline gets one
// of 30 seconds. What could not be done, and what else has changed and needs a new Open,
// is returned in words. A configuration with faults changes nothing.
func (k *KMS) Reconfigure(ctx context.Context, groups []GroupConfig) (left []string, err error) {
	const doing = "reconfiguring"
	ctx, cancel := begin(ctx)
	defer cancel()
	cfg, err := Config{
		Catalog: noStore{}, Groups: groups, Insecure: k.connector.insecure, DriverDir: k.connector.driverDir,
	}.checked()
	if err != nil {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("checking the configuration: %v", err), err)
	}
	for _, g := range k.groups {
		if !slices.ContainsFunc(cfg.Groups, func(c GroupConfig) bool { return c.Name == g.name }) {
			left = append(left, fmt.Sprintf("group %s is in the configuration no more: it goes on until a restart", g.name))
		}
	}
	for _, next := range cfg.Groups {
		g := k.byName[next.Name]
		if g == nil {
			left = append(left, fmt.Sprintf("group %s is new: it needs a restart", next.Name))
			continue
		}
		for _, what := range changedSettings(g.cfg, next) {
			left = append(left, fmt.Sprintf("%s of group %s has changed: it needs a restart", what, g.name))
		}
		undone, err := inOrder(ctx, k, g, func(ctx context.Context) ([]string, error) { return k.reseat(ctx, g, next) })
		left = append(left, undone...)
		if err != nil {
			return left, translate(doing, err)
		}
	}
	return left, nil
}

// changedSettings names what differs between two configurations of a group that is
// fixed while it runs. Secrets are functions, and are read anew by themselves.
func changedSettings(old, next GroupConfig) []string {
	var changed []string
	for _, s := range []struct {
		name string
		same bool
	}{
		{"min_copies", old.MinCopies == next.MinCopies},
		{"command_timeout", old.CommandTimeout == next.CommandTimeout},
		{"probe_interval", old.ProbeInterval == next.ProbeInterval},
		{"hedge", old.NoHedge == next.NoHedge},
		{"balance", old.PlainCount == next.PlainCount},
		{"recovery", old.Recovery == next.Recovery},
	} {
		if !s.same {
			changed = append(changed, s.name)
		}
	}
	return changed
}

// reseat brings a group in line with another configuration. Nobody waits for a member
// that is new and away: it is recovered like any other.
func (k *KMS) reseat(ctx context.Context, g *keyGroup, cfg GroupConfig) (left []string, err error) {
	r, err := k.rosterOf(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if len(r.seats) > maxMembers {
		return []string{fmt.Sprintf("group %s would have %d members; at most %d", g.name, len(r.seats), maxMembers)}, nil
	}
	r.gone = slices.DeleteFunc(r.gone, func(name string) bool { // who is there is let go below, if at all
		_, there := g.table.get(name)
		return there
	})
	if err := k.putRoster(ctx, g.name, r); err != nil {
		return nil, err
	}
	g.table.configured(cfg.Members)
	stays := make(map[string]bool, len(r.seats))
	halted := false // somebody did not come back with a new entry
	for _, next := range r.seats {
		stays[next.name] = true
		old, there := g.table.get(next.name)
		switch {
		case !there:
			err = k.enrol(ctx, g, next)
		case halted && connectsOtherwise(old, next):
			err = errors.New("the one before it did not come back, so it was left as it is; mend that one and reload")
		default:
			err = k.reenter(ctx, g, old, next)
			halted = halted || err != nil
		}
		if err != nil {
			left = append(left, fmt.Sprintf("member %s of group %s: %v", next.name, g.name, err))
		}
	}
	for _, s := range g.table.all() {
		if stays[s.name] {
			continue
		}
		s.entry = ""
		if err := k.removeMember(ctx, g, s, false); err != nil {
			left = append(left, fmt.Sprintf("member %s of group %s is in the configuration no more, and stays until a restart: %v", s.name, g.name, err))
		}
	}
	return left, nil
}

// enrol takes in a member that the configuration has now. When it cannot serve yet it
// belongs to the group all the same, as one that is away.
func (k *KMS) enrol(ctx context.Context, g *keyGroup, s seat) error {
	g.table.put(s)
	waiting := s
	waiting.drained = true // it is connected by Resume
	if err := g.Add(ctx, k.memberConfig(g, waiting)); err != nil {
		g.table.remove(s.name)
		return err
	}
	if s.drained {
		return nil
	}
	if err := g.Resume(ctx, s.name); err != nil {
		return fmt.Errorf("it is a member now, and does not serve yet: %w", err)
	}
	return nil
}

// reenter gives a member its new entry. One that is connected otherwise than before
// is connected anew.
func (k *KMS) reenter(ctx context.Context, g *keyGroup, old, next seat) error {
	if connectsOtherwise(old, next) {
		g.table.put(next)
		if err := g.Replace(ctx, k.memberConfig(g, next)); err != nil {
			return fmt.Errorf("it did not come back with its new entry: %w", err)
		}
		return nil
	}
	// Before the seat says so: what is refused now is asked for again by the next reading.
	if err := g.SetStandby(next.name, next.config.Standby, false); err != nil {
		return fmt.Errorf("its role stays what it is, reload when another one serves: %w", err)
	}
	g.table.put(next)
	if old.drained && !next.drained {
		return g.Resume(ctx, next.name)
	}
	return nil
}

// connectsOtherwise reports whether a member's driver is started or opened otherwise
// than before. Another source of its PIN alone is used when it is connected the next
// time.
func connectsOtherwise(old, next seat) bool {
	return !reflect.DeepEqual(old.spec, next.spec) ||
		placeOf(old.config) != placeOf(next.config) || old.config.SHA256 != next.config.SHA256
}

// noStore stands for the catalog where a configuration is only checked.
type noStore struct{ catalog.Store }
