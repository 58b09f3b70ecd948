package kms

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

const (
	// rekeyPause is the first pause of a job that cannot go on; it doubles up to
	// rekeyPauseMax. A member that comes back ends it.
	rekeyPause    = 100 * time.Millisecond
	rekeyPauseMax = 5 * time.Second
	// rekeyTell is the shortest time between two events that tell how far a job is.
	rekeyTell = time.Second
)

// rekey is a job that runs. One goroutine owns it.
type rekey struct {
	kms  *KMS
	id   string
	call chan struct{} // holds one token while a member has come back

	// Of the one goroutine:
	unsure bool      // what was last written may be in the catalog or not
	told   time.Time // when an event last told how far it is

	mu     sync.Mutex  // guards what follows
	rec    catalog.Job // as it is in the catalog, as far as is known
	reason string      // what it waits for; "" while it works
	since  time.Time   // when it last began to work
	had    int         // how far it was then
}

func newRekey(k *KMS, rec catalog.Job) *rekey {
	return &rekey{kms: k, id: rec.ID, rec: rec, call: make(chan struct{}, 1), since: time.Now(), had: walked(rec)}
}

// walked is how many records a job has looked at.
func walked(rec catalog.Job) int { return rec.Done + rec.Skipped + rec.Failed }

// errRekeyEnds is why a job cannot go on, ever.
type errRekeyEnds struct{ reason string }

func (e errRekeyEnds) Error() string { return e.reason }

// run works until the job has ended or ctx does.
func (r *rekey) run(ctx context.Context) {
	rec := r.record()
	r.kms.log.Info("rekey begins", "database", rec.Database, "key", rec.Key, "version", rec.Version, "job", rec.ID,
		"total", rec.Total, "done_before", walked(rec))
	r.tell(api.JobRunning, "")
	for pauses := 0; ; {
		before := walked(r.record())
		err := r.work(ctx)
		if ctx.Err() != nil {
			return // the next Open goes on with it
		}
		if ends, ok := errors.AsType[errRekeyEnds](err); ok {
			err = r.end(ctx, catalog.JobFailed, ends.reason)
		}
		if err == nil {
			return
		}
		if walked(r.record()) != before {
			pauses = 0
		}
		if !r.wait(ctx, err, min(rekeyPause<<min(pauses, 8), rekeyPauseMax)) {
			return
		}
		pauses++
	}
}

// work does all that is left. Nil means that the job has ended.
func (r *rekey) work(ctx context.Context) error {
	if r.unsure {
		rec, err := r.kms.catalog.Job(ctx, r.id)
		if err != nil {
			return err
		}
		if rec.State != catalog.JobRunning { // its end was written all the same
			r.ended(rec)
			return nil
		}
		r.set(rec)
		r.unsure = false
	}
	for !r.record().Old {
		if err := r.walk(ctx); err != nil {
			return err
		}
	}
	if err := r.walk(ctx); err != nil {
		return err
	}
	return r.finish(ctx)
}

// finish makes sure that nothing is left under an older version, and retires those.
func (r *rekey) finish(ctx context.Context) error {
	rec := r.record()
	left, err := r.kms.countOlder(ctx, rec.Database, rec.Version)
	if err != nil {
		return err
	}
	if left > rec.Failed {
		return errRekeyEnds{fmt.Sprintf("%d versions of data keys are still wrapped under versions before %d, and %d were expected; rekey the database again",
			left, rec.Version, rec.Failed)}
	}
	reason := ""
	switch {
	case left > 0:
		reason = fmt.Sprintf("%d versions of data keys stay under older versions of the master key, which are needed for them", left)
	case rec.Retire != catalog.RetireNone:
		if reason, err = r.retire(ctx, rec); err != nil {
			return err
		}
	}
	return r.end(ctx, catalog.JobDone, reason)
}

