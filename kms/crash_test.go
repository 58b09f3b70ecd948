package kms_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog/catalogtest"
)

// story is what an operator does, and what he was told has worked. It goes on after
// a failure, as operators do.
type story struct {
	*rig
	wrapped   map[string][]byte // :: acknowledged key → an envelope of its version 1
	destroyed map[string]bool   // keys whose destruction was acknowledged
	doubtful  map[string]bool   // keys whose destruction was tried, with what outcome nobody knows
	failures  []error
}

func (s *story) tell() {
	s.wrapped, s.destroyed, s.doubtful = make(map[string][]byte), make(map[string]bool), make(map[string]bool)
	s.make("red")
	s.make("green")
	s.note(s.Rotate(s.t.Context(), "red"))
	s.destroy("green")
	s.make("blue")
}

func (s *story) make(name string) {
	if _, err := s.CreateMasterKey(s.t.Context(), name, kms.KeyOptions{}); err != nil {
		s.note(0, err)
		return
	}
	wrapped, err := s.Wrap(s.t.Context(), name, plaintextOf(name), []byte("aad"))
	s.note(0, err)
	s.wrapped[name] = wrapped
}

func (s *story) destroy(name string) {
	s.doubtful[name] = true
	_, err := s.Destroy(s.t.Context(), name, 0)
	if err == nil {
		s.destroyed[name] = true
	}
	s.note(0, err)
}

func (s *story) note(_ int, err error) {
	if err != nil {
		s.failures = append(s.failures, err)
	}
}

// check opens the service anew and looks whether it kept its word.
func (s *story) check() {
	s.t.Helper()
	s.wantStates(api.MemberActive, api.MemberActive, api.MemberActive)
	s.wantConsistent()
	for name, wrapped := range s.wrapped {
		if s.doubtful[name] {
			key, err := s.Key(s.t.Context(), name)
			if err != nil || s.destroyed[name] && key.State != kms.StateDestroyed {
				s.t.Fatalf("key %s was destroyed, now it is %s, %v", name, key.State, err)
			}
			if key.State == kms.StateDestroyed {
				continue
			}
		}
		s.wantVerified(name)
		if wrapped != nil {
			for _, h := range s.hsms { // each member alone
				s.wantUnwrapOn(h, name, wrapped)
			}
		}
	}
}

// wantUnwrapOn unwraps with one member only.
func (r *rig) wantUnwrapOn(only *hsm, name string, wrapped []byte) {
	r.t.Helper()
	for _, h := range r.hsms {
		if h != only {
			h.leave()
		}
	}
	synctest.Wait()
	r.wantUnwrap(name, wrapped)
	for _, h := range r.hsms {
		h.come()
	}
	r.wantStates(api.MemberActive, api.MemberActive, api.MemberActive)
}

func TestCrashAtEveryCatalogStep(t *testing.T) {
	for step, more := 1, true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &story{rig: newRig(t, 3)}
				store := catalogtest.NewCrasher(s.disk.Reopen(), step)
				if err := s.start(store); err == nil {
					s.tell()
					s.stop()
				}
				if more = store.Crashed(); !more && s.failures != nil {
					t.Fatalf("without a crash: %v", errors.Join(s.failures...))
				}
				s.mustStart()
				defer s.stop()
				s.check()
			})
		})
	}
}

// interrupt calls what at the n-th step of all key operations on all members, and
// returns a function that tells whether it came to that.
func (r *rig) interrupt(n int64, what func(*hsm)) (reached func() bool) {
	var steps atomic.Int64
	for _, h := range r.hsms {
		h.setStep(func(h *hsm) {
			if steps.Add(1) == n {
				what(h)
			}
		})
	}
	return func() bool { return steps.Load() >= n }
}

func TestDaemonCrashAtEveryDriverStep(t *testing.T) {
	for step, more := int64(1), true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &story{rig: newRig(t, 3)}
				store := catalogtest.NewCrasher(s.disk.Reopen(), 1<<30)
				reached := s.interrupt(step, func(*hsm) {
					store.Crash()
					for _, h := range s.hsms {
						h.leave()
					}
				})
				if err := s.start(store); err == nil {
					s.tell()
					s.stop()
				}
				if more = reached(); !more && s.failures != nil {
					t.Fatalf("without a crash: %v", errors.Join(s.failures...))
				}
				for _, h := range s.hsms {
					h.come()
					h.step = nil
				}
				s.mustStart()
				defer s.stop()
				s.check()
			})
		})
	}
}

