// Package memdriver answers: what would a token do that is made of memory and
// breaks when a test says so?
//
// A [Token] is the HSM: it keeps its keys, its PIN and its serial number while
// drivers come and go. A [Driver] is one process that has it open; a restart is a
// new Driver on the same Token. The cryptography is real, so ciphertexts, signatures
// and check values agree between tokens that hold the same key.
//
// Faults are scripted ([Driver.Script]) or happen to the driver ([Driver.Crash],
// [Driver.LoseSessions]) or to the token ([Token.Unplug], [Token.Lose],
// [Token.Corrupt]). Nothing happens by chance.
package memdriver

import (
	"fmt"
	"slices"
	"sync"

	"kmsd/pluginproto"
)

// Token is an HSM in memory. Its zero value is not usable; see [NewToken]. All
// methods may be called at any time, from any goroutine.
type Token struct {
	label, serial string

	mu        sync.Mutex // guards what follows
	pin       string
	pinTries  int // logins with a wrong PIN, ever
	unplugged bool
	drivers   int // made for it, ever
	keys      map[pluginproto.KeyID]*key
}

// PIN is the PIN of a new token.
const PIN = "1234"

// NewToken makes an empty token. Its serial number is made from its label.
func NewToken(label string) *Token {
	return &Token{
		label:  label,
		serial: fmt.Sprintf("mem-%s", label),
		pin:    PIN,
		keys:   make(map[pluginproto.KeyID]*key),
	}
}

// Label returns the token's label.
func (t *Token) Label() string { return t.label }

// SetPIN changes the PIN. Drivers that have logged in stay so.
func (t *Token) SetPIN(pin string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pin = pin
}

// PINTries returns how often a wrong PIN was tried, over all drivers.
func (t *Token) PINTries() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pinTries
}

// Unplug makes the token unreachable: every call of every driver fails with
// ClassMember, and opening it fails with CKR_TOKEN_NOT_PRESENT.
func (t *Token) Unplug() { t.plug(true) }

// Plug undoes Unplug. Drivers that had the token open have lost their sessions.
func (t *Token) Plug() { t.plug(false) }

func (t *Token) plug(unplugged bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unplugged = unplugged
}

// Keys returns the identities of the keys on the token, sorted.
func (t *Token) Keys() []pluginproto.KeyID {
	t.mu.Lock()
	defer t.mu.Unlock()
	ids := make([]pluginproto.KeyID, 0, len(t.keys))
	for id := range t.keys {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b pluginproto.KeyID) int { return slices.Compare(a[:], b[:]) })
	return ids
}

// Lose makes a key vanish, as if somebody else had destroyed it. It reports whether
// the key was there.
func (t *Token) Lose(id pluginproto.KeyID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.keys[id]
	delete(t.keys, id)
	return ok
}

// Corrupt puts another key of the same type under the identity, so that its check
// value is wrong. It reports whether there was a key.
func (t *Token) Corrupt(id pluginproto.KeyID) bool {
	old, ok := t.find(id)
	if !ok {
		return false
	}
	other, err := newKey(old.typ, old.label)
	if err != nil {
		panic("memdriver: making a key of a type that was made before: " + err.Error())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.keys[id]; !ok { // it was destroyed meanwhile, and does not come back
		return false
	}
	t.keys[id] = other
	return true
}

// login counts wrong PINs, as an HSM does.
func (t *Token) login(pin []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	op := "logging in to token " + t.label
	if t.unplugged {
		return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRTokenNotPresent, Op: op}
	}
	if string(pin) != t.pin {
		t.pinTries++
		return &pluginproto.Error{
			Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINIncorrect, Op: op,
			Msg: "set the right PIN", Permanent: true,
		}
	}
	return nil
}

// nextPID counts the drivers of the token.
func (t *Token) nextPID() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drivers++
	return t.drivers
}

func (t *Token) reachable() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.unplugged
}

// find returns a key; keys are never changed once they are on a token.
func (t *Token) find(id pluginproto.KeyID) (*key, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.keys[id]
	return k, ok
}

// add puts a key on the token unless the identity is taken; then it returns the key
// that is there.
func (t *Token) add(id pluginproto.KeyID, k *key) (*key, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.keys[id]; ok {
		return old, false
	}
	t.keys[id] = k
	return k, true
}

func (t *Token) setLabel(id pluginproto.KeyID, label string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.keys[id]
	if !ok {
		return false
	}
	next := *k
	next.label = label
	t.keys[id] = &next
	return true
}

func (t *Token) objects() []pluginproto.Object {
	t.mu.Lock()
	defer t.mu.Unlock()
	objects := make([]pluginproto.Object, 0, len(t.keys))
	for id, k := range t.keys {
		objects = append(objects, k.object(id))
	}
	return objects
}
