package rekey_test

import (
	"slices"
	"sync"
	"testing"
	"time"

	"kmsd/kms/api"
)

// TestOthersAreServedWhileARekeyRuns compares how long programs wait for a wrap with and
// without a rekey.
func TestOthersAreServedWhileARekeyRuns(t *testing.T) {
	s := newSite(t)
	if _, err := s.client.CreateDatabase(t.Context(), database, api.DatabaseOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.CreateMasterKey(t.Context(), "other", api.KeyOptions{}); err != nil {
		t.Fatal(err)
	}
	s.fill()
	s.serve()
	const long = 2 * time.Second
	s.wraps(func() bool { return false }, long/4) // until everything is warm
	without := s.wraps(func() bool { return false }, long)
	running := func() bool {
		db, err := s.client.Database(t.Context(), database)
		if err != nil {
			t.Error(err)
			return false
		}
		job, err := s.client.Job(t.Context(), db.Job)
		return err == nil && job.State == api.JobRunning
	}
	if _, err := s.client.Rekey(t.Context(), database, api.RekeyOptions{}); err != nil {
		t.Fatal(err)
	}
	with := s.wraps(running, long)
	t.Logf("wraps take %v, %v (99 %%); while a rekey runs %v, %v (99 %%), %d of them",
		quantile(without, 0.5), quantile(without, 0.99), quantile(with, 0.5), quantile(with, 0.99), len(with))
	if len(with) < 50 {
		t.Fatalf("only %d wraps while the rekey ran: it proves nothing", len(with))
	}
	// The slowest of a few hundred are the machine's as much as the rekey's.
	if most := 20 * quantile(without, 0.9); quantile(with, 0.9) > most {
		t.Errorf("while a rekey runs one of ten wraps takes more than %v, want at most 20 times what it takes without, %v", quantile(with, 0.9), most)
	}
}

// wraps has a few programs wrap now and then, for so long or until more says that it is
// enough, and returns how long each wrap took.
func (s *site) wraps(running func() bool, long time.Duration) (times []time.Duration) {
	s.t.Helper()
	end := time.Now().Add(long)
	rekeying := running()
	var mu sync.Mutex // guards times
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for n := 0; time.Now().Before(end); n++ {
				if rekeying && n%10 == 9 && !running() {
					return
				}
				begin := time.Now()
				if _, err := s.client.Wrap(s.t.Context(), "other", make([]byte, 32), nil); err != nil {
					s.t.Error(err)
					return
				}
				mu.Lock()
				times = append(times, time.Since(begin))
				mu.Unlock()
				<-tick.C
			}
		})
	}
	wg.Wait()
	slices.Sort(times)
	return times
}

// quantile is the time within which a share of sorted times lies.
func quantile(times []time.Duration, share float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	return times[int(share*float64(len(times)-1))].Round(10 * time.Microsecond)
}
