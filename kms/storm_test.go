package kms_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
)

// In a storm members come and go at random while keys are made, rotated, destroyed
// and used. No acknowledged key may be lost, none may be reported absent, and after
// the storm every member holds exactly what the catalog says.
func TestStorm(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				s := &storm{rig: r, kept: make(map[string][]byte)}
				var wg sync.WaitGroup
				stop := make(chan struct{})
				for i := range uint64(4) {
					wg.Go(func() { s.work(rand.New(rand.NewPCG(seed, i)), i, stop) })
				}
				s.weather(rand.New(rand.NewPCG(seed, 99)))
				close(stop)
				wg.Wait()
				for _, h := range r.hsms {
					h.come()
				}
				r.wantStates(active, active, active)
				r.wantConsistent()
				for name, wrapped := range s.kept {
					r.wantVerified(name)
					r.wantUnwrap(name, wrapped)
				}
				t.Logf("%d keys are left", len(s.kept))
			})
		})
	}
}

type storm struct {
	*rig
	mu   sync.Mutex
	kept map[string][]byte // :: acknowledged key → an envelope
}

// weather takes members away and brings them back, most of the time one of them.
func (s *storm) weather(random *rand.Rand) {
	for range 40 {
		h := s.hsms[random.IntN(len(s.hsms))]
		switch random.IntN(6) {
		case 0:
			h.leave()
		case 1:
			h.driver().Crash()
		default:
			h.come()
		}
		<-time.After(time.Duration(random.IntN(1500)) * time.Millisecond)
	}
}

func (s *storm) work(random *rand.Rand, worker uint64, stop <-chan struct{}) {
	var mine []string
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(random.IntN(800)) * time.Millisecond):
		}
		switch n := random.IntN(10); {
		case n < 3 || len(mine) == 0:
			name := fmt.Sprintf("key-%d-%d", worker, i)
			if s.make(name) {
				mine = append(mine, name)
			}
		case n == 3:
			s.destroy(mine[0])
			mine = mine[1:]
		case n == 4:
			_, err := s.Rotate(s.t.Context(), mine[random.IntN(len(mine))])
			s.allow(err)
		default:
			s.use(mine[random.IntN(len(mine))])
		}
	}
}

func (s *storm) make(name string) bool {
	_, err := s.CreateMasterKey(s.t.Context(), name, kms.KeyOptions{})
	if err != nil {
		s.allow(err)
		return false
	}
	for {
		wrapped, err := s.Wrap(s.t.Context(), name, plaintextOf(name), []byte("aad"))
		if err == nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.kept[name] = wrapped
			return true
		}
		s.allow(err)
		<-time.After(100 * time.Millisecond)
	}
}

func (s *storm) destroy(name string) {
	s.mu.Lock()
	delete(s.kept, name)
	s.mu.Unlock()
	_, err := s.Destroy(s.t.Context(), name, 0)
	s.allow(err)
}

func (s *storm) use(name string) {
	s.mu.Lock()
	wrapped := s.kept[name]
	s.mu.Unlock()
	got, err := s.Unwrap(s.t.Context(), name, wrapped, []byte("aad"))
	if err == nil && string(got) != string(plaintextOf(name)) {
		s.t.Errorf("key %s unwrapped %q", name, got)
	}
	s.allow(err)
}

// allow fails the test for an error that no weather excuses.
func (s *storm) allow(err error) {
	for _, excuse := range []error{kms.ErrInsufficientCopies, kms.ErrGroupLost, kms.ErrUnavailable} {
		if err == nil || errors.Is(err, excuse) {
			return
		}
	}
	s.t.Errorf("%v", err)
}
