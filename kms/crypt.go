package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"

	"kmsd/kms/api"
	"kmsd/kms/internal/envelope"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// maxAAD is the longest context that a caller may bind to an envelope, in bytes.
const maxAAD = 64 << 10

// Wrap encrypts plaintext under the newest enabled version of a key.
func (k *KMS) Wrap(ctx context.Context, name string, plaintext, aad []byte) ([]byte, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, err := k.wrapping(name)
	if err != nil {
		return nil, err
	}
	wrapped, _, err := k.wrap(ctx, key, plaintext, aad)
	return wrapped, err
}

// Unwrap decrypts what Wrap made. The caller wipes what it gets.
func (k *KMS) Unwrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, err := k.wrapping(name)
	if err != nil {
		return nil, err
	}
	plaintext, _, err := k.unwrap(ctx, key, wrapped, aad)
	return plaintext, err
}

// Rewrap moves an envelope to the newest enabled version. The plaintext lives only
// between two calls to the HSMs.
func (k *KMS) Rewrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, err := k.wrapping(name)
	if err != nil {
		return nil, err
	}
	again, _, err := k.rewrap(ctx, key, wrapped, aad)
	return again, err
}

// DataKey makes n random bytes in an HSM and wraps them.
func (k *KMS) DataKey(ctx context.Context, name string, n int, aad []byte) (DataKey, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, err := k.wrapping(name)
	if err != nil {
		return DataKey{}, err
	}
	return k.dataKey(ctx, key, n, aad)
}

// Random returns n bytes from the random source of an HSM.
func (k *KMS) Random(ctx context.Context, groupName string, n int) ([]byte, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	if n < 1 || n > api.MaxRandom {
		return nil, badRequest("%d random bytes were asked for, want 1 to %d", n, api.MaxRandom)
	}
	g, err := k.group(groupName)
	if err != nil {
		return nil, err
	}
	out, err := g.random(ctx, n)
	return out, translate("drawing random bytes", err)
}

func (g *keyGroup) random(ctx context.Context, n int) ([]byte, error) {
	res, err := g.Do(ctx, pluginproto.Command{Op: pluginproto.OpRandom, Length: n})
	if err != nil {
		return nil, err
	}
	if len(res.Output) != n {
		return nil, fmt.Errorf("the driver answered with %d bytes, want %d", len(res.Output), n)
	}
	return res.Output, nil
}

// wrapping returns a key that can wrap.
func (k *KMS) wrapping(name string) (*key, error) {
	key, err := k.ring.get(name)
	if err != nil {
		return nil, err
	}
	if key.alg == 0 {
		return nil, badRequest("key %s has type %s, which does not wrap", name, key.typ)
	}
	return key, nil
}

func (k *KMS) wrap(ctx context.Context, key *key, plaintext, aad []byte) (_ []byte, version int, err error) {
	if err := checkSizes(plaintext, aad); err != nil {
		return nil, 0, err
	}
	if key.primary < 0 {
		return nil, 0, key.unusable()
	}
	if err := key.countWrap(); err != nil {
		return nil, 0, err
	}
	e := envelope.Envelope{Algorithm: key.alg, Identity: key.ids[key.primary]}
	res, err := k.do(ctx, key, key.primary, pluginproto.Command{
		Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: e.Identity,
		Input: plaintext, IV: newIV(), AAD: e.AAD(aad),
	})
	if err == nil {
		err = checkWrapped(res.Output, res.IV, len(plaintext))
	}
	if err != nil {
		return nil, 0, translate(wrappingWith(key), err)
	}
	e.IV, e.Ciphertext = res.IV, res.Output
	return e.Encode(), key.rec.Versions[key.primary].Number, nil
}

func wrappingWith(key *key) string { return "wrapping with key " + strconv.Quote(key.rec.Name) }

func checkSizes(plaintext, aad []byte) error {
	switch {
	case len(plaintext) == 0:
		return badRequest("there is nothing to wrap")
	case len(plaintext) > api.MaxPlaintext:
		return tooLarge("the plaintext has %d bytes, at most %d can be wrapped", len(plaintext), api.MaxPlaintext)
	default:
		return checkAAD(aad)
	}
}

func checkAAD(aad []byte) error {
	if len(aad) > maxAAD {
		return tooLarge("the aad has %d bytes, at most %d are allowed", len(aad), maxAAD)
	}
	return nil
}

// newIV draws the IV that a token is asked to encrypt with. One that insists on its own
// answers with that.
func newIV() []byte {
	iv := make([]byte, envelope.IVSize)
	rand.Read(iv) // never fails
	return iv
}

// checkWrapped makes sure that an envelope can be made of what a driver answered. The IV
// is whichever the token has used.
func checkWrapped(output, iv []byte, plaintext int) error {
	const op = "reading the driver's answer"
	switch {
	case len(output) != plaintext+envelope.TagSize:
		return pluginproto.Errorf(pluginproto.ClassMember, op, "the driver answered with %d bytes, want %d", len(output), plaintext+envelope.TagSize)
	case !pluginproto.GCMIV(len(iv)):
		return pluginproto.Errorf(pluginproto.ClassMember, op, "the driver answered with an IV of %d bytes, want %d or %d", len(iv), envelope.IVSize, envelope.LongIVSize)
	case bytes.Equal(iv, make([]byte, len(iv))):
		return pluginproto.Errorf(pluginproto.ClassMember, op, "the token used an IV of zeros")
	}
	return nil
}

