package kms_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// lateJob is a store in which whoever looks at one job sees it late, and another one begins
// after somebody has looked.
type lateJob struct {
	catalog.Store
	id           string
	looked, done chan struct{}
	once         sync.Once
}

func (l *lateJob) Get(ctx context.Context, kind catalog.Kind, id string) (catalog.Record, error) {
	rec, err := l.Store.Get(ctx, kind, id)
	if kind == catalog.KindJob && id == l.id {
		l.once.Do(func() {
			close(l.looked)
			<-l.done
		})
	}
	return rec, err
}

func (l *lateJob) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	if l.id != "" && changes[0].Kind == catalog.KindJob && changes[0].Rev == 0 {
		<-l.looked
	}
	return l.Store.Apply(ctx, changes...)
}

// The janitor, which sees the rotation before the job, does not begin another one when it is
// done.
func TestARekeyOfAKeyWithARotationPeriodIsOneJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		store := &lateJob{Store: r.disk.Reopen(), looked: make(chan struct{}), done: make(chan struct{})}
		r.mustStartOn(store)
		defer r.stop()
		r.fillShop(1)
		first := r.rekey(api.RekeyOptions{})
		r.wantJob(first.ID, api.JobDone)
		period := api.Duration(24 * time.Hour)
		if _, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{RotationPeriod: &period}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		store.id = first.ID
		second := r.rekey(api.RekeyOptions{})
		r.wantJob(second.ID, api.JobDone)
		close(store.done)
		synctest.Wait()
		if db, err := r.Database(t.Context(), "shop"); err != nil || db.Job != second.ID {
			t.Errorf("the last job is %q, %v, want %q", db.Job, err, second.ID)
		}
	})
}
