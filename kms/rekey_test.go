package kms_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// fillShop makes a database "shop" of n data keys, "0" to "n-1", of which every third has
// three versions. It returns how many versions there are.
func (r *rig) fillShop(n int) (versions int) {
	r.t.Helper()
	if _, err := r.CreateDatabase(r.t.Context(), "shop", api.DatabaseOptions{}); err != nil {
		r.t.Fatal(err)
	}
	for i := range n {
		for range versionsOf(i) {
			r.put("shop", fmt.Sprint(i))
			versions++
		}
	}
	return versions
}

func versionsOf(i int) int {
	if i%3 == 0 {
		return 3
	}
	return 1
}

// put makes the next version of a data key, with a plaintext that tells which it is.
func (r *rig) put(database, id string) api.NamedKey {
	r.t.Helper()
	put := api.NamedKeyPut{Plaintext: secretOf(id, r.newest(database, id)+1)}
	k, err := r.PutNamedKey(r.t.Context(), database, id, put)
	if err != nil {
		r.t.Fatal(err)
	}
	return k
}

func (r *rig) newest(database, id string) int {
	k, err := r.DescribeNamedKey(r.t.Context(), database, id)
	if err != nil && !errors.Is(err, kms.ErrNotFound) {
		r.t.Fatal(err)
	}
	return k.Version
}

func secretOf(id string, version int) []byte {
	return fmt.Appendf(nil, "%s in version %d", id, version)
}

// wantShop checks that every version of every data key can be read, and is wrapped under
// the given version of the master key or a later one.
func (r *rig) wantShop(n, master int) {
	r.t.Helper()
	for i := range n {
		r.wantDataKey(fmt.Sprint(i), master)
	}
}

func (r *rig) wantDataKey(id string, master int) {
	r.t.Helper()
	for v := 1; v <= r.newest("shop", id); v++ {
		k, err := r.NamedKey(r.t.Context(), "shop", id, v)
		if err != nil || string(k.Plaintext) != string(secretOf(id, v)) || k.Master < master {
			r.t.Fatalf("version %d of %s: %q under version %d, %v; want it under %d", v, id, k.Plaintext, k.Master, err, master)
		}
	}
}

func (r *rig) rekey(opts api.RekeyOptions) api.Job {
	r.t.Helper()
	job, err := r.Rekey(r.t.Context(), "shop", opts)
	if err != nil {
		r.t.Fatal(err)
	}
	return job
}

func (r *rig) job(id string) api.Job {
	r.t.Helper()
	job, err := r.Job(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return job
}

// wantJob waits until the job is in a state.
func (r *rig) wantJob(id string, state api.JobState) (job api.Job) {
	r.t.Helper()
	r.eventually(func() error {
		if job = r.job(id); job.State != state {
			return fmt.Errorf("the job is %s, want %s: %+v", job.State, state, job)
		}
		return nil
	})
	return job
}

// slowly makes every command take a while, so that a test can come in between.
func (r *rig) slowly(d time.Duration) {
	for _, h := range r.hsms {
		h.driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Delay: d})
	}
}

func (r *rig) states(key string) (states []string) {
	r.t.Helper()
	k, err := r.Key(r.t.Context(), key)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, v := range k.Versions {
		states = append(states, string(v.State))
	}
	return states
}

func TestRekeyMovesEveryVersionOfEveryDataKey(t *testing.T) {
	for _, c := range []struct {
		retire api.Retire
		states []string
	}{
		{api.RetireNone, []string{"enabled", "enabled"}},
		{api.RetireDisable, []string{"disabled", "enabled"}},
		{api.RetireDestroy, []string{"destroy_scheduled", "enabled"}},
	} {
		t.Run("retire "+string(c.retire), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2).mustStart()
				defer r.stop()
				n := r.fillShop(300)
				job := r.rekey(api.RekeyOptions{Retire: c.retire})
				if job.State != api.JobRunning || job.Type != api.JobRekey || job.Version != 2 || job.Key != "shop" || job.Progress.Total != n {
					t.Errorf("it begins as %+v", job)
				}
				job = r.wantJob(job.ID, api.JobDone)
				if p := job.Progress; p.Done != n || p.Total != n || job.Skipped != 0 || job.Failed != 0 || job.Reason != "" || job.Ended == nil {
					t.Errorf("it ends as %+v, want all of %d", job, n)
				}
				r.wantShop(300, 2)
				if got := r.states("shop"); !slices.Equal(got, c.states) {
					t.Errorf("the versions of the master key are %v, want %v", got, c.states)
				}
				if db, err := r.Database(t.Context(), "shop"); err != nil || db.Job != job.ID || db.Version != 2 {
					t.Errorf("the database is %+v, %v", db, err)
				}
			})
		})
	}
}

func TestRekeyIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.fillShop(500)
		_, err := r.Rekey(t.Context(), "nowhere", api.RekeyOptions{})
		wantError(t, err, kms.ErrNotFound, `there is no database "nowhere"`)
		_, err = r.Rekey(t.Context(), "shop", api.RekeyOptions{Retire: "burn"})
		wantError(t, err, kms.ErrBadRequest, `retire is "burn"`)
		_, err = r.Job(t.Context(), "none")
		wantError(t, err, kms.ErrNotFound, `there is no job "none"`)

		r.slowly(time.Second)
		job := r.rekey(api.RekeyOptions{})
		_, err = r.Rekey(t.Context(), "shop", api.RekeyOptions{})
		wantError(t, err, kms.ErrState, "job "+job.ID+" is rekeying database shop already")
		r.wantJob(job.ID, api.JobDone)
		if got := r.states("shop"); len(got) != 2 {
			t.Errorf("the refused rekey has made a version: %v", got)
		}
		r.wantJob(r.rekey(api.RekeyOptions{}).ID, api.JobDone)
	})
}

// Data keys that are put, rotated and deleted all the while, and a master key that is
// rotated once more, neither stop a rekey nor slip through.
func TestRekeyUnderWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		const n = 400
		r.fillShop(n)
		r.slowly(20 * time.Millisecond)
		job := r.rekey(api.RekeyOptions{})
		var wg sync.WaitGroup
		ctx, stop := context.WithCancel(t.Context())
		for w := range 4 {
			wg.Go(func() {
				for i := w; ctx.Err() == nil; i = (i + 4) % n {
					r.put("shop", fmt.Sprint(i))
					<-time.After(time.Millisecond)
				}
			})
		}
		<-time.After(30 * time.Millisecond)
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Error(err)
		}
		job = r.wantJob(job.ID, api.JobDone)
		stop()
		wg.Wait()
		if job.Failed != 0 || job.Progress.Done != job.Progress.Total {
			t.Errorf("it ends as %+v", job)
		}
		r.wantShop(n, 2)
	})
}

// A crash at every step of the catalog loses no record and rewraps none twice: what was
// rewrapped before would be skipped by the one who goes on.
func TestRekeyGoesOnAfterACrashAtEveryStep(t *testing.T) {
	const n = 150
	seed := newRig(t, 2).mustStart()
	versions := seed.fillShop(n)
	seed.stop()
	for step := 1; ; step++ {
		crashed := false
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := seed.copy(t)
				c := catalogtest.NewCrasher(r.disk, step)
				if err := r.start(c); err != nil && !errors.Is(err, catalogtest.ErrCrashed) {
					t.Fatal(err)
				}
				if r.KMS != nil {
					_, _ = r.Rekey(t.Context(), "shop", api.RekeyOptions{Retire: api.RetireDisable})
					<-time.After(time.Second)
					r.stop()
				}
				crashed = c.Crashed()
				r.mustStart()
				defer r.stop()
				db, err := r.Database(t.Context(), "shop")
				if err != nil {
					t.Fatal(err)
				}
				if db.Job == "" {
					r.wantShop(n, 1)
					return
				}
				job := r.wantJob(db.Job, api.JobDone)
				if job.Progress.Done != versions || job.Progress.Total != versions || job.Skipped != 0 || job.Failed != 0 {
					t.Errorf("after a crash at step %d: %+v", step, job)
				}
				r.wantShop(n, job.Version)
			})
		})
		if !crashed {
			t.Logf("%d steps", step-1)
			return
		}
	}
}

// copy makes a rig with the same tokens and what is in the catalog now.
func (r *rig) copy(t *testing.T) *rig {
	next := *r
	next.t, next.disk, next.log, next.KMS = t, catalogtest.NewMemory(), new(logBuffer), nil
	for _, kind := range catalog.Kinds() {
		for rec, err := range r.disk.Reopen().List(t.Context(), kind, "", "", 0) {
			if err != nil {
				t.Fatal(err)
			}
			rec.Rev = 0
			if _, err := next.disk.Apply(t.Context(), rec); err != nil {
				t.Fatal(err)
			}
		}
	}
	return &next
}