// errIVTwice is what becomes of whatever was encrypted with an IV that something else of
// the same batch has: two ciphertexts with one IV give away what GCM is there to hide.
func errIVTwice() error {
	return pluginproto.Errorf(pluginproto.ClassMember, "comparing the IVs of a batch", "the token used one IV twice; it must not be used for encrypting until its random source is repaired")
}

func (k *KMS) unwrap(ctx context.Context, key *key, wrapped, aad []byte) (_ []byte, version int, err error) {
	if err := checkAAD(aad); err != nil {
		return nil, 0, err
	}
	doing := "unwrapping with key " + strconv.Quote(key.rec.Name)
	if len(wrapped) > envelope.MaxSize {
		return nil, 0, tooLarge("the envelope has %d bytes, at most %d are possible", len(wrapped), envelope.MaxSize)
	}
	e, err := envelope.Parse(wrapped)
	if err != nil {
		return nil, 0, translate(doing, err)
	}
	i, ok := key.byID[e.Identity]
	if !ok {
		return nil, 0, wrongKey(key)
	}
	if e.Algorithm != key.alg {
		return nil, 0, translate(doing, fmt.Errorf("%w: it says %v, the key is %s", envelope.ErrFormat, e.Algorithm, key.typ))
	}
	if err := key.usable(i); err != nil {
		return nil, 0, err
	}
	res, err := k.do(ctx, key, i, pluginproto.Command{
		Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: e.Identity,
		Input: e.Ciphertext, IV: e.IV, AAD: e.AAD(aad),
	})
	if err != nil {
		return nil, 0, translate(doing, err)
	}
	if n := len(res.Output); n != e.PlaintextSize() {
		clear(res.Output)
		return nil, 0, translate(doing, fmt.Errorf("the driver answered with %d bytes, want %d", n, e.PlaintextSize()))
	}
	return res.Output, key.rec.Versions[i].Number, nil
}

func wrongKey(key *key) error {
	e := api.NewError(api.CodeWrongKey, fmt.Sprintf("the envelope was not made with key %s", key.rec.Name), nil)
	e.Hint = "name the key that it was wrapped with; if it is this one, the catalog was restored from before that version was made: synchronizing the group lists what it does not know"
	return e
}

func (k *KMS) rewrap(ctx context.Context, key *key, wrapped, aad []byte) (_ []byte, version int, err error) {
	if key.primary < 0 { // before any plaintext is made
		return nil, 0, key.unusable()
	}
	plaintext, _, err := k.unwrap(ctx, key, wrapped, aad)
	if err != nil {
		return nil, 0, err
	}
	defer clear(plaintext)
	return k.wrap(ctx, key, plaintext, aad)
}

func (k *KMS) dataKey(ctx context.Context, key *key, n int, aad []byte) (DataKey, error) {
	if n < 1 || n > api.MaxDataKey {
		return DataKey{}, badRequest("a data key of %d bytes was asked for, want 1 to %d", n, api.MaxDataKey)
	}
	g, err := k.groupOf(key.rec)
	if err != nil {
		return DataKey{}, err
	}
	plaintext, err := g.random(ctx, n)
	if err != nil {
		return DataKey{}, translate("drawing a data key", err)
	}
	wrapped, version, err := k.wrap(ctx, key, plaintext, aad)
	if err != nil {
		clear(plaintext)
		return DataKey{}, err
	}
	return DataKey{Plaintext: plaintext, Wrapped: wrapped, Version: version}, nil
}

// do runs a command on version i of a key. The catalog knows the key, so a member
// that does not is wrong about it: the copy is brought back to it in the background
// and the others are asked.
func (k *KMS) do(ctx context.Context, key *key, i int, cmd pluginproto.Command) (pluginproto.Result, error) {
	g, err := k.groupOf(key.rec)
	if err != nil {
		return pluginproto.Result{}, err
	}
	res, err := g.Do(ctx, cmd)
	if err != nil && pluginproto.ClassOf(err) == pluginproto.ClassNotFound {
		return k.doElsewhere(ctx, g, key, i, cmd, err)
	}
	return res, err
}

// doElsewhere asks one member after the other, but for the one whose answer was
// that it has not got the key.
func (k *KMS) doElsewhere(ctx context.Context, g *keyGroup, key *key, i int, cmd pluginproto.Command, err error) (pluginproto.Result, error) {
	if now, missing := k.ring.get(key.rec.Name); missing == nil { // it may just have been destroyed
		if err := now.usable(i); err != nil {
			return pluginproto.Result{}, err
		}
	}
	tried := k.lacks(g, key, i, err)
	for _, m := range g.InStep() {
		if m.Name() == tried {
			continue
		}
		res, other := m.Do(ctx, cmd)
		switch pluginproto.ClassOf(other) {
		case pluginproto.ClassCaller: // also the end of ctx
			return res, other
		case pluginproto.ClassNotFound:
			k.lacks(g, key, i, &group.MemberError{Member: m.Name(), Err: other})
		default:
			if other == nil {
				return res, nil
			}
		}
		err = other
	}
	return pluginproto.Result{}, err
}

// lacks leaves word that the member which gave this answer has not got the key, and
// returns its name.
func (k *KMS) lacks(g *keyGroup, key *key, i int, answer error) (member string) {
	e, ok := errors.AsType[*group.MemberError](answer)
	if !ok {
		return ""
	}
	g.janitor.missing(loss{key.rec.Name, key.rec.Versions[i].Number, e.Member})
	return e.Member
}
