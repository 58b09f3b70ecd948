package kms

import (
	"context"
	"fmt"
	"sync"
)

// making is what is being made in a group just now, with or without the lease. Its
// zero value is ready.
type making struct {
	mu         sync.Mutex               // guards the rest
	claimed    map[string]chan struct{} // :: key → closed when it is given up
	identities map[string]bool          // whose intents are not a crash's
}

// claim waits until nobody else makes a version of the key.
func (m *making) claim(ctx context.Context, key string) (release func(), err error) {
	for {
		m.mu.Lock()
		other, taken := m.claimed[key]
		if !taken {
			if m.claimed == nil {
				m.claimed = make(map[string]chan struct{})
			}
			mine := make(chan struct{})
			m.claimed[key] = mine
			m.mu.Unlock()
			return func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				delete(m.claimed, key)
				close(mine)
			}, nil
		}
		m.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the version of key %s that is being made: %w", key, ctx.Err())
		}
	}
}

// begun says that an intent for the identity is about to be written.
func (m *making) begun(identity string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.identities == nil {
		m.identities = make(map[string]bool)
	}
	m.identities[identity] = true
}

// ended says that its intent is gone, or is to be taken back by whoever finds it.
func (m *making) ended(identity string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.identities, identity)
}

// has reports whether an identity is being made.
func (m *making) has(identity string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.identities[identity]
}
