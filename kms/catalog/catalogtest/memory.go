package catalogtest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"kmsd/kms/catalog"
)

// Memory is a Store that forgets everything with the process. It is for tests
// that open and crash a catalog thousands of times; Close does not empty it, and
// Reopen gives a Store on the same records.
type Memory struct {
	disk   *disk
	mu     sync.Mutex // guards closed; taken before disk.mu
	closed bool
}

type disk struct {
	mu      sync.Mutex // guards what follows
	rev     uint64
	records map[catalog.Kind]map[string]catalog.Record
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory {
	d := &disk{records: make(map[catalog.Kind]map[string]catalog.Record)}
	for _, k := range catalog.Kinds() {
		d.records[k] = make(map[string]catalog.Record)
	}
	return &Memory{disk: d}
}

// Reopen returns another Store on the same records, as after a restart.
func (m *Memory) Reopen() *Memory { return &Memory{disk: m.disk} }

func (m *Memory) Get(ctx context.Context, kind catalog.Kind, id string) (catalog.Record, error) {
	if err := m.check(ctx); err != nil {
		return catalog.Record{}, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	r, ok := m.disk.records[kind][id]
	if !ok {
		return catalog.Record{}, catalog.ErrNotFound
	}
	r.Value = bytes.Clone(r.Value)
	return r, nil
}

func (m *Memory) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	return func(yield func(catalog.Record, error) bool) {
		if err := m.check(ctx); err != nil {
			yield(catalog.Record{}, err)
			return
		}
		m.disk.mu.Lock()
		all := maps.Clone(m.disk.records[kind])
		m.disk.mu.Unlock()
		if limit == 0 {
			limit = len(all)
		}
		for _, id := range slices.Sorted(maps.Keys(all)) {
			if !strings.HasPrefix(id, prefix) || id <= after {
				continue
			}
			if limit--; limit == -1 {
				return
			}
			if err := ctx.Err(); err != nil {
				yield(catalog.Record{}, err)
				return
			}
			r := all[id]
			r.Value = bytes.Clone(r.Value)
			if !yield(r, nil) {
				return
			}
		}
	}
}

func (m *Memory) Count(ctx context.Context, kind catalog.Kind, prefix string) (n int, err error) {
	if err := m.check(ctx); err != nil {
		return 0, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	for id := range m.disk.records[kind] {
		if strings.HasPrefix(id, prefix) {
			n++
		}
	}
	return n, nil
}

func (m *Memory) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	if err := catalog.CheckChanges(changes); err != nil {
		return 0, err
	}
	if err := m.check(ctx); err != nil {
		return 0, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	for _, c := range changes {
		if has := m.disk.records[c.Kind][c.ID].Rev; has != c.Rev {
			return 0, fmt.Errorf("%s %q is at revision %d, not %d: %w", c.Kind, c.ID, has, c.Rev, catalog.ErrConflict)
		}
	}
	m.disk.rev++
	for _, c := range changes {
		switch {
		case c.Keep:
		case c.Value == nil:
			delete(m.disk.records[c.Kind], c.ID)
		default:
			c.Rev, c.Value = m.disk.rev, bytes.Clone(c.Value)
			m.disk.records[c.Kind][c.ID] = c
		}
	}
	return m.disk.rev, nil
}

func (m *Memory) Rev(ctx context.Context) (uint64, error) {
	if err := m.check(ctx); err != nil {
		return 0, err
	}
	m.disk.mu.Lock()
	defer m.disk.mu.Unlock()
	return m.disk.rev, nil
}

func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

func (m *Memory) check(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return catalog.ErrClosed
	}
	return ctx.Err()
}