func TestMemberCrashAtEveryDriverStep(t *testing.T) {
	for step, more := int64(1), true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &story{rig: newRig(t, 3)}
				reached := s.interrupt(step, func(h *hsm) { h.driver().Crash() })
				s.mustStart()
				defer s.stop()
				s.tell()
				more = reached()
				if s.failures != nil {
					t.Fatalf("two members were left, but: %v", errors.Join(s.failures...))
				}
				s.check()
			})
		})
	}
}

// A member that freezes keeps what it was told to do, and does it when it wakes up
// unless its driver was killed meanwhile.
func TestMemberFreezesAtEveryDriverStep(t *testing.T) {
	for _, frozen := range []time.Duration{5 * time.Second, 30 * time.Second} { // it is found silent, it is given up
		for step, more := int64(1), true; more; step++ {
			t.Run(fmt.Sprintf("for %v in step %d", frozen, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &story{rig: newRig(t, 3)}
					reached := s.interrupt(step, func(h *hsm) {
						thawed := make(chan struct{})
						time.AfterFunc(frozen, func() { close(thawed) })
						h.driver().Script(memdriver.Fault{Hang: thawed})
						<-thawed
						h.driver().Clear()
					})
					s.mustStart()
					defer s.stop()
					began := time.Now()
					s.tell()
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("the story took %v, want no more than the silence is noticed in", took)
					}
					more = reached()
					if s.failures != nil {
						t.Fatalf("two members were left, but: %v", errors.Join(s.failures...))
					}
					<-time.After(2 * frozen)
					s.check()
				})
			})
		}
	}
}

func TestCallerLeavesAtEveryDriverStep(t *testing.T) {
	for step, more := int64(1), true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3)
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				reached := r.interrupt(step, func(*hsm) { leave() })
				r.mustStart()
				defer r.stop()
				_, made := r.CreateMasterKey(ctx, "red", kms.KeyOptions{})
				_, rotated := r.Rotate(ctx, "red")
				_, destroyed := r.Destroy(ctx, "red", 0)
				more = reached()
				for _, err := range []error{made, rotated, destroyed} {
					if err == nil || errors.Is(err, kms.ErrDeadline) || made != nil && errors.Is(err, kms.ErrNotFound) {
						continue
					}
					t.Errorf("unexpected: %v", err)
				}
				r.wantConsistent()
				if destroyed == nil {
					return
				}
				// Whoever was left in doubt can ask, or do it again.
				if _, err := r.CreateMasterKey(t.Context(), "red", kms.KeyOptions{}); err != nil && !errors.Is(err, kms.ErrExists) {
					t.Errorf("creating it again: %v", err)
				}
				if key, err := r.Key(t.Context(), "red"); err != nil {
					t.Errorf("the key: %v", err)
				} else if key.State == kms.StateEnabled {
					r.wantUnwrap("red", r.wrap("red"))
				}
				r.wantConsistent()
			})
		})
	}
}

func TestCloseAtEveryDriverStep(t *testing.T) {
	for step, more := int64(1), true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &story{rig: newRig(t, 3)}
				closed := make(chan error, 1)
				begun := make(chan struct{})
				begin := sync.OnceFunc(func() { close(begun) })
				reached := s.interrupt(step, func(*hsm) { begin() })
				s.mustStart()
				go func() {
					<-begun
					closed <- s.Close()
				}()
				s.tell()
				more = reached()
				begin()
				if err := <-closed; err != nil {
					t.Fatal(err)
				}
				for _, err := range s.failures {
					if !errors.Is(err, kms.ErrUnavailable) && !errors.Is(err, kms.ErrNotFound) {
						t.Errorf("while it was closed: %v", err)
					}
				}
				s.mustStart()
				defer s.stop()
				s.check()
			})
		})
	}
}
