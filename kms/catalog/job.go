package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"
)

// Job is the record of a long work on the records of a database. It is written in the
// same step as each batch of the records that it changes, so that after a crash it
// goes on exactly behind the last of them.
type Job struct {
	Rev uint64 `json:"-"`

	ID       string     `json:"id"`
	Database string     `json:"database"`
	Key      string     `json:"key"`     // name of the master key
	Version  int        `json:"version"` // that everything is to be wrapped under
	State    JobState   `json:"state"`
	Started  time.Time  `json:"started"`
	Ended    *time.Time `json:"ended,omitempty"`
	// Retire is what is done to the older versions of the master key at the end.
	Retire Retire `json:"retire,omitempty"`

	// Old says that the newest versions are done and the older ones have begun; After is
	// the last that was looked at: a data key's ID and, for an older version, its number.
	Old         bool   `json:"old,omitempty"`
	After       []byte `json:"after,omitempty"`
	AfterNumber int    `json:"after_number,omitempty"`

	Total    int       `json:"total"`   // versions of data keys there were when it began
	Done     int       `json:"done"`    // of them, rewrapped by this job
	Skipped  int       `json:"skipped"` // found wrapped under Version already
	Failed   int       `json:"failed"`
	Failures []Failure `json:"failures,omitempty"` // the first MaxFailures
	Reason   string    `json:"reason,omitempty"`   // why it failed as a whole
}

// Failure is a version of a data key that a job could not rewrap.
type Failure struct {
	Key     []byte `json:"key"` // its ID
	Version int    `json:"version"`
	Error   string `json:"error"`
}

// MaxFailures are kept with a job.
const MaxFailures = 100

// JobState is how far a job is. The values are those of the API.
type JobState string

const (
	JobRunning JobState = "running"
	JobDone    JobState = "done"   // everything is wrapped under Version, but for Failures
	JobFailed  JobState = "failed" // it cannot go on
)

// Retire is what becomes of old versions. The values are those of the API.
type Retire string

const (
	RetireNone    Retire = ""
	RetireDisable Retire = "disable"
	RetireDestroy Retire = "destroy"
)

// Job returns a job, or ErrNotFound.
func (c *Catalog) Job(ctx context.Context, id string) (Job, error) {
	r, err := c.store.Get(ctx, KindJob, id)
	if err != nil {
		return Job{}, fmt.Errorf("reading job %q: %w", id, err)
	}
	return decodeJob(r)
}

// Jobs yields every job by its ID. It ends with the first error.
func (c *Catalog) Jobs(ctx context.Context) iter.Seq2[Job, error] {
	return decoded(c.store.List(ctx, KindJob, "", "", 0), decodeJob)
}

// BeginJob writes a new job and, in the same step, the database whose Job it is, if that
// is at its Rev.
func (c *Catalog) BeginJob(ctx context.Context, job Job, db Database) (Job, Database, error) {
	r, err := encodeJob(job)
	if err != nil {
		return Job{}, Database{}, err
	}
	d, err := encodeDatabase(db)
	if err != nil {
		return Job{}, Database{}, err
	}
	rev, err := c.store.Apply(ctx, r, d)
	if err != nil {
		return Job{}, Database{}, fmt.Errorf("beginning job %q of database %q: %w", job.ID, db.Name, err)
	}
	job.Rev, db.Rev = rev, rev
	return job, db, nil
}

// Rewrapped is a batch of records that a job has wrapped anew, each at the Rev that it was
// read at.
type Rewrapped struct {
	Keys []DataKey
	Old  []OldVersion
}

// Advance writes a job that has come further and, in the same step, what it has
// rewrapped, under the conditions of PutDataKey about master. ErrConflict: one of the
// records has changed since it was read, or the job has, or the master key; nothing was
// written. Give it at most BatchSize-1 records; with none, master is not looked at.
func (c *Catalog) Advance(ctx context.Context, master Key, job Job, batch Rewrapped) (Job, error) {
	r, err := encodeJob(job)
	if err != nil {
		return Job{}, err
	}
	records := len(batch.Keys) + len(batch.Old)
	changes := make([]Record, 0, 2+records)
	changes = append(changes, r)
	if records > 0 {
		changes = append(changes, Record{Kind: KindKey, ID: master.Name, Rev: master.Rev, Keep: true})
	}
	for _, dk := range batch.Keys {
		if err := checkMaster(master, dk.DataVersion); err != nil {
			return Job{}, fmt.Errorf("writing data key %q of job %q: %w", dk.ID, job.ID, err)
		}
		if r, err = encodeDataKey(dk); err != nil {
			return Job{}, err
		}
		changes = append(changes, r)
	}
	for _, o := range batch.Old {
		if err := checkMaster(master, o.DataVersion); err != nil {
			return Job{}, fmt.Errorf("writing version %d of data key %q of job %q: %w", o.Number, o.ID, job.ID, err)
		}
		if r, err = encodeOldVersion(o); err != nil {
			return Job{}, err
		}
		changes = append(changes, r)
	}
	rev, err := c.store.Apply(ctx, changes...)
	if err != nil {
		return Job{}, fmt.Errorf("writing %d records of job %q: %w", records, job.ID, err)
	}
	job.Rev = rev
	return job, nil
}

type jobRecord struct {
	head
	Job
}

func encodeJob(j Job) (Record, error) {
	if err := checkJob(j); err != nil {
		return Record{}, fmt.Errorf("writing job %q: %w", j.ID, err)
	}
	return encode(KindJob, j.ID, j.Rev, jobRecord{headOf(KindJob), j})
}

func decodeJob(r Record) (Job, error) {
	var v jobRecord
	if err := decode(r, &v); err != nil {
		return Job{}, err
	}
	if err := errors.Join(checkJob(v.Job), checkID(r, v.Job.ID)); err != nil {
		return Job{}, damaged(r, err)
	}
	v.Job.Rev = r.Rev
	return v.Job, nil
}

func checkJob(j Job) error {
	switch j.State {
	case JobRunning, JobDone, JobFailed:
	default:
		return fmt.Errorf("unknown state %q", j.State)
	}
	switch j.Retire {
	case RetireNone, RetireDisable, RetireDestroy:
	default:
		return fmt.Errorf("unknown end of old versions %q", j.Retire)
	}
	if j.Version < 1 || len(j.Failures) > MaxFailures || len(j.After) > MaxDataKeyID {
		return fmt.Errorf("version %d, %d failures, %d bytes of the last ID", j.Version, len(j.Failures), len(j.After))
	}
	return errors.Join(checkText("ID", j.ID, maxText), checkDatabaseName(j.Database), checkText("key", j.Key, MaxID))
}
