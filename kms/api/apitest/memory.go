package apitest

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"kmsd/kms/api"
)

// The one group of a Memory, and the member that it begins with.
const (
	MemoryGroup  = "default"
	MemoryMember = "hsm-a"
)

// Memory is a service whose keys are in this process. It is for tests of what
// stands on an api.Service; it keeps nothing safe. The zero value is ready.
type Memory struct {
	// Fail, when set, is asked before each call and can make it fail. It is set
	// before the first call. The name is "" for what has no key.
	Fail func(ctx context.Context, method, name string) error
	// Unready makes Ready say no.
	Unready bool
	// Formats says for databases, by name, what their data keys must be; see
	// api.FormatMariaDB. It is set before the first call.
	Formats map[string]string

	mu        sync.Mutex // guards the rest
	keys      map[string]*memoryKey
	databases map[string]*memoryDatabase
	jobs      map[string]api.Job // :: ID → how it has ended
	readers   map[chan api.Event]struct{}
	members   []api.Member
	born      bool        // members has been filled
	log       []api.Event // of members
}

var (
	_ api.Service   = (*Memory)(nil)
	_ api.Admin     = (*Memory)(nil)
	_ api.Databases = (*Memory)(nil)
	_ api.Backups   = (*Memory)(nil)
)

// memoryKey is a key and what its versions hold, in the order of their numbers.
type memoryKey struct {
	api.Key
	secrets []secret
}

// secret is what a version holds: bytes, or a private key.
type secret struct {
	identity [16]byte
	bytes    []byte
	private  crypto.Signer
}

// begin holds every call against Fail, ctx and the rules for names.
func (m *Memory) begin(ctx context.Context, method, name string) error {
	if m.Fail != nil {
		if err := m.Fail(ctx, method, name); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return api.NewError(api.CodeDeadline, "the request's time is over", err)
	}
	return nil
}

// with calls f with the key of that name, under the lock.
func (m *Memory) with(ctx context.Context, method, name string, f func(k *memoryKey) error) error {
	if err := m.begin(ctx, method, name); err != nil {
		return err
	}
	if err := api.CheckName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	k, ok := m.keys[name]
	if !ok {
		return api.NewError(api.CodeNotFound, "no key is named "+name, nil)
	}
	return f(k)
}

// change is with for what changes a key and returns it.
func (m *Memory) change(ctx context.Context, method, name, done string, f func(k *memoryKey) error) (api.Key, error) {
	var after api.Key
	err := m.with(ctx, method, name, func(k *memoryKey) error {
		if err := f(k); err != nil {
			return err
		}
		after = k.copy()
		if done != "" {
			m.tellLocked(api.Event{Time: time.Now(), Type: "key", Key: name, To: done})
		}
		return nil
	})
	return after, err
}

func (k *memoryKey) copy() api.Key {
	c := k.Key
	c.Versions, c.Databases = slices.Clone(c.Versions), slices.Clone(c.Databases)
	return c
}

