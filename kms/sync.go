package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// Sync compares every member in step with the catalog and mends what differs, as at
// a recovery, while the members go on serving. Without a deadline it takes as long as
// its keys need. A member that could not be asked has an Error in the report.
func (k *KMS) Sync(ctx context.Context, groupName string, opts api.SyncOptions) (api.SyncReport, error) {
	g, err := k.group(groupName)
	if err != nil {
		return api.SyncReport{}, err
	}
	report := api.SyncReport{Group: g.name}
	outcome, found := g.readmit(ctx)
	var refused map[pluginproto.KeyID]string
	if opts.Adopt && ctx.Err() == nil {
		report.Adopted, refused, err = k.adopt(ctx, g, found)
		if err != nil {
			return report, translate("adopting unknown keys", err)
		}
		if len(report.Adopted) > 0 { // they are no longer unknown, and labelled as ours are
			again, more := g.readmit(ctx)
			outcome = again
			for member, r := range found {
				found[member] = both(r, more[member])
			}
		}
	}
	if err := over(ctx); err != nil {
		return report, translate("synchronizing group "+g.name, err)
	}
	for _, m := range k.groupStatus(g).Members {
		ms := api.MemberSync{Member: m.Name, Held: m.Keys}
		why, asked := outcome[m.Name]
		switch r, ok := found[m.Name]; {
		case !asked:
			ms.Error = fmt.Sprintf("it is %s, and compared when it comes back", m.State)
			if m.Reason != "" {
				ms.Error = fmt.Sprintf("it is %s, and compared when it comes back: %s", m.State, m.Reason)
			}
		case why != nil:
			ms.Error = why.Error()
		case ok:
			describe(&ms, r, refused)
		}
		report.Members = append(report.Members, ms)
	}
	return report, nil
}

// over returns why ctx has ended, also in the moment in which a part of the work has
// noticed its deadline, and ctx has not.
func over(ctx context.Context) error {
	if t, ok := ctx.Deadline(); ok && !time.Now().Before(t) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// isEnd reports whether an error says that ctx has ended. What is tried with one member has
// a deadline of its own, too, and then the member has failed.
func isEnd(ctx context.Context, err error) bool {
	return over(ctx) != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled))
}

// readmit has every member in step compared anew. It returns how that ended for each,
// and what was found on those where it ended well.
func (g *keyGroup) readmit(ctx context.Context) (outcome map[string]error, found map[string]replica.Report) {
	outcome = g.OnEach(ctx, nil, func(ctx context.Context, m group.Member) error {
		return g.Readmit(ctx, m.Name())
	})
	found = make(map[string]replica.Report, len(outcome))
	for member, err := range outcome {
		if r, ok := g.admission.Found(member); ok && err == nil {
			found[member] = r
		}
	}
	return outcome, found
}

// both is what two looks at a member have done to it, with what the first has found.
func both(first, second replica.Report) replica.Report {
	first.Cloned += second.Cloned
	first.Changed += second.Changed
	first.Destroyed = append(slices.Clone(first.Destroyed), second.Destroyed...)
	first.Missing, first.Refused, first.Quarantined = second.Missing, second.Refused, second.Quarantined
	return first
}

// describe says to a user what was found on a member and done to it.
func describe(ms *api.MemberSync, r replica.Report, refused map[pluginproto.KeyID]string) {
	ms.Cloned, ms.Changed, ms.Destroyed, ms.Missing = r.Cloned, r.Changed, len(r.Destroyed), len(r.Missing)
	for _, w := range r.Quarantined {
		ms.Quarantined = append(ms.Quarantined, w.Copy.String())
	}
	for _, o := range r.Foreign {
		ms.Foreign = append(ms.Foreign, api.Object{
			Identity: o.ID.String(), Label: o.Label, Type: string(o.Type),
			CheckValue: fmt.Sprintf("%x", o.CheckValue), Refused: refused[o.ID],
		})
	}
	slices.SortFunc(ms.Foreign, func(a, b api.Object) int {
		return slices.Compare([]string{a.Label, a.Identity}, []string{b.Label, b.Identity})
	})
	if len(r.Refused) > 0 {
		ms.Error = fmt.Sprintf("%d things could not be done, first: %v", len(r.Refused), r.Refused[0].Err)
	}
}

// Reinitialize makes an attempt now to bring back every member that is away, also
// those that recovery has given up or that are failed. That no member came back is no
// error; the group says why.
func (k *KMS) Reinitialize(ctx context.Context, groupName string) (api.Group, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	g, err := k.group(groupName)
	if err != nil {
		return api.Group{}, err
	}
	for member, err := range g.Group.Reinitialize(ctx) {
		k.log.Info("tried to bring back a member at the operator's request", "group", g.name, "member", member, "error", err)
	}
	if err := ctx.Err(); err != nil {
		return api.Group{}, translate("reinitializing group "+g.name, err)
	}
	return k.groupStatus(g), nil
}
