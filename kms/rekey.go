package kms

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// A rekey wraps every version of every data key of a database under the newest version of
// its master key. It walks all data keys, then all of their older versions; every batch
// of records is written in one step with how far the job is, so that a crash loses no
// work and repeats none.
//
// Nothing is missed: data keys are written under the newest enabled version only (the
// catalog sees to that), so what is put during the walk needs no rekey, and a version
// that a put makes an older one is met in the second half, which begins when all of the
// first is written.

// rekeys are the jobs that run in this process.
type rekeys struct {
	mu         sync.Mutex               // guards what follows
	byDatabase map[string]*rekey        // :: database → its job; nil while one is about to begin
	undone     map[string]api.Job       // :: database → its last job, if that has ended and left something undone
	rooms      map[string]chan struct{} // :: group → takes a token for each command of a job that is in flight
}

func newRekeys() *rekeys {
	return &rekeys{byDatabase: make(map[string]*rekey), undone: make(map[string]api.Job), rooms: make(map[string]chan struct{})}
}

// room is where the jobs of a group take turns, so that those of a group which hangs keep
// nobody else waiting.
func (r *rekeys) room(group string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	room := r.rooms[group]
	if room == nil {
		room = make(chan struct{}, rekeyCommands)
		r.rooms[group] = room
	}
	return room
}

// claim makes sure that a database has one job, until release or for as long as it runs.
func (r *rekeys) claim(database string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	job, taken := r.byDatabase[database]
	switch {
	case !taken:
		r.byDatabase[database] = nil
		return nil
	case job == nil:
		return stateError("ask for the database's job in a moment", "a rekey of database %s is just beginning", database)
	default:
		return stateError("wait until it is done", "job %s is rekeying database %s already", job.id, database)
	}
}

// release lets a database have another job than this one; nil is one that never began.
func (r *rekeys) release(database string, job *rekey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byDatabase[database] == job {
		delete(r.byDatabase, database)
	}
}

// note remembers how the last job of a database has ended, if that is for somebody to
// look at.
func (r *rekeys) note(rec catalog.Job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if delete(r.undone, rec.Database); rec.State == catalog.JobFailed || rec.Failed > 0 {
		rec.Failures = nil
		r.undone[rec.Database] = jobToAPI(rec)
	}
}

// find returns a job that runs here; nil: it does not.
func (r *rekeys) find(id string) *rekey {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, job := range r.byDatabase {
		if job != nil && job.id == id {
			return job
		}
	}
	return nil
}

// all returns the jobs that run here, in no order.
func (r *rekeys) all() []*rekey {
	r.mu.Lock()
	defer r.mu.Unlock()
	var jobs []*rekey
	for _, job := range r.byDatabase {
		if job != nil {
			jobs = append(jobs, job)
		}
	}
	return jobs
}

// wake has jobs that wait for an HSM try again now.
func (r *rekeys) wake() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, job := range r.byDatabase {
		if job != nil {
			wake(job.call)
		}
	}
}

// Rekey begins to wrap every data key of a database under a new version of its master key.
// A crash after the version is made and before the job is written leaves the version,
// which does no harm, and no job.
func (k *KMS) Rekey(ctx context.Context, database string, opts api.RekeyOptions) (api.Job, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	job, err := k.rekey(ctx, database, opts)
	return job, translate("rekeying database "+strconv.Quote(database), err)
}

func (k *KMS) rekey(ctx context.Context, database string, opts api.RekeyOptions) (api.Job, error) {
	switch opts.Retire {
	case api.RetireNone, api.RetireDisable, api.RetireDestroy:
	default:
		return api.Job{}, badRequest("retire is %q, want %q, %q or nothing", opts.Retire, api.RetireDisable, api.RetireDestroy)
	}
	master, err := k.masterOf(ctx, database)
	if err != nil {
		return api.Job{}, err
	}
	if err := k.rekeys.claim(database); err != nil {
		return api.Job{}, err
	}
	made, err := k.rotate(ctx, master.rec.Name, api.RotateOptions{AllowDegraded: opts.AllowDegraded})
	if err != nil {
		k.rekeys.release(database, nil)
		return api.Job{}, err
	}
	return k.beginRekey(ctx, database, made.Number, opts.Retire)
}

// beginRekey writes a job for a version that exists, and starts it. The caller has claimed
// the database.
func (k *KMS) beginRekey(ctx context.Context, database string, version int, retire api.Retire) (api.Job, error) {
	rec, err := k.writeJob(ctx, database, version, retire)
	if err != nil {
		k.rekeys.release(database, nil)
		return api.Job{}, err
	}
	r, err := k.startRekey(rec)
	if err != nil {
		return api.Job{}, err
	}
	return r.status(), nil
}

