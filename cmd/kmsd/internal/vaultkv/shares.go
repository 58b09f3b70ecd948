package vaultkv

import "sync"

// shares keep one principal from taking all of the room for requests, with bodies that
// come slowly, say.
type shares struct {
	most int // requests of one principal at once

	mu    sync.Mutex     // guards taken
	taken map[string]int // :: principal → requests in flight
}

// take takes one request's room. It reports false when the principal has its share.
func (s *shares) take(principal string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[principal] == s.most {
		return false
	}
	s.taken[principal]++
	return true
}

// give gives back what take took.
func (s *shares) give(principal string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[principal]--; s.taken[principal] == 0 {
		delete(s.taken, principal)
	}
}
