package audit_test

import (
	"errors"
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
