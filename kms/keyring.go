package kms

import (
	"fmt"
	"slices"
	"sync"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// keyring is what the catalog knows about keys, in memory, so that no wrap and
// no unwrap reads the catalog. This process is the only one that writes the
// catalog, and every write goes through put.
type keyring struct {
	keys  sync.Map // :: name → *key, immutable
	tally *tally

	mu     sync.Mutex            // guards counts; held while a key is replaced
	counts map[string]*keyCounts // :: group → how many versions live, and where
}

type keyCounts struct {
	living  int
	below   int            // of them, those on fewer members than their key's min_copies
	without int            // of those, the ones on no member
	held    map[string]int // :: member → living versions known to be on it
}

// key is one key as it is at one revision. It never changes.
type key struct {
	rec     catalog.Key
	typ     pluginproto.KeyType
	ids     []pluginproto.KeyID       // by index in rec.Versions
	byID    map[pluginproto.KeyID]int // :: identity → index in rec.Versions
	primary int                       // index of the newest enabled version; -1: none
	alg     envelope.Algorithm        // 0: this type does not wrap
	uses    []*usage                  // by index in rec.Versions; none when it does not wrap
}

func newKeyring(limits wrapLimits) *keyring {
	return &keyring{tally: newTally(limits), counts: make(map[string]*keyCounts)}
}

func (r *keyring) newKey(rec catalog.Key) (*key, error) {
	k := &key{
		rec: rec, typ: pluginproto.KeyType(rec.Type), primary: -1,
		ids:  make([]pluginproto.KeyID, len(rec.Versions)),
		byID: make(map[pluginproto.KeyID]int, len(rec.Versions)),
	}
	switch k.typ {
	case pluginproto.AES256:
		k.alg = envelope.AES256GCM
	case pluginproto.AES128:
		k.alg = envelope.AES128GCM
	}
	for i, v := range rec.Versions {
		id, err := pluginproto.ParseKeyID(v.Identity)
		if err != nil {
			return nil, fmt.Errorf("reading key %s version %d: %w", rec.Name, v.Number, err)
		}
		k.ids[i] = id
		k.byID[id] = i
		if v.State == catalog.Enabled {
			k.primary = i
		}
		if k.alg != 0 {
			k.uses = append(k.uses, r.tally.of(rec, v))
		}
	}
	return k, nil
}

// get returns a key, or ErrNotFound: what the ring does not have, the catalog
// does not have. A name that no key can have is ErrBadRequest.
func (r *keyring) get(name string) (*key, error) {
	if v, ok := r.keys.Load(name); ok {
		return v.(*key), nil
	}
	if err := api.CheckName(name); err != nil {
		return nil, err
	}
	return nil, notFound(name)
}

// put makes the ring know a record that was read from the catalog or written to
// it. An older one than the ring has is ignored, so writers need no order.
func (r *keyring) put(rec catalog.Key) error {
	k, err := r.newKey(rec)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if v, ok := r.keys.Load(rec.Name); ok {
		old := v.(*key)
		if old.rec.Rev >= rec.Rev {
			return nil
		}
		r.countLocked(old, -1)
	}
	r.countLocked(k, 1)
	r.keys.Store(rec.Name, k)
	return nil
}

func (r *keyring) countLocked(k *key, by int) {
	c := r.counts[k.rec.Group]
	if c == nil {
		c = &keyCounts{held: make(map[string]int)}
		r.counts[k.rec.Group] = c
	}
	for _, v := range k.rec.Versions {
		if !living(v) {
			continue
		}
		c.living += by
		if len(v.Copies) < k.rec.MinCopies {
			c.below += by
		}
		if len(v.Copies) == 0 {
			c.without += by
		}
		for _, m := range v.Copies {
			c.held[m] += by
		}
	}
}

// count returns how many versions live in a group, and how many of them a member
// is known to hold.
func (r *keyring) count(group, member string) (alive, held int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.counts[group]
	if c == nil {
		return 0, 0
	}
	return c.living, c.held[member]
}

// scarce returns how many versions of a group are on fewer members than they should be,
// and how many of those on none, as far as is known.
func (r *keyring) scarce(group string) (below, without int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.counts[group]; c != nil {
		return c.below, c.without
	}
	return 0, 0
}

// inGroup calls fn with every key of a group, in no order, until fn returns false.
func (r *keyring) inGroup(group string, fn func(*key) bool) {
	r.keys.Range(func(_, v any) bool {
		k := v.(*key)
		return k.rec.Group != group || fn(k)
	})
}

// copyOf returns version i as members should hold it.
func (k *key) copyOf(i int) replica.Copy {
	v := k.rec.Versions[i]
	return replica.Copy{ID: k.ids[i], Type: k.typ, CheckValue: v.CheckValue, Key: k.rec.Name, Version: v.Number, Members: v.Copies}
}

// number returns the index of a version by its number; 0 means the newest enabled.
func (k *key) number(n int) (int, error) {
	if n == 0 {
		if k.primary < 0 {
			return 0, k.unusable()
		}
		return k.primary, nil
	}
	i := k.index(n)
	if i < 0 {
		return 0, api.NewError(api.CodeNotFound, fmt.Sprintf("key %s has no version %d", k.rec.Name, n), nil)
	}
	return i, k.usable(i)
}

// index returns the place of a version by its number, -1 when there is none.
func (k *key) index(number int) int {
	return slices.IndexFunc(k.rec.Versions, func(v catalog.Version) bool { return v.Number == number })
}

// gone reports whether the version that a copy is of was destroyed. Of a key that it does not
// know it says nothing.
func (r *keyring) gone(c replica.Copy) bool {
	k, err := r.get(c.Key)
	if err != nil {
		return false
	}
	i, known := k.byID[c.ID]
	return known && !living(k.rec.Versions[i])
}

// usable returns ErrState when version i may not be used.
func (k *key) usable(i int) error {
	v := k.rec.Versions[i]
	if v.State == catalog.Enabled {
		return nil
	}
	return stateError(wayOut(v.State), "version %d of key %s is %s", v.Number, k.rec.Name, inWords(v.State))
}

// unusable is ErrState for a key none of whose versions is enabled.
func (k *key) unusable() error {
	s := stateOf(k.rec)
	return stateError(wayOut(s), "key %s is %s", k.rec.Name, inWords(s))
}

func inWords(s catalog.State) string {
	if s == catalog.DestroyScheduled {
		return "scheduled for destruction"
	}
	return string(s)
}

func wayOut(s catalog.State) string {
	switch s {
	case catalog.Disabled:
		return "enable the key"
	case catalog.DestroyScheduled:
		return "restore the key before it is destroyed"
	case catalog.Destroyed:
		return "what was wrapped with it can never be unwrapped again"
	default:
		return ""
	}
}

func living(v catalog.Version) bool { return v.State != catalog.Destroyed }

// stateOf is the state of a key as a whole: that of its liveliest version.
func stateOf(rec catalog.Key) catalog.State {
	for _, s := range []catalog.State{catalog.Enabled, catalog.Disabled, catalog.DestroyScheduled} {
		if slices.ContainsFunc(rec.Versions, func(v catalog.Version) bool { return v.State == s }) {
			return s
		}
	}
	return catalog.Destroyed
}
