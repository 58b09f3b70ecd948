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
	refused map[string]refusal // :: group/member → what was refused last
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

// check returns a permanent error for the PIN that was refused the last time.
func (p *pins) check(member string, pin []byte) error {
	d := p.digest(pin)
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.refused[member]
	if !ok || !hmac.Equal(d[:], r.digest[:]) {
		return nil
	}
	return &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: r.ckr, Permanent: true,
		Op:  "logging in to member " + member,
		Msg: "the token has refused this PIN, so it is not tried again; it will be as soon as another PIN is given",
	}
}

// note remembers how a login with this PIN ended.
func (p *pins) note(member string, pin []byte, err error) {
	d := p.digest(pin)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch ckr := pluginproto.CKROf(err); {
	case err == nil:
		delete(p.refused, member)
	case ckr == pluginproto.CKRPINIncorrect || ckr == pluginproto.CKRPINLocked:
		p.refused[member] = refusal{digest: d, ckr: ckr}
	}
}
