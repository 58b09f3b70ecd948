package catalog_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

func newJob(id string) catalog.Job {
	return catalog.Job{ID: id, Database: "orders", Key: "shop", Version: 2, State: catalog.JobRunning, Started: at(5), Total: 3}
}

func TestAJobRewrapsInOneStep(t *testing.T) {
	ctx := t.Context()
	c, key, db := withDatabase(t)
	a := must(c.PutDataKey(ctx, key, newDataKey("a", 1, 1), nil))
	old := catalog.OldVersion{Database: "orders", ID: "a", DataVersion: a.DataVersion}
	a.DataVersion = newDataVersion(2, 1)
	a = must(c.PutDataKey(ctx, key, a, &old))
	b := must(c.PutDataKey(ctx, key, newDataKey("b", 1, 1), nil))
	key.Versions = append(key.Versions, newVersion(2))
	key = must(c.PutKey(ctx, key))

	db.Job = "job-1"
	job, db, err := c.BeginJob(ctx, newJob("job-1"), db)
	if err != nil {
		t.Fatal(err)
	}
	if got := must(c.Database(ctx, "orders")); !reflect.DeepEqual(got, db) || got.Job != "job-1" {
		t.Errorf("database %+v, want %+v", got, db)
	}
	a.Master, b.Master = 2, 2
	job.After, job.Done = []byte("b"), 2
	job = must(c.Advance(ctx, key, job, catalog.Rewrapped{Keys: []catalog.DataKey{a, b}}))
	if got := must(c.Job(ctx, "job-1")); !reflect.DeepEqual(got, job) {
		t.Errorf("job %+v, want %+v", got, job)
	}
	if got := must(c.DataKey(ctx, "orders", "b")); got.Master != 2 || got.Rev != job.Rev {
		t.Errorf("data key %+v, want it under version 2 at revision %d", got, job.Rev)
	}

	v1 := must(c.OldVersion(ctx, "orders", "a", 1))
	v1.Master = 2
	job.Old, job.After, job.AfterNumber, job.Done = true, []byte("a"), 1, 3
	job = must(c.Advance(ctx, key, job, catalog.Rewrapped{Old: []catalog.OldVersion{v1}}))
	if got := must(c.OldVersion(ctx, "orders", "a", 1)); got.Master != 2 {
		t.Errorf("version 1 of a is under version %d", got.Master)
	}
	job.State = catalog.JobDone
	must(c.Advance(ctx, catalog.Key{}, job, catalog.Rewrapped{}))
	if got := collect(t, c.Jobs(ctx)); len(got) != 1 || got[0].State != catalog.JobDone {
		t.Errorf("jobs %+v", got)
	}
	if _, err := c.Job(ctx, "job-2"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a job that is not there: %v", err)
	}
}

func TestAJobThatWasOvertakenWritesNothing(t *testing.T) {
	for _, tc := range []struct {
		name     string
		overtake func(*testing.T, *catalog.Catalog, catalog.Key, catalog.DataKey, catalog.Job)
		says     string // "": ErrConflict
	}{
		{"by a put", func(t *testing.T, c *catalog.Catalog, key catalog.Key, dk catalog.DataKey, _ catalog.Job) {
			old := catalog.OldVersion{Database: "orders", ID: "a", DataVersion: dk.DataVersion}
			dk.DataVersion = newDataVersion(2, 2)
			must(c.PutDataKey(t.Context(), key, dk, &old))
		}, ""},
		{"by a change of the master key", func(t *testing.T, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey, _ catalog.Job) {
			key.Versions[1].State = catalog.Disabled
			must(c.PutKey(t.Context(), key))
			key.Versions[1].State = catalog.Enabled // as the job still has it
		}, ""},
		{"by itself", func(t *testing.T, c *catalog.Catalog, key catalog.Key, _ catalog.DataKey, job catalog.Job) {
			must(c.Advance(t.Context(), key, job, catalog.Rewrapped{}))
		}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			c, key, db := withDatabase(t)
			dk := must(c.PutDataKey(ctx, key, newDataKey("a", 1, 1), nil))
			key.Versions = append(key.Versions, newVersion(2))
			key = must(c.PutKey(ctx, key))
			job, _, err := c.BeginJob(ctx, newJob("job-1"), db)
			if err != nil {
				t.Fatal(err)
			}
			tc.overtake(t, c, key, dk, job)
			dk.Master, job.Done = 2, 7
			if _, err := c.Advance(ctx, key, job, catalog.Rewrapped{Keys: []catalog.DataKey{dk}}); !errors.Is(err, catalog.ErrConflict) {
				t.Errorf("error %v, want ErrConflict", err)
			}
			if got := must(c.Job(ctx, "job-1")); got.Done != 0 {
				t.Errorf("the job was written: %+v", got)
			}
		})
	}
}

