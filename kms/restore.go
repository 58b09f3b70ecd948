package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"kmsd/kms/api"
	"kmsd/kms/backup"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// RestoreReport says what a restore has done.
type RestoreReport struct {
	backup.Contents
	Members []RestoredMember `json:"members"`
}

// RestoredMember says what has come to a member.
type RestoredMember struct {
	Group  string `json:"group"`
	Member string `json:"member"`
	Keys   int    `json:"keys"`            // versions that it holds of those in the backup
	Error  string `json:"error,omitempty"` // why it does not hold all of them
}

// Restore brings the master keys of a backup to the members of a configuration, and its
// records to cfg.Catalog, which must be empty and is whole only when Restore returns
// without an error.
//
// Before it changes anything it reads the backup to its end, and every member proves
// one of its keys. Members that are away are brought in step later, as ever; each group
// needs as many as its MinCopies now. A key that a member holds already is
// left as it is when it is the same, so a restore that was cut short is simply run
// again. Nothing else may use the members or the catalog meanwhile.
func Restore(ctx context.Context, cfg Config, file BackupFile) (RestoreReport, error) {
	store := cfg.Catalog
	cfg, err := siteConfig(cfg)
	if err != nil {
		return RestoreReport{}, err
	}
	found, err := file.survey()
	if err != nil {
		return RestoreReport{}, err
	}
	s, err := openSite(ctx, cfg)
	if err != nil {
		return RestoreReport{}, err
	}
	defer s.close()
	if err := s.ready(ctx, found); err != nil {
		return RestoreReport{}, err
	}
	r := newRestoring(s, store, file, found)
	if err := r.run(ctx); err != nil {
		return RestoreReport{}, translate("restoring a backup", err)
	}
	return r.report(), nil
}

// ready makes sure that there are members enough for a backup, and that each of them can
// take its keys. It changes nothing.
func (s *site) ready(ctx context.Context, found survey) error {
	if err := s.fits(found.contents.Header); err != nil {
		return err
	}
	for _, had := range found.contents.Groups {
		g := s.group(had.Name)
		if n := len(g.tokens); n < g.minCopies {
			return api.NewError(api.CodeInsufficientCopies, fmt.Sprintf(
				"group %s has %d of %d members there and needs %d (min_copies): %s", g.name, n, len(g.members), g.minCopies, g.whyAway()), nil)
		}
		for _, t := range g.tokens {
			if err := t.take(ctx, found.sample[g.name], true); err != nil {
				return translate("proving a key of the backup, before anything was changed", err)
			}
		}
	}
	return nil
}

// restoring is a restore under way.
type restoring struct {
	site  *site
	store catalog.Store
	file  BackupFile
	found survey
	meter *meter
	lines []*lineup
	batch []catalog.Record // to be written next

	keys  []catalog.Key // which are written when it is known who holds them
	tombs []catalog.Tombstone

	mu   sync.Mutex          // guards took and what lines count
	took map[string][]string // :: identity → members that hold it
}

// lineup is the keys that wait for one member.
type lineup struct {
	group string
	token *token
	blobs chan backup.Blob

	keys   int   // taken
	inARow int   // refused since one was taken
	err    error // the first that was refused, or why the member is lost
	lost   bool
}

// enoughRefused is after how many refusals in a row a member is not asked any more: its
// token is full, perhaps.
const enoughRefused = 16

func newRestoring(s *site, store catalog.Store, file BackupFile, found survey) *restoring {
	r := &restoring{site: s, store: store, file: file, found: found, took: make(map[string][]string, found.contents.Versions)}
	total := 0
	perGroup := map[string]int{} // :: group → living versions
	for _, group := range found.groupOf {
		perGroup[group]++
	}
	for _, had := range found.contents.Groups {
		for _, t := range s.group(had.Name).tokens {
			r.lines = append(r.lines, &lineup{group: had.Name, token: t, blobs: make(chan backup.Blob, atOnce)})
			total += perGroup[had.Name]
		}
	}
	r.meter = file.meter(total)
	return r
}

// run reads the backup once more. Records that do not depend on who holds what are
// written as they come; keys go to the members meanwhile.
func (r *restoring) run(ctx context.Context) error {
	tasks, taskCtx := errgroup.WithContext(ctx)
	for _, l := range r.lines {
		for range atOnce {
			tasks.Go(func() error { return r.serve(taskCtx, l) })
		}
	}
	tasks.Go(func() error {
		defer func() {
			for _, l := range r.lines {
				close(l.blobs)
			}
		}()
		return r.file.each(func(v any) error { return r.read(taskCtx, v) })
	})
	if err := tasks.Wait(); err != nil {
		return err
	}
	if err := r.enough(); err != nil {
		return err
	}
	return r.writeKeys(ctx)
}

