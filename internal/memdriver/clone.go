package memdriver

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"sync"

	"kmsd/pluginproto"
)

// A clone between two memory tokens has two rounds, so that a relay which mixes up
// its steps is found out:
//
//	source 0            → offer: type, label, check value
//	target 0: offer     → nonce, or Done when the key is there already
//	source 1: nonce     → the key, sealed under the domain key
//	target 1: the key   → Done
//
// With Options.OneStepClones there is one:
//
//	source 0            → the key, sealed under the domain key, Done
//	target 0: the key   → Done
//
// Every blob is authenticated under the domain key together with the transfer, the
// key, the direction and the step, so none of them fits anywhere else.

// clones remembers transfers between their steps.
type clones struct {
	mu    sync.Mutex // guards what follows
	at    map[transferID]*transfer
	order []transferID // oldest first
}

// transfer is one clone at one end.
type transfer struct {
	key   pluginproto.KeyID
	step  int // the next one
	nonce []byte
	offer offer
}

// maxTransfers are remembered at once; past it the oldest is forgotten.
const maxTransfers = 256

type offer struct {
	Type   pluginproto.KeyType `json:"type"`
	Label  string              `json:"label"`
	Check  []byte              `json:"check"`
	Nonce  []byte              `json:"nonce,omitempty"`
	Secret []byte              `json:"secret,omitempty"`
}

const cloneOp = "cloning a key"

func cloneRefused(format string, args ...any) error {
	return pluginproto.Errorf(pluginproto.ClassCaller, cloneOp, format, args...)
}

func (d *Driver) cloneOne(req oneStep) (oneReply, error) {
	switch {
	case req.role == pluginproto.CloneSource && req.step == 0:
		return d.offer(req)
	case req.role == pluginproto.CloneTarget && req.step == 0:
		return d.consider(req)
	case req.role == pluginproto.CloneSource && req.step == 1:
		return d.give(req)
	case req.role == pluginproto.CloneTarget && req.step == 1:
		return d.receive(req)
	default:
		return oneReply{}, cloneRefused("there is no step %d", req.step)
	}
}

// offer is the source's step 0.
func (d *Driver) offer(req oneStep) (oneReply, error) {
	if len(req.blob) > 0 {
		return oneReply{}, cloneRefused("the source's first step takes no blob")
	}
	k, ok := d.token.find(req.key)
	if !ok {
		return oneReply{}, absent("cloning key", req.key)
	}
	object := k.object(req.key)
	if d.opts.OneStepClones {
		blob, err := d.sealKey(req, k, nil)
		if err != nil {
			return oneReply{}, err
		}
		return oneReply{blob: blob, done: true, object: &object}, nil
	}
	blob, err := d.seal(req, offer{Type: k.typ, Label: k.label, Check: k.check})
	if err != nil {
		return oneReply{}, err
	}
	d.clones.put(req, &transfer{key: req.key, step: 1})
	return oneReply{blob: blob, object: &object}, nil
}

// consider is the target's step 0.
func (d *Driver) consider(req oneStep) (oneReply, error) {
	o, err := d.unseal(req)
	if err != nil {
		return oneReply{}, err
	}
	defer clear(o.Secret)
	switch {
	case len(o.Secret) > 0:
		return d.accept(req, o)
	case req.prove:
		return oneReply{}, cloneRefused("the blob does not hold a key: keys go from token to token in more than one step")
	}
	if k, ok := d.token.find(req.key); ok {
		return holds(req.key, k, o.Check)
	}
	nonce := make([]byte, 16)
	rand.Read(nonce) // never fails
	blob, err := d.seal(req, offer{Nonce: nonce})
	if err != nil {
		return oneReply{}, err
	}
	d.clones.put(req, &transfer{key: req.key, step: 1, nonce: nonce, offer: o})
	return oneReply{blob: blob}, nil
}

// give is the source's step 1.
func (d *Driver) give(req oneStep) (oneReply, error) {
	if _, err := d.clones.take(req); err != nil {
		return oneReply{}, err
	}
	o, err := d.unseal(req)
	if err != nil {
		return oneReply{}, err
	}
	k, ok := d.token.find(req.key)
	if !ok {
		return oneReply{}, absent("cloning key", req.key)
	}
	blob, err := d.sealKey(req, k, o.Nonce)
	if err != nil {
		return oneReply{}, err
	}
	return oneReply{blob: blob, done: true}, nil
}

// sealKey is the blob that holds a key.
func (d *Driver) sealKey(req oneStep, k *key, nonce []byte) ([]byte, error) {
	secret, err := k.export()
	if err != nil {
		return nil, refused(pluginproto.CKRGeneralError, cloneOp, err.Error())
	}
	defer clear(secret)
	return d.seal(req, offer{Type: k.typ, Label: k.label, Check: k.check, Nonce: nonce, Secret: secret})
}