func TestAJobThatIsNoneIsRefused(t *testing.T) {
	many := make([]catalog.Failure, catalog.MaxFailures+1)
	for _, tc := range []struct {
		name   string
		change func(*catalog.Job)
		says   string
	}{
		{"no ID", func(j *catalog.Job) { j.ID = "" }, "no ID"},
		{"no key", func(j *catalog.Job) { j.Key = "" }, "no key"},
		{"a database with a slash", func(j *catalog.Job) { j.Database = "a/b" }, "has no slash"},
		{"version 0", func(j *catalog.Job) { j.Version = 0 }, "version 0"},
		{"a state of its own", func(j *catalog.Job) { j.State = "waiting" }, `unknown state "waiting"`},
		{"an end of its own", func(j *catalog.Job) { j.Retire = "erase" }, `unknown end of old versions "erase"`},
		{"too many failures", func(j *catalog.Job) { j.Failures = many }, "101 failures"},
		{"a last ID that is too long", func(j *catalog.Job) { j.After = make([]byte, 256) }, "256 bytes of the last ID"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _, db := withDatabase(t)
			job := newJob("job-1")
			tc.change(&job)
			if _, _, err := c.BeginJob(t.Context(), job, db); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v, want %q", err, tc.says)
			}
		})
	}
	c, key, db := withDatabase(t)
	job, _, err := c.BeginJob(t.Context(), newJob("job-1"), db)
	if err != nil {
		t.Fatal(err)
	}
	old := catalog.OldVersion{Database: "orders", ID: "a", DataVersion: newDataVersion(1, 7)}
	if _, err := c.Advance(t.Context(), key, job, catalog.Rewrapped{Old: []catalog.OldVersion{old}}); err == nil || !strings.Contains(err.Error(), "newest enabled version is 1") {
		t.Errorf("a version under one that the key has not: %v", err)
	}
}

func TestBoundsOfWraps(t *testing.T) {
	ctx := t.Context()
	c := catalog.New(catalogtest.NewMemory())
	both := must(c.PutUsages(ctx, catalog.Usage{Identity: identity(1), Wraps: 65536}, catalog.Usage{Identity: identity(2), Wraps: 1 << 32}))
	if got := collect(t, c.Usages(ctx)); !reflect.DeepEqual(got, both) {
		t.Errorf("usages %+v, want %+v", got, both)
	}
	both[0].Wraps = 131072
	must(c.PutUsages(ctx, both[0]))
	if got := must(c.Usage(ctx, identity(1))); got.Wraps != 131072 {
		t.Errorf("usage %+v", got)
	}
	if _, err := c.PutUsages(ctx, both[1], both[0]); !errors.Is(err, catalog.ErrConflict) {
		t.Errorf("one of two is old: %v, want ErrConflict", err)
	}
	if got := must(c.Usage(ctx, identity(2))); got.Rev != both[1].Rev {
		t.Error("the other one was written")
	}
	if _, err := c.Usage(ctx, identity(3)); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a version that has not wrapped: %v", err)
	}
	if _, err := c.PutUsages(ctx, catalog.Usage{Wraps: 1}); err == nil || !strings.Contains(err.Error(), "no identity") {
		t.Errorf("a usage of nothing: %v", err)
	}
}