// retire takes the versions before the job's out of use. Whether somebody else needs one
// is not for the job to decide: then they stay, and note says why.
func (r *rekey) retire(ctx context.Context, rec catalog.Job) (note string, err error) {
	older := func(state func(catalog.State) bool) pick {
		return func(key *catalog.Key) (picked []int, _ error) {
			for i := range key.Versions {
				if v := &key.Versions[i]; v.Number < rec.Version && state(v.State) {
					picked = append(picked, v.Number)
					if rec.Retire == catalog.RetireDisable {
						v.State = catalog.Disabled
					}
				}
			}
			return picked, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	switch rec.Retire {
	case catalog.RetireDisable:
		_, err = r.kms.retire(ctx, rec.Key, older(func(s catalog.State) bool { return s == catalog.Enabled }), "version_disabled")
	case catalog.RetireDestroy:
		_, err = r.kms.destroyVersions(ctx, rec.Key, -1, older(func(s catalog.State) bool {
			return s == catalog.Enabled || s == catalog.Disabled
		}), "version_destroy_scheduled")
	}
	if errors.Is(err, api.ErrState) {
		return "older versions of the master key were not retired: " + err.Error(), nil
	}
	return "", err
}

// countOlder returns how many versions of data keys are wrapped under a version of the
// master key before the given one.
func (k *KMS) countOlder(ctx context.Context, database string, version int) (n int, err error) {
	for v, err := range k.everyDataVersion(ctx, database) {
		if err != nil {
			return 0, err
		}
		if v.Master < version {
			n++
		}
	}
	return n, nil
}

// end writes that the job has ended.
func (r *rekey) end(ctx context.Context, state catalog.JobState, reason string) error {
	rec := r.record()
	at := now()
	rec.State, rec.Reason, rec.Ended, rec.Total = state, reason, &at, max(rec.Total, walked(rec))
	if state == catalog.JobDone {
		rec.Total = walked(rec)
	}
	written, err := r.kms.catalog.Advance(ctx, catalog.Key{}, rec, catalog.Rewrapped{})
	if err != nil {
		r.unsure = true
		return err
	}
	r.ended(written)
	return nil
}

// ended makes known that the job has ended. Whoever learns of it can begin the next one,
// so the database is free before.
func (r *rekey) ended(rec catalog.Job) {
	r.kms.rekeys.note(rec)
	r.kms.rekeys.release(rec.Database, r)
	r.set(rec)
	log := r.kms.log.Info
	if rec.State == catalog.JobFailed {
		log = r.kms.log.Error
	}
	log("rekey ended", "database", rec.Database, "key", rec.Key, "version", rec.Version, "job", rec.ID, "state", rec.State,
		"rewrapped", rec.Done, "skipped", rec.Skipped, "failed", rec.Failed, "took", now().Sub(rec.Started), "reason", rec.Reason)
	r.tell(api.JobState(rec.State), rec.Reason)
}

// wait pauses because of err, and reports false when ctx has ended.
func (r *rekey) wait(ctx context.Context, why error, d time.Duration) bool {
	e := api.AsError(translate("rekeying database "+r.record().Database, why))
	r.mu.Lock()
	fresh := r.reason == ""
	r.reason = e.Error()
	r.mu.Unlock()
	if fresh {
		r.kms.log.Warn("rekey waits", "database", r.record().Database, "job", r.id, "reason", e.Error())
		r.tell(api.JobWaiting, e.Error())
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.call:
	case <-ctx.Done():
		return false
	}
	return true
}

// record returns the job as it is in the catalog, as far as is known.
func (r *rekey) record() catalog.Job {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rec
}

func (r *rekey) set(rec catalog.Job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rec = rec
}

// advanced notes that the job has come further, and tells of it now and then.
func (r *rekey) advanced(rec catalog.Job) {
	r.mu.Lock()
	r.rec = rec
	resumed := r.reason != ""
	if resumed {
		r.reason, r.since, r.had = "", time.Now(), walked(rec)
	}
	r.mu.Unlock()
	if resumed {
		r.kms.log.Info("rekey goes on", "database", rec.Database, "job", rec.ID, "done", walked(rec), "total", rec.Total)
	}
	if resumed || time.Since(r.told) >= rekeyTell {
		r.tell(api.JobRunning, "")
	}
}

// status returns the job as users see it.
func (r *rekey) status() api.Job {
	r.mu.Lock()
	defer r.mu.Unlock()
	job := jobToAPI(r.rec)
	if job.State != api.JobRunning {
		return job
	}
	p := &job.Progress
	if took, n := time.Since(r.since).Seconds(), p.Done-r.had; took > 0 && n > 0 {
		p.Rate = float64(n) / took
		left := float64(p.Total-p.Done) / p.Rate
		p.Left = api.Duration(math.Ceil(left * float64(time.Second)))
	}
	if r.reason != "" {
		job.State, job.Reason = api.JobWaiting, r.reason
		p.Rate, p.Left = 0, 0
	}
	return job
}

// tell publishes where the job is.
func (r *rekey) tell(state api.JobState, cause string) {
	r.told = time.Now()
	job := r.status()
	group := ""
	if key, err := r.kms.ring.get(job.Key); err == nil {
		group = key.rec.Group
	}
	r.kms.events.publish(api.Event{
		Type: api.EventJob, Group: group, Key: job.Key, Database: job.Database, Job: job.ID,
		To: string(state), Cause: cause, Alarm: state == api.JobFailed, Progress: &job.Progress,
	})
}