func (k *KMS) writeJob(ctx context.Context, database string, version int, retire api.Retire) (catalog.Job, error) {
	var id [8]byte
	if _, err := rand.Read(id[:]); err != nil {
		return catalog.Job{}, err
	}
	for {
		db, err := k.readDatabase(ctx, database)
		if err != nil {
			return catalog.Job{}, err
		}
		_, total, err := k.catalog.CountDataKeys(ctx, database)
		if err != nil {
			return catalog.Job{}, err
		}
		db.Job = hex.EncodeToString(id[:])
		job, _, err := k.catalog.BeginJob(ctx, catalog.Job{
			ID: db.Job, Database: database, Key: db.Key, Version: version, State: catalog.JobRunning,
			Started: now(), Retire: catalog.Retire(retire), Total: total,
		}, db)
		if err == nil || errors.Is(err, catalog.ErrConflict) && ctx.Err() != nil {
			return job, err
		}
		if errors.Is(err, catalog.ErrConflict) {
			continue
		}
		ctx, cancel := cleanup(ctx)
		defer cancel()
		if job, lookup := k.catalog.Job(ctx, db.Job); lookup == nil {
			return job, nil // it is written all the same
		}
		return catalog.Job{}, err
	}
}

// startRekey has a job that is in the catalog run, until it is done or the service is
// closed.
func (k *KMS) startRekey(rec catalog.Job) (*rekey, error) {
	r := newRekey(k, rec)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, errClosed // the next Open goes on with it
	}
	k.rekeys.mu.Lock()
	k.rekeys.byDatabase[rec.Database] = r
	k.rekeys.mu.Unlock()
	k.tasks.Go(func() {
		r.run(k.life)
		k.rekeys.release(rec.Database, r)
		if key, err := k.ring.get(rec.Key); err == nil && k.byName[key.rec.Group] != nil {
			k.byName[key.rec.Group].janitor.wake() // the key may have been rotated meanwhile
		}
	})
	return r, nil
}

// resumeRekeys goes on with jobs that an earlier process has left.
func (k *KMS) resumeRekeys(ctx context.Context) error {
	var left []catalog.Job
	for rec, err := range k.catalog.Jobs(ctx) {
		if err != nil {
			return fmt.Errorf("reading the catalog: %w", err)
		}
		if rec.State == catalog.JobRunning {
			left = append(left, rec)
		} else if db, err := k.catalog.Database(ctx, rec.Database); err == nil && db.Job == rec.ID {
			k.rekeys.note(rec)
		}
	}
	for _, rec := range left {
		if _, err := k.startRekey(rec); err != nil {
			return err
		}
	}
	return nil
}

// Job returns how far a job is, from memory while it runs.
func (k *KMS) Job(ctx context.Context, id string) (api.Job, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	if r := k.rekeys.find(id); r != nil {
		return r.status(), nil
	}
	if id == "" || len(id) > catalog.MaxID {
		return api.Job{}, badRequest("%q is no ID of a job", id)
	}
	rec, err := k.catalog.Job(ctx, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return api.Job{}, api.NewError(api.CodeNotFound, fmt.Sprintf("there is no job %q", id), nil)
	}
	if err != nil {
		return api.Job{}, translate("reading job "+strconv.Quote(id), err)
	}
	return jobToAPI(rec), nil
}

// Jobs returns the jobs that have not ended, from memory, by their database.
func (k *KMS) Jobs() []api.Job {
	running := k.rekeys.all()
	jobs := make([]api.Job, len(running))
	for i, r := range running {
		jobs[i] = r.status()
	}
	slices.SortFunc(jobs, func(a, b api.Job) int { return strings.Compare(a.Database, b.Database) })
	return jobs
}

// openJobs returns the jobs that somebody may have to look at, from memory, by their
// database: those that have not ended, and those that have left something undone.
func (k *KMS) openJobs() []api.Job {
	jobs := k.Jobs()
	for i := range jobs {
		jobs[i].Failures = nil
	}
	k.rekeys.mu.Lock()
	for database, job := range k.rekeys.undone {
		if !slices.ContainsFunc(jobs, func(j api.Job) bool { return j.Database == database }) {
			jobs = append(jobs, job)
		}
	}
	k.rekeys.mu.Unlock()
	slices.SortFunc(jobs, func(a, b api.Job) int { return strings.Compare(a.Database, b.Database) })
	return jobs
}

// jobToAPI returns a job as users see it. What was put while it ran may have been looked
// at too, so there may be more than there were at its begin.
func jobToAPI(rec catalog.Job) api.Job {
	done := rec.Done + rec.Skipped + rec.Failed
	job := api.Job{
		ID: rec.ID, Type: api.JobRekey, Database: rec.Database, Key: rec.Key, Version: rec.Version,
		State: api.JobState(rec.State), Reason: rec.Reason, Started: rec.Started, Ended: rec.Ended, Retire: api.Retire(rec.Retire),
		Progress: api.Progress{Done: done, Total: max(rec.Total, done)}, Skipped: rec.Skipped, Failed: rec.Failed,
	}
	for _, f := range rec.Failures {
		id, raw := api.ShowID(string(f.Key))
		job.Failures = append(job.Failures, api.JobFailure{ID: id, Raw: raw, Version: f.Version, Error: f.Error})
	}
	return job
}
