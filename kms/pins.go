package kms

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"

	"kmsd/pluginproto"
)

// pins remembers which PIN a token has refused, so that none is tried twice: a few
// wrong ones lock a token for good. It keeps a keyed digest, not the PIN, under a
// key that this process alone has and forgets.
type pins struct {
	key []byte // random

	mu      sync.Mutex         // guards refused
	refused map[string]refusal // :: slot → what was refused last
}

type refusal struct {
	digest [sha256.Size]byte
	ckr    uint
}

func newPINs() (*pins, error) {
	key := make([]byte, sha256.Size)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("drawing a key for digests of PINs: %w", err)
	}
	return &pins{key: key, refused: make(map[string]refusal)}, nil
}

func (p *pins) digest(pin []byte) (d [sha256.Size]byte) {
	h := hmac.New(sha256.New, p.key)
	h.Write(pin)
	h.Sum(d[:0])
	return d
}

// slotOf tells under what refusals of a member's PIN are remembered: where its token is,
// so that no other name tries the PIN again, and a member that is described anew is not
// blamed for another token. A driver in this process need not say where its token is.
func slotOf(group string, m MemberConfig) string {
	if m.Open != nil {
		return group + "/" + m.Name + "/" + placeOf(m)
	}
	return placeOf(m)
}

// check returns a permanent error for the PIN that was refused in this slot the last time.
func (p *pins) check(slot, member string, pin []byte) error {
	d := p.digest(pin)
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.refused[slot]
	if !ok || !hmac.Equal(d[:], r.digest[:]) {
		return nil
	}
	return &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: r.ckr, Permanent: true,
		Op: "logging in to member " + member,
		Msg: "the token has refused this PIN, so it is not tried again; it will be as soon as another PIN is given, " +
			"or, when the token has been given this PIN, with: kmsd member replace " + member,
	}
}

// note remembers how a login with this PIN ended.
func (p *pins) note(slot string, pin []byte, err error) {
	d := p.digest(pin)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch ckr := pluginproto.CKROf(err); {
	case err == nil:
		delete(p.refused, slot)
	case ckr == pluginproto.CKRPINIncorrect || ckr == pluginproto.CKRPINLocked:
		p.refused[slot] = refusal{digest: d, ckr: ckr}
	}
}

// forget lets the PIN be tried once more: somebody says that the token is another now.
func (p *pins) forget(slot string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.refused, slot)
}
