package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
)

// factsPatience is how long a check waits for what members have to say of their tokens.
const factsPatience = 2 * time.Second

// Check asks every member whether it still fits the group, and changes nothing: what
// is known of it is in memory, and a canary key is cloned to each member in step and
// from each, and destroyed again.
func (k *KMS) Check(ctx context.Context, groupName string) (api.GroupCheck, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	g, err := k.group(groupName)
	if err != nil {
		return api.GroupCheck{}, err
	}
	k.askFacts(ctx, g)
	status := k.groupStatus(g)
	all := slices.Concat(
		stateFindings(status), tokenFindings(status), factFindings(status), protocolFindings(g.InStep()), holdingFindings(status),
		k.copyFindings(g), k.cloneFindings(ctx, g))
	if err := ctx.Err(); err != nil { // not everybody was asked
		return api.GroupCheck{}, translate("checking group "+g.name, err)
	}
	fault := func(f api.Finding) bool { return f.Fault }
	return api.GroupCheck{Group: g.name, OK: !slices.ContainsFunc(all, fault), Findings: all}, nil
}

// askFacts has the status say what members know of their tokens now. It takes little of its
// caller's time: what one that hangs has said before is known.
func (k *KMS) askFacts(ctx context.Context, g *keyGroup) {
	ctx, cancel := context.WithTimeout(ctx, factsPatience)
	defer cancel()
	g.AskFacts(ctx)
}

func faultOf(member, format string, args ...any) api.Finding {
	return api.Finding{Member: member, Fault: true, Message: fmt.Sprintf(format, args...)}
}

func warningOf(member, format string, args ...any) api.Finding {
	return api.Finding{Member: member, Message: fmt.Sprintf(format, args...)}
}

// stateFindings says who does not serve, why, and what to do.
func stateFindings(s api.Group) []api.Finding {
	all := []api.Finding{}
	if s.State == api.GroupLost {
		all = append(all, faultOf("", "no member of the group serves"))
	}
	for _, m := range s.Members {
		why := fmt.Sprintf("is %s since %s", m.State, m.Since.UTC().Format(time.RFC3339))
		if m.Reason != "" {
			why += ": " + m.Reason
		}
		switch {
		case serves(m.State):
		case strings.HasPrefix(m.CKR, "CKR_PIN_"):
			all = append(all, faultOf(m.Name, "%s (%s): give it the right PIN, which is tried as soon as it is another one", why, m.CKR))
		case m.State == api.MemberDraining, m.State == api.MemberSyncing:
			all = append(all, warningOf(m.Name, "%s", why))
		case strings.Contains(m.Reason, "CKR_"): // what the library has said says more
			all = append(all, faultOf(m.Name, "%s", why))
		default:
			all = append(all, faultOf(m.Name, "%s (%s)", why, m.CKR))
		}
	}
	return all
}

// tokenFindings compares the members' tokens with that of the first one in step.
func tokenFindings(s api.Group) (all []api.Finding) {
	first := slices.IndexFunc(s.Members, func(m api.Member) bool { return serves(m.State) })
	if first < 0 {
		return nil
	}
	model := s.Members[first]
	for i, m := range s.Members {
		for _, other := range s.Members[:i] {
			if m.Token.Serial != "" && m.Token.Serial == other.Token.Serial && m.Token.Label == other.Token.Label {
				all = append(all, faultOf(m.Name, "has the token of member %s (label %q, serial %s): its copies count for nothing", other.Name, m.Token.Label, m.Token.Serial))
			}
		}
		if i == first || m.Token.Serial == "" && m.Token.Label == "" {
			continue
		}
		for _, d := range []struct{ what, is, want string }{
			{"driver", m.Driver, model.Driver},
			{"manufacturer", m.Token.Manufacturer, model.Token.Manufacturer},
			{"model", m.Token.Model, model.Token.Model},
			{"firmware", m.Token.Firmware, model.Token.Firmware},
		} {
			if d.is != d.want {
				all = append(all, warningOf(m.Name, "its %s is %q, that of member %s is %q", d.what, d.is, model.Name, d.want))
			}
		}
	}
	return all
}

// factFindings says what members warn of.
func factFindings(s api.Group) (all []api.Finding) {
	for _, m := range s.Members {
		for _, f := range m.Token.Facts {
			if f.Warning {
				all = append(all, warningOf(m.Name, "%s: %s", f.Name, f.Value))
			}
		}
	}
	return all
}