// CreateMasterKey makes a key with its version 1.
func (m *Memory) CreateMasterKey(ctx context.Context, name string, opts api.KeyOptions) (api.Key, error) {
	if err := m.begin(ctx, "CreateMasterKey", name); err != nil {
		return api.Key{}, err
	}
	if err := api.CheckName(name); err != nil {
		return api.Key{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	k, err := m.makeLocked(name, opts)
	if err != nil {
		return api.Key{}, err
	}
	return k.copy(), nil
}

func (m *Memory) makeLocked(name string, opts api.KeyOptions) (*memoryKey, error) {
	if opts.Group != "" && opts.Group != MemoryGroup {
		return nil, api.NewError(api.CodeBadRequest, "no group is named "+opts.Group, nil)
	}
	if _, taken := m.keys[name]; taken {
		return nil, api.NewError(api.CodeExists, "a key is named "+name+" already", nil)
	}
	k := &memoryKey{Key: api.Key{
		Name: name, Group: MemoryGroup, Type: cmp.Or(opts.Type, "aes-256"), State: api.StateEnabled,
		MinCopies: cmp.Or(opts.MinCopies, 1), RotationPeriod: opts.RotationPeriod, Created: time.Now().UTC(),
	}}
	if err := k.rotate(m.holdersLocked()); err != nil {
		return nil, err
	}
	if m.keys == nil {
		m.keys = make(map[string]*memoryKey)
	}
	m.keys[name] = k
	m.tellLocked(api.Event{Time: time.Now(), Type: "key", Key: name, To: "created"})
	return k, nil
}

// rotate adds the next version.
func (k *memoryKey) rotate(holders []string) error {
	s, public, err := generate(k.Type)
	if err != nil {
		return err
	}
	check := sha256.Sum256(slices.Concat(s.bytes, public))
	k.secrets = append(k.secrets, s)
	k.Primary = len(k.secrets)
	k.Versions = append(k.Versions, api.Version{
		Number: k.Primary, State: api.StateEnabled, Created: time.Now().UTC(), CheckValue: hex.EncodeToString(check[:]),
		PublicKey: public, Copies: holders,
	})
	return nil
}

// setState moves every version that lives.
func (k *memoryKey) setState(s api.State, at *time.Time) {
	for i := range k.Versions {
		if k.Versions[i].State != api.StateDestroyed {
			k.setVersion(i, s, at)
		}
	}
}

// is returns ErrState unless the key is in one of the states.
func (k *memoryKey) is(states ...api.State) error {
	if slices.Contains(states, k.State) {
		return nil
	}
	return api.NewError(api.CodeState, fmt.Sprintf("key %s is %s", k.Name, k.State), nil)
}

// Key shows a key.
func (m *Memory) Key(ctx context.Context, name string) (api.Key, error) {
	return m.change(ctx, "Key", name, "", func(*memoryKey) error { return nil })
}

// Keys lists keys by name.
func (m *Memory) Keys(ctx context.Context, opts api.ListOptions) (api.KeyPage, error) {
	if err := m.begin(ctx, "Keys", ""); err != nil {
		return api.KeyPage{}, err
	}
	if opts.Limit < 0 || opts.Limit > api.MaxPage {
		return api.KeyPage{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("a page has 1 to %d keys", api.MaxPage), nil)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	page := api.KeyPage{Keys: []api.Key{}}
	for _, name := range slices.Sorted(maps.Keys(m.keys)) {
		if !strings.HasPrefix(name, opts.Prefix) || name <= opts.After {
			continue
		}
		if len(page.Keys) == cmp.Or(opts.Limit, 100) {
			page.Next = page.Keys[len(page.Keys)-1].Name
			break
		}
		page.Keys = append(page.Keys, m.keys[name].copy())
	}
	return page, nil
}

// UpdateKey changes what the key's owner may change.
func (m *Memory) UpdateKey(ctx context.Context, name string, up api.KeyUpdate) (api.Key, error) {
	return m.change(ctx, "UpdateKey", name, "updated", func(k *memoryKey) error {
		if up.MinCopies != nil {
			k.MinCopies = *up.MinCopies
		}
		if up.RotationPeriod != nil {
			k.RotationPeriod = *up.RotationPeriod
		}
		return nil
	})
}

// Rotate makes the next version.
func (m *Memory) Rotate(ctx context.Context, name string) (int, error) {
	v, err := m.RotateWith(ctx, name, api.RotateOptions{})
	return v.Number, err
}

// RotateWith makes the next version. Every member takes it, so no choice matters.
func (m *Memory) RotateWith(ctx context.Context, name string, _ api.RotateOptions) (api.Version, error) {
	k, err := m.change(ctx, "Rotate", name, "rotated", func(k *memoryKey) error {
		if err := k.is(api.StateEnabled); err != nil {
			return err
		}
		return k.rotate(m.holdersLocked())
	})
	if err != nil {
		return api.Version{}, err
	}
	return k.Versions[len(k.Versions)-1], nil
}

// Disable refuses every use of a key until Enable.
func (m *Memory) Disable(ctx context.Context, name string) (api.Key, error) {
	return m.move(ctx, "Disable", name, api.StateDisabled, api.StateEnabled, api.StateDisabled)
}

// Enable undoes Disable.
func (m *Memory) Enable(ctx context.Context, name string) (api.Key, error) {
	return m.move(ctx, "Enable", name, api.StateEnabled, api.StateDisabled, api.StateEnabled)
}

// Restore takes a scheduled destruction back.
func (m *Memory) Restore(ctx context.Context, name string) (api.Key, error) {
	return m.move(ctx, "Restore", name, api.StateEnabled, api.StateDestroyScheduled)
}

func (m *Memory) move(ctx context.Context, method, name string, to api.State, from ...api.State) (api.Key, error) {
	return m.change(ctx, method, name, string(to), func(k *memoryKey) error {
		if err := k.is(from...); err != nil {
			return err
		}
		k.setState(to, nil)
		return nil
	})
}

// Destroy schedules the destruction of every version. What is due later stays
// scheduled for ever.
func (m *Memory) Destroy(ctx context.Context, name string, window time.Duration) (api.Key, error) {
	return m.change(ctx, "Destroy", name, "destroyed", func(k *memoryKey) error {
		if err := k.is(api.StateEnabled, api.StateDisabled, api.StateDestroyScheduled); err != nil {
			return err
		}
		if m.usedLocked(k, 0) {
			return api.NewError(api.CodeState, "key "+name+" wraps the data keys of a database", nil)
		}
		k.setState(doomed(window))
		return nil
	})
}

// doomed is the state of what is destroyed after a window.
func doomed(window time.Duration) (api.State, *time.Time) {
	if window == 0 {
		return api.StateDestroyed, nil
	}
	if window < 0 {
		window = 720 * time.Hour
	}
	at := time.Now().Add(window).UTC()
	return api.StateDestroyScheduled, &at
}

// Verify says that all is well.
func (m *Memory) Verify(ctx context.Context, name string) (api.Verification, error) {
	v := api.Verification{Name: name, OK: true, Copies: []api.Copy{}}
	err := m.with(ctx, "Verify", name, func(k *memoryKey) error {
		for _, version := range k.Versions {
			for _, member := range version.Copies {
				v.Copies = append(v.Copies, api.Copy{Version: version.Number, Member: member, State: "ok", CheckValue: version.CheckValue})
			}
		}
		return nil
	})
	return v, err
}

// Random returns n random bytes.
func (m *Memory) Random(ctx context.Context, group string, n int) ([]byte, error) {
	if err := m.begin(ctx, "Random", ""); err != nil {
		return nil, err
	}
	if group != "" && group != MemoryGroup {
		return nil, api.NewError(api.CodeNotFound, "no group is named "+group, nil)
	}
	if n < 1 || n > api.MaxRandom {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("random bytes come in 1 to %d", api.MaxRandom), nil)
	}
	b := make([]byte, n)
	rand.Read(b)
	return b, nil
}

// Status shows the one group.
func (m *Memory) Status() api.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return api.Status{Version: "memory", Groups: []api.Group{m.groupLocked()}}
}

// Ready says what Unready does not.
func (m *Memory) Ready() api.Readiness {
	return api.Readiness{Ready: !m.Unready, Members: []api.MemberReadiness{{Group: MemoryGroup, Member: MemoryMember, OK: !m.Unready}}}
}

// Events yields what happens from the call on.
func (m *Memory) Events(ctx context.Context) iter.Seq[api.Event] {
	reader := make(chan api.Event, 100)
	m.mu.Lock()
	if m.readers == nil {
		m.readers = make(map[chan api.Event]struct{})
	}
	m.readers[reader] = struct{}{}
	m.mu.Unlock()
	return func(yield func(api.Event) bool) {
		defer func() {
			m.mu.Lock()
			delete(m.readers, reader)
			m.mu.Unlock()
		}()
		for {
			select {
			case e := <-reader:
				if !yield(e) {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}
}

// Readers is how many listen to events now.
func (m *Memory) Readers() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.readers)
}

// tellLocked gives an event to those who listen and have room for it.
func (m *Memory) tellLocked(e api.Event) {
	for reader := range m.readers {
		select {
		case reader <- e:
		default:
		}
	}
}

// Close does nothing.
func (m *Memory) Close() error { return nil }