func TestRekeyWaitsForALostGroupAndGoesOnAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.group.Recovery.Interval = 100 * time.Millisecond
		r.mustStart()
		defer r.stop()
		n := r.fillShop(600)
		events := r.Events(t.Context())
		var seen []string
		var wg sync.WaitGroup
		wg.Go(func() {
			for e := range events {
				if e.Type == api.EventJob && (len(seen) == 0 || seen[len(seen)-1] != e.To) {
					seen = append(seen, e.To)
				}
				if e.Type == api.EventJob && e.To == string(api.JobDone) {
					if e.Database != "shop" || e.Key != "shop" || e.Progress.Done != n {
						t.Errorf("the last event is %+v", e)
					}
					return
				}
			}
		})
		r.slowly(10 * time.Millisecond)
		job := r.rekey(api.RekeyOptions{})
		<-time.After(25 * time.Millisecond)
		r.loseAll()
		waiting := r.wantJob(job.ID, api.JobWaiting)
		if !strings.Contains(waiting.Reason, "no member of the group can serve") || waiting.Progress.Done == 0 || waiting.Progress.Done == n {
			t.Errorf("it waits as %+v", waiting)
		}
		<-time.After(2 * time.Minute) // by then it asks as rarely as it ever does
		for _, h := range r.hsms {
			h.come()
		}
		r.wantStates(api.MemberActive)
		back := time.Now()
		if r.wantJob(job.ID, api.JobDone).Progress.Done != n {
			t.Errorf("it ends as %+v", r.job(job.ID))
		}
		if took := time.Since(back); took > time.Second {
			t.Errorf("it ended %v after the group was back", took)
		}
		wg.Wait()
		if want := []string{"running", "waiting", "running", "done"}; !slices.Equal(seen, want) {
			t.Errorf("events tell of %v, want %v", seen, want)
		}
		r.wantShop(600, 2)
	})
}

// A member that is down keeps nobody from a rekey: it gets the new version when it comes
// back, and what another was at when it died goes on elsewhere.
func TestRekeyGoesOnWithMembersDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		r.mustStart()
		defer r.stop()
		n := r.fillShop(600)
		r.hsms[0].leave()
		r.slowly(10 * time.Millisecond)
		job := r.rekey(api.RekeyOptions{Retire: api.RetireDisable})
		<-time.After(25 * time.Millisecond)
		r.hsms[1].leave()
		done := r.wantJob(job.ID, api.JobDone)
		if done.Progress.Done != n || done.Skipped != 0 || done.Failed != 0 || done.Reason != "" {
			t.Errorf("it ends as %+v, want all %d versions of data keys done once", done, n)
		}
		r.wantVersions("shop", kms.StateDisabled, kms.StateEnabled)
		r.wantShop(600, 2)
		for _, h := range r.hsms[:2] {
			h.come()
		}
		r.wantStates(api.MemberActive, api.MemberActive, api.MemberActive)
		r.wantVerified("shop")
		r.hsms[2].leave()
		r.wantShop(600, 2)
	})
}

func TestRekeyLeavesWhatCannotBeUnwrapped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		n := r.fillShop(200)
		c := catalog.New(r.disk.Reopen())
		dk, err := c.DataKey(t.Context(), "shop", "7")
		if err != nil {
			t.Fatal(err)
		}
		dk.Envelope[len(dk.Envelope)-1] ^= 1
		if _, err := c.MarkDataKey(t.Context(), dk); err != nil {
			t.Fatal(err)
		}
		job := r.wantJob(r.rekey(api.RekeyOptions{Retire: api.RetireDestroy}).ID, api.JobDone)
		if job.Failed != 1 || job.Progress.Done != n || len(job.Failures) != 1 || !strings.Contains(job.Reason, "1 versions of data keys stay") {
			t.Fatalf("it ends as %+v", job)
		}
		if f := job.Failures[0]; f.ID != "7" || f.Version != 1 || !strings.Contains(f.Error, "does not authenticate") {
			t.Errorf("the failure is %+v", f)
		}
		if got := r.states("shop"); !slices.Equal(got, []string{"enabled", "enabled"}) {
			t.Errorf("the version that is still needed: %v", got)
		}
		wantUndone := func(when string) {
			t.Helper()
			if jobs := r.Status().Jobs; len(jobs) != 1 || jobs[0].ID != job.ID || jobs[0].Failed != 1 || jobs[0].Failures != nil {
				t.Errorf("%s the status says of jobs %+v", when, jobs)
			}
		}
		wantUndone("after it")
		r.stop()
		r.mustStart()
		wantUndone("after another start")
	})
}

func TestRekeyEndsWhenItsVersionIsTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.fillShop(600)
		r.slowly(10 * time.Millisecond)
		job := r.rekey(api.RekeyOptions{})
		<-time.After(25 * time.Millisecond)
		if _, err := r.Disable(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		failed := r.wantJob(job.ID, api.JobFailed)
		if jobs := r.Status().Jobs; len(jobs) != 1 || jobs[0].State != api.JobFailed || jobs[0].Reason != failed.Reason {
			t.Errorf("the status says of jobs %+v", jobs)
		}
		if !strings.Contains(failed.Reason, "version 2 of key shop is disabled") || failed.Ended == nil {
			t.Errorf("it ends as %+v", failed)
		}
		if _, err := r.Enable(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		r.wantJob(r.rekey(api.RekeyOptions{}).ID, api.JobDone)
		r.wantShop(600, 3)
		if jobs := r.Status().Jobs; len(jobs) != 0 {
			t.Errorf("after a good one the status says of jobs %+v", jobs)
		}
	})
}

func TestRekeyLeavesVersionsThatAnotherDatabaseNeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.fillShop(20)
		if _, err := r.CreateDatabase(t.Context(), "bank", api.DatabaseOptions{Key: "shop"}); err != nil {
			t.Fatal(err)
		}
		r.put("bank", "1")
		job := r.wantJob(r.rekey(api.RekeyOptions{Retire: api.RetireDestroy}).ID, api.JobDone)
		if !strings.Contains(job.Reason, "not retired") || !strings.Contains(job.Reason, "database bank") {
			t.Errorf("it ends as %+v", job)
		}
		if got := r.states("shop"); !slices.Equal(got, []string{"enabled", "enabled"}) {
			t.Errorf("the versions are %v", got)
		}
	})
}

// fullDisk refuses what a job writes while it is full.
type fullDisk struct {
	catalog.Store
	mu   sync.Mutex // guards full
	full bool
}

func (f *fullDisk) fill(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

func (f *fullDisk) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	f.mu.Lock()
	full := f.full
	f.mu.Unlock()
	if full {
		return 0, fmt.Errorf("writing the catalog: %w", catalog.ErrFull)
	}
	return f.Store.Apply(ctx, changes...)
}

func TestRekeyWaitsForRoomOnTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		disk := &fullDisk{Store: r.disk}
		if err := r.start(disk); err != nil {
			t.Fatal(err)
		}
		defer r.stop()
		n := r.fillShop(600)
		r.slowly(10 * time.Millisecond)
		job := r.rekey(api.RekeyOptions{})
		<-time.After(25 * time.Millisecond)
		disk.fill(true)
		if waiting := r.wantJob(job.ID, api.JobWaiting); !strings.Contains(waiting.Reason, "no room left") {
			t.Errorf("it waits as %+v", waiting)
		}
		<-time.After(time.Minute)
		disk.fill(false)
		job = r.wantJob(job.ID, api.JobDone)
		if job.Progress.Done != n || job.Skipped != 0 {
			t.Errorf("it ends as %+v", job)
		}
	})
}

func TestRekeyStopsWithTheServiceAndGoesOnWithTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		n := r.fillShop(600)
		r.slowly(time.Second)
		job := r.rekey(api.RekeyOptions{})
		<-time.After(2500 * time.Millisecond)
		before := r.job(job.ID)
		began := time.Now()
		r.stop()
		if took := time.Since(began); took > 50*time.Millisecond {
			t.Errorf("Close took %v", took)
		}
		r.mustStart()
		defer r.stop()
		after := r.wantJob(job.ID, api.JobDone)
		if before.Progress.Done == 0 || before.Progress.Done == n || after.Progress.Done != n || after.Skipped != 0 {
			t.Errorf("before %+v, after %+v", before, after)
		}
		r.wantShop(600, 2)
	})
}

func TestDataKeysFollowAKeyWithARotationPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.fillShop(100)
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		<-time.After(5 * time.Minute)
		if db, _ := r.Database(t.Context(), "shop"); db.Job != "" {
			t.Fatalf("a rotation by hand has begun job %s", db.Job)
		}
		period := api.Duration(24 * time.Hour)
		if _, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{RotationPeriod: &period}); err != nil {
			t.Fatal(err)
		}
		for _, version := range []int{2, 3, 4} {
			r.eventually(func() error {
				db, err := r.Database(t.Context(), "shop")
				if err != nil || db.Version != version || db.Job == "" {
					return fmt.Errorf("%+v, %v", db, err)
				}
				if job := r.job(db.Job); job.Version != version || job.State != api.JobDone {
					return fmt.Errorf("the job is %+v", job)
				}
				return nil
			})
			r.wantShop(100, version)
			versions := must(r.Key(t.Context(), "shop")).Versions
			r.stop() // nobody has to watch a service for a day
			<-time.After(time.Until(versions[version-1].Created.Add(time.Duration(period) - time.Minute)))
			r.mustStart()
		}
	})
}