// read takes the next thing out of the backup.
func (r *restoring) read(ctx context.Context, v any) error {
	switch v := v.(type) {
	case catalog.Key:
		r.keys = append(r.keys, v)
		return ctx.Err()
	case catalog.Tombstone:
		r.tombs = append(r.tombs, v)
		return ctx.Err()
	case backup.Blob:
		for _, l := range r.lines {
			if l.group != r.found.groupOf[v.Identity] {
				continue
			}
			select {
			case l.blobs <- v:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	default:
		return r.write(ctx, v)
	}
}

// serve has a member take the keys that wait for it.
func (r *restoring) serve(ctx context.Context, l *lineup) error {
	for b := range l.blobs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !r.tries(l) {
			continue
		}
		err := l.token.take(ctx, b, false)
		if err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		r.note(l, b.Identity, err)
		r.meter.step()
	}
	return nil
}

func (r *restoring) tries(l *lineup) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !l.lost
}

func (r *restoring) note(l *lineup, identity string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.took[identity] = append(r.took[identity], l.token.name)
		l.keys++
		l.inARow = 0
		return
	}
	l.inARow++
	if l.err == nil {
		l.err = err
	}
	if pluginproto.ClassOf(err) == pluginproto.ClassMember || l.inARow >= enoughRefused {
		l.lost = true
	}
}

// enough makes sure that every version is held by as many members as its group wants.
func (r *restoring) enough() error {
	for _, k := range r.keys {
		for _, v := range k.Versions {
			if !living(v) {
				continue
			}
			want, has := r.site.group(k.Group).minCopies, len(r.took[v.Identity])
			if has >= want {
				continue
			}
			var causes []error
			for _, l := range r.lines {
				if l.group == k.Group && l.err != nil {
					causes = append(causes, l.err)
				}
			}
			cause := errors.Join(causes...)
			e := api.NewError(api.CodeInsufficientCopies, fmt.Sprintf("restoring a backup: version %d of key %s came to %d members, and %d are needed (min_copies): %v",
				v.Number, k.Name, has, want, cause), cause)
			e.Hint = "mend that and restore again: the keys that have come to a token stay there, and no catalog was written"
			return e
		}
	}
	return nil
}

// writeKeys writes who holds which key, and that every member may hold what is
// destroyed: nobody knows what the tokens have seen.
func (r *restoring) writeKeys(ctx context.Context) error {
	for _, k := range r.keys {
		for i := range k.Versions {
			v := &k.Versions[i]
			v.Copies = append([]string{}, r.took[v.Identity]...)
			slices.Sort(v.Copies)
		}
		if err := r.write(ctx, k); err != nil {
			return err
		}
	}
	for _, t := range r.tombs {
		t.Pending = nil
		if g := r.site.group(t.Group); g != nil {
			t.Pending = g.members
		}
		if err := r.write(ctx, t); err != nil {
			return err
		}
	}
	return r.flush(ctx)
}

// write writes a record, together with others.
func (r *restoring) write(ctx context.Context, v any) error {
	rec, err := catalog.Encode(v)
	if err != nil {
		return err
	}
	if r.batch = append(r.batch, rec); len(r.batch) < catalog.BatchSize {
		return nil
	}
	return r.flush(ctx)
}

func (r *restoring) flush(ctx context.Context) error {
	if len(r.batch) == 0 {
		return ctx.Err()
	}
	_, err := r.store.Apply(ctx, r.batch...)
	r.batch = r.batch[:0]
	if err != nil {
		return fmt.Errorf("writing the catalog: %w", err)
	}
	return nil
}

func (r *restoring) report() RestoreReport {
	out := RestoreReport{Contents: r.found.contents, Members: []RestoredMember{}}
	for _, l := range r.lines {
		m := RestoredMember{Group: l.group, Member: l.token.name, Keys: l.keys}
		if l.err != nil {
			m.Error = l.err.Error()
		}
		out.Members = append(out.Members, m)
	}
	for _, g := range r.site.groups {
		for _, f := range g.away {
			out.Members = append(out.Members, RestoredMember{Group: g.name, Member: f.member, Error: f.err.Error()})
		}
	}
	return out
}
