package kms

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

const (
	// rekeyPage is how many records a job reads, rewraps and writes together.
	rekeyPage = catalog.BatchSize - 1
	// rekeyAhead is how many pages are on their way to or from the HSMs while one is
	// written.
	rekeyAhead = 3
)

// rewrap is one version of a data key in the hands of a job.
type rewrap struct {
	key   catalog.DataKey    // for a newest version
	old   catalog.OldVersion // for any other
	isOld bool
	done  bool  // it has a new envelope
	err   error // why it cannot be rewrapped; it stays as it is
}

// version is the part of the record that changes.
func (w *rewrap) version() *catalog.DataVersion {
	if w.isOld {
		return &w.old.DataVersion
	}
	return &w.key.DataVersion
}

// name is the data key's ID.
func (w *rewrap) name() string {
	if w.isOld {
		return w.old.ID
	}
	return w.key.ID
}

// page is some records that follow each other.
type page struct {
	records []rewrap
	last    bool // of its half of the walk
	master  *key // that it is rewrapped under

	work sync.WaitGroup // the commands for it
	mu   sync.Mutex     // guards err
	err  error          // why it could not be read or rewrapped
}

func (p *page) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// wait returns when the page is rewrapped, or why it is not.
func (p *page) wait() error {
	p.work.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// walk goes through one half of the records from where the job is to the end: the newest
// versions, or the others. While one page is written the next ones are read and
// rewrapped, a few at a time, so that memory does not grow with the database.
func (r *rekey) walk(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	pages := make(chan *page, rekeyAhead)
	go r.read(ctx, pages)
	defer func() {
		stop()
		for p := range pages { // until the reader has ended, and what it has begun
			p.work.Wait()
		}
	}()
	for p := range pages {
		err := p.wait()
		if err == nil {
			err = r.commit(ctx, p)
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// read reads page after page and begins to rewrap each, until the end or the first that
// cannot be read. Then it closes pages.
func (r *rekey) read(ctx context.Context, pages chan<- *page) {
	defer close(pages)
	rec := r.record()
	after := catalog.OldVersion{ID: string(rec.After), DataVersion: catalog.DataVersion{Number: rec.AfterNumber}}
	for more := true; more; {
		records, err := r.readPage(ctx, rec, after)
		p := &page{records: records, err: err, last: len(records) < rekeyPage}
		more = err == nil && !p.last
		if n := len(p.records); n > 0 {
			w := &p.records[n-1]
			after.ID, after.Number = w.name(), w.version().Number
		}
		if err == nil {
			r.rewrap(ctx, p)
		}
		pages <- p // walk takes all of them, whatever happens
	}
}

func (r *rekey) readPage(ctx context.Context, rec catalog.Job, after catalog.OldVersion) ([]rewrap, error) {
	records := make([]rewrap, 0, rekeyPage)
	if !rec.Old {
		for dk, err := range r.kms.catalog.DataKeys(ctx, rec.Database, "", after.ID, rekeyPage) {
			if err != nil {
				return nil, err
			}
			records = append(records, rewrap{key: dk})
		}
		return records, nil
	}
	for old, err := range r.kms.catalog.OldVersions(ctx, rec.Database, after, rekeyPage) {
		if err != nil {
			return nil, err
		}
		records = append(records, rewrap{old: old, isOld: true})
	}
	return records, nil
}

// commit writes a page with how far the job is then. When a record was put meanwhile, or
// the master key has changed, all of the page is read and rewrapped again.
func (r *rekey) commit(ctx context.Context, p *page) error {
	for {
		rec, batch := behind(r.record(), p)
		written, err := r.kms.catalog.Advance(ctx, p.master.rec, rec, batch)
		switch {
		case err == nil:
			r.advanced(written)
			return nil
		case !errors.Is(err, catalog.ErrConflict):
			r.unsure = true
			return err
		}
		if stored, err := r.kms.catalog.Job(ctx, r.id); err != nil {
			return err
		} else if stored.Rev != rec.Rev {
			r.unsure = true
			return fmt.Errorf("job %s was changed by somebody else: %w", r.id, catalog.ErrConflict)
		}
		if err := r.again(ctx, p); err != nil {
			return err
		}
	}
}

// behind returns the job as it is when a page is written, and what of the page is to be
// written.
func behind(rec catalog.Job, p *page) (catalog.Job, catalog.Rewrapped) {
	var batch catalog.Rewrapped
	for i := range p.records {
		w := &p.records[i]
		switch {
		case w.err != nil:
			rec.Failed++
			if len(rec.Failures) < catalog.MaxFailures {
				rec.Failures = append(rec.Failures[:len(rec.Failures):len(rec.Failures)],
					catalog.Failure{Key: []byte(w.name()), Version: w.version().Number, Error: w.err.Error()})
			}
		case !w.done:
			rec.Skipped++
		case w.isOld:
			rec.Done++
			batch.Old = append(batch.Old, w.old)
		default:
			rec.Done++
			batch.Keys = append(batch.Keys, w.key)
		}
		rec.After, rec.AfterNumber = []byte(w.name()), 0
		if w.isOld {
			rec.AfterNumber = w.version().Number
		}
	}
	if p.last && !rec.Old {
		rec.Old, rec.After, rec.AfterNumber = true, nil, 0
	}
	return rec, batch
}

// again reads the records of a page one by one, since others may have come between them,
// and rewraps them anew.
func (r *rekey) again(ctx context.Context, p *page) error {
	if _, err := r.kms.refresh(ctx, r.record().Key); err != nil {
		return err
	}
	for i := range p.records {
		w := &p.records[i]
		var err error
		next := rewrap{isOld: w.isOld}
		if w.isOld {
			next.old, err = r.kms.catalog.OldVersion(ctx, w.old.Database, w.old.ID, w.old.Number)
		} else {
			next.key, err = r.kms.catalog.DataKey(ctx, w.key.Database, w.key.ID)
		}
		if err != nil {
			return err
		}
		*w = next
	}
	r.rewrap(ctx, p)
	return p.wait()
}

// target returns the master key as it is now, if the job can go on under it.
func (r *rekey) target() (*key, error) {
	rec := r.record()
	master, err := r.kms.masterNamed(rec.Database, rec.Key)
	if err != nil {
		return nil, err
	}
	i := master.index(rec.Version)
	switch {
	case i < 0:
		return nil, errRekeyEnds{fmt.Sprintf("key %s has no version %d", rec.Key, rec.Version)}
	case master.usable(i) != nil:
		return nil, errRekeyEnds{fmt.Sprintf("%v; enable it or rekey the database again", master.usable(i))}
	}
	return master, nil
}

// stays reports whether an error is about one record, which stays as it is, and not about
// the HSMs or the catalog, for which a job waits.
func stays(err error) bool {
	switch api.AsError(err).Code {
	case api.CodeCorrupt, api.CodeWrongKey, api.CodeState, api.CodeBadRequest, api.CodeTooLarge:
		return true
	default:
		return false
	}
}