// receive is the target's step 1.
func (d *Driver) receive(req oneStep) (oneReply, error) {
	tr, err := d.clones.take(req)
	if err != nil {
		return oneReply{}, err
	}
	o, err := d.unseal(req)
	if err != nil {
		return oneReply{}, err
	}
	defer clear(o.Secret)
	if !bytes.Equal(o.Nonce, tr.nonce) || !bytes.Equal(o.Check, tr.offer.Check) {
		return oneReply{}, cloneRefused("what came is not what was offered")
	}
	return d.accept(req, o)
}

// accept puts a key that has come onto the token, or only proves it.
func (d *Driver) accept(req oneStep, o offer) (oneReply, error) {
	k, err := importKey(o.Type, o.Label, o.Secret)
	if err != nil {
		return oneReply{}, cloneRefused("%v", err)
	}
	if !bytes.Equal(k.check, o.Check) {
		return oneReply{}, cloneRefused("the check value is another one")
	}
	if req.prove {
		return holds(req.key, k, o.Check)
	}
	var there *key
	if err := d.change(func() { there, _ = d.token.add(req.key, k) }); err != nil {
		return oneReply{}, err
	}
	return holds(req.key, there, o.Check)
}

// holds ends a clone at a target that has a key under the identity.
func holds(id pluginproto.KeyID, k *key, check []byte) (oneReply, error) {
	if !bytes.Equal(k.check, check) {
		return oneReply{}, cloneRefused("the target holds another key as %s", id)
	}
	o := k.object(id)
	return oneReply{done: true, object: &o}, nil
}

// seal authenticates and encrypts one end's answer to a step.
func (d *Driver) seal(req oneStep, o offer) ([]byte, error) {
	plain, err := json.Marshal(o)
	if err != nil {
		return nil, refused(pluginproto.CKRGeneralError, cloneOp, err.Error())
	}
	defer clear(plain)
	aead, err := d.domainAEAD()
	if err != nil {
		return nil, err
	}
	iv := make([]byte, aead.NonceSize())
	rand.Read(iv) // never fails
	return aead.Seal(iv, iv, plain, binding(req, req.role, req.step)), nil
}

// unseal reads what the other end sealed in the step before.
func (d *Driver) unseal(req oneStep) (o offer, err error) {
	aead, err := d.domainAEAD()
	if err != nil {
		return offer{}, err
	}
	from, step := pluginproto.CloneSource, req.step
	if req.role == pluginproto.CloneSource {
		from, step = pluginproto.CloneTarget, req.step-1
	}
	n := aead.NonceSize()
	if len(req.blob) < n {
		return offer{}, cloneRefused("the blob is too short")
	}
	plain, err := aead.Open(nil, req.blob[:n], req.blob[n:], binding(req, from, step))
	if err != nil {
		return offer{}, cloneRefused("the blob does not authenticate: altered, of another step or of another domain")
	}
	defer clear(plain)
	if err := json.Unmarshal(plain, &o); err != nil {
		return offer{}, cloneRefused("reading the blob: %v", err)
	}
	return o, nil
}

func binding(req oneStep, from pluginproto.CloneRole, step int) []byte {
	return fmt.Appendf(nil, "%x %x %d %d", req.transfer, req.key, from, step)
}

func (d *Driver) domainAEAD() (cipher.AEAD, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	block, err := aes.NewCipher(d.domain)
	if err != nil {
		return nil, refused(pluginproto.CKRGeneralError, cloneOp, err.Error())
	}
	return cipher.NewGCM(block)
}

func (c *clones) put(req oneStep, tr *transfer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := req.id()
	if c.at == nil {
		c.at = make(map[transferID]*transfer)
	}
	if c.at[id] == nil {
		c.order = append(c.order, id)
	}
	c.at[id] = tr
	for len(c.order) > maxTransfers {
		delete(c.at, c.order[0])
		c.order = c.order[1:]
	}
}

// end forgets a transfer.
func (c *clones) end(req oneStep) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.at, req.id())
}

// take ends a transfer: each step after the first is taken once.
func (c *clones) take(req oneStep) (*transfer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := req.id()
	tr := c.at[id]
	if tr == nil || tr.key != req.key || tr.step != req.step {
		return nil, cloneRefused("step %d is not the next one of this transfer", req.step)
	}
	delete(c.at, id)
	return tr, nil
}

// transferID tells the two ends of one transfer apart: both may be on one token.
type transferID struct {
	transfer [16]byte
	key      pluginproto.KeyID
	role     pluginproto.CloneRole
}

func (s oneStep) id() transferID { return transferID{s.transfer, s.key, s.role} }