// holdingFindings says what members in step lack, and hold besides.
func holdingFindings(s api.Group) (all []api.Finding) {
	for _, m := range s.Members {
		if m.Missing > 0 && serves(m.State) {
			all = append(all, warningOf(m.Name, "lacks %d of %d key versions; they are brought over as soon as that can be: kmsd group sync does it now, or says what is in the way", m.Missing, s.Keys))
		}
		if m.Quarantined > 0 {
			all = append(all, faultOf(m.Name, "holds %d keys with another value than the catalog says, which are never used: verify your keys to see which, remove the wrong objects, then synchronize the group", m.Quarantined))
		}
		if m.Foreign > 0 {
			all = append(all, warningOf(m.Name, "holds %d keys that nobody here knows; synchronizing the group names them, and can adopt them", m.Foreign))
		}
	}
	return all
}

// copyFindings says which key versions are on fewer members than they should be.
func (k *KMS) copyFindings(g *keyGroup) (all []api.Finding) {
	members, inStep := g.Names(), names(g.InStep())
	var unusable, few, single []string
	k.ring.inGroup(g.name, func(key *key) bool {
		for _, v := range key.rec.Versions {
			if !living(v) {
				continue
			}
			holders := common(v.Copies, members)
			text := fmt.Sprintf("%s version %d (on %s)", key.rec.Name, v.Number, list(holders))
			if len(inStep) > 0 && len(common(holders, inStep)) == 0 {
				unusable = append(unusable, text)
			}
			switch {
			case len(holders) < key.rec.MinCopies:
				few = append(few, text)
			case len(holders) == 1 && len(members) > 1:
				single = append(single, text)
			}
		}
		return true
	})
	if unusable != nil {
		all = append(all, faultOf("", "%d key versions are on no member in step and cannot be used: %s", len(unusable), some(unusable)))
	}
	if few != nil {
		all = append(all, faultOf("", "%d key versions have fewer copies than their min_copies: %s", len(few), some(few)))
	}
	if single != nil {
		all = append(all, warningOf("", "%d key versions have one copy only: %s", len(single), some(single)))
	}
	return all
}

// cloneFindings sends canary keys. It takes at most three quarters of its caller's
// time, so that what else was found is not lost.
func (k *KMS) cloneFindings(ctx context.Context, g *keyGroup) []api.Finding {
	if t, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(t)*3/4)
		defer cancel()
	}
	all, err := detached(ctx, k, func(ctx context.Context) ([]api.Finding, error) {
		release, err := g.Lease(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
		return k.exchangeCanaries(ctx, g), nil
	})
	if err != nil {
		return []api.Finding{warningOf("", "whether keys can be cloned is not known: %v", err)}
	}
	return all
}

// exchangeCanaries has every member in step take a canary key from the one before it,
// so that each is asked for both. Where no protocol leads from one to the next, it is the
// nearest before it from which one does.
func (k *KMS) exchangeCanaries(ctx context.Context, g *keyGroup) (all []api.Finding) {
	members := g.InStep()
	if len(members) < 2 {
		return []api.Finding{warningOf("", "%d members are in step, so no key can be cloned", len(members))}
	}
	all = make([]api.Finding, 2*len(members)) // by index in members: of each one, and of the source that it had
	results := g.OnEach(ctx, names(members), func(ctx context.Context, to group.Member) error {
		at := slices.Index(names(members), to.Name())
		from := giverBefore(members, at)
		if from == nil {
			return nil // which is a finding already
		}
		err := k.sendCanary(ctx, g, from, to)
		if source, ok := errors.AsType[*replica.SourceError](err); ok {
			all[2*at+1] = faultOf(source.Member, "could not supply a key to member %s: %v", to.Name(), source.Err)
			return k.proveClone(ctx, g, to)
		}
		return refusedCanary(from, to, err)
	})
	for i, m := range members {
		if err := results[m.Name()]; err != nil {
			all[2*i] = faultOf(m.Name(), "%v", err)
		}
	}
	return slices.DeleteFunc(all, func(f api.Finding) bool { return f == api.Finding{} })
}

// common returns what is in both lists, in the order of the first.
func common(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return !slices.Contains(b, s) })
}

func list(members []string) string {
	if len(members) == 0 {
		return "no member"
	}
	return strings.Join(members, ", ")
}

// some shows the first few of a list.
func some(all []string) string {
	const shown = 5
	slices.Sort(all)
	if more := len(all) - shown; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:shown], "; "), more)
	}
	return strings.Join(all, "; ")
}
