package audit_test

import (
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/cmd/kmsd/internal/audit"
)

func TestStrangersAreCountedWhereTheyAreTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := make(chan int, 10)
		var full atomic.Bool
		began := time.Now()
		s := audit.NewStrangers(2, func(since time.Time, n int) error {
			if !since.Equal(began) {
				t.Errorf("counted since %v, want %v", since, began)
			}
			told <- n
			if full.Load() {
				return errors.New("the disk is full")
			}
			return nil
		})
		for i := range 7 {
			if got := s.Take(began); got != (i < 2) {
				t.Errorf("request %d is written down by itself: %v", i, got)
			}
		}
		full.Store(true)
		time.Sleep(11 * time.Second) // a summary is due
		synctest.Wait()
		full.Store(false)
		if !s.Take(began) {
			t.Error("after a while there is no room for one")
		}
		s.Flush()
		s.Flush() // nothing is left
		close(told)
		var got []int
		for n := range told {
			got = append(got, n)
		}
		if !slices.Equal(got, []int{5, 5}) {
			t.Errorf("told of %v, want the 5 again that could not be written", got)
		}
	})
}

// A summary that is due by itself in the moment of the end is waited for: the log is
// closed after that.
func TestFlushWaitsForASummaryThatIsBeingWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		writing, written := make(chan struct{}), make(chan struct{})
		var told atomic.Int64
		s := audit.NewStrangers(1, func(_ time.Time, n int) error {
			close(writing)
			<-written
			told.Store(int64(n))
			return nil
		})
		for range 3 {
			s.Take(time.Now())
		}
		<-writing
		flushed := make(chan int64)
		go func() { s.Flush(); flushed <- told.Load() }()
		for range 100 {
			runtime.Gosched() // no bubble waits for who waits for a lock
		}
		close(written)
		if n := <-flushed; n != 2 {
			t.Errorf("%d are written down when Flush returns, want 2", n)
		}
	})
}
