package p11

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// Do implements [pluginproto.Driver].
func (d *Driver) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if err := cmd.Check(); err != nil {
		return pluginproto.Result{}, err
	}
	// The worker may outlive the caller, so it gets copies.
	cmd.Input = slices.Clone(cmd.Input)
	cmd.IV = slices.Clone(cmd.IV)
	cmd.AAD = slices.Clone(cmd.AAD)
	cmd.Signature = slices.Clone(cmd.Signature)
	cmd.Items = cloneItems(cmd.Items)
	var l *lane
	var run func(*session, pluginproto.Command) (pluginproto.Result, error)
	switch {
	case cmd.Op == pluginproto.OpProbe:
		return pluginproto.Result{}, d.probeToken(ctx)
	case cmd.Op == pluginproto.OpRandom:
		l, run = d.fast, (*session).random
	case cmd.Mech == pluginproto.AESGCM:
		l, run = d.fast, (*session).gcm
	case cmd.Mech == pluginproto.HMAC:
		l, run = d.fast, (*session).hmac
	default:
		l, run = d.slow, (*session).pair
	}
	// Input may be a plaintext. It is wiped by the worker, when no retry can need
	// it any more; a job that a full lane never took leaves it to the collector.
	return call(ctx, d, l, func(s *session) (out pluginproto.Result, err error) {
		err = s.read(func() error {
			out, err = run(s, cmd)
			return err
		})
		if cmd.Op == pluginproto.OpEncrypt && (err == nil || !d.quirks.Codes.isGone(err)) {
			cmd.Wipe()
		}
		return out, err
	})
}

// cloneItems copies items with all their bytes.
func cloneItems(items []pluginproto.Item) []pluginproto.Item {
	if len(items) == 0 {
		return nil
	}
	size := 0
	for _, it := range items {
		size += len(it.Input) + len(it.IV) + len(it.AAD)
	}
	buf := make([]byte, 0, size)
	own := func(b []byte) []byte {
		buf = append(buf, b...)
		return buf[len(buf)-len(b) : len(buf) : len(buf)]
	}
	out := make([]pluginproto.Item, len(items))
	for i, it := range items {
		out[i] = pluginproto.Item{Input: own(it.Input), IV: own(it.IV), AAD: own(it.AAD)}
	}
	return out
}

func opName(op pluginproto.Op) string {
	switch op {
	case pluginproto.OpEncrypt:
		return "encrypting"
	case pluginproto.OpDecrypt:
		return "decrypting"
	case pluginproto.OpSign:
		return "signing"
	case pluginproto.OpVerify:
		return "verifying"
	case pluginproto.OpMAC:
		return "computing a MAC"
	case pluginproto.OpRandom:
		return "drawing random bytes"
	case pluginproto.OpProbe:
		return "probing the token"
	default:
		return fmt.Sprintf("running operation %d", op)
	}
}

func hashOf(h pluginproto.Hash) (crypto.Hash, error) {
	switch h {
	case pluginproto.SHA256:
		return crypto.SHA256, nil
	case pluginproto.SHA384:
		return crypto.SHA384, nil
	case pluginproto.SHA512:
		return crypto.SHA512, nil
	default:
		return 0, fmt.Errorf("there is no hash %d", h)
	}
}

// use returns a key for a command, provided that its type goes with it.
func (s *session) use(cmd pluginproto.Command, types ...pluginproto.KeyType) (*cachedKey, error) {
	k, err := s.cached(cmd.Key)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(types, k.typ) {
		return nil, &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: pkcs11.CKR_KEY_TYPE_INCONSISTENT,
			Op: opName(cmd.Op), Msg: fmt.Sprintf("a key of type %s does not do that", k.typ)}
	}
	return k, nil
}

func (s *session) gcm(cmd pluginproto.Command) (pluginproto.Result, error) {
	k, err := s.use(cmd, pluginproto.AES128, pluginproto.AES256)
	if err != nil {
		return pluginproto.Result{}, err
	}
	if len(cmd.Items) == 0 {
		out, iv, err := s.gcmOne(k, cmd.Op, pluginproto.Item{Input: cmd.Input, IV: cmd.IV, AAD: cmd.AAD})
		return pluginproto.Result{Output: out, IV: iv}, err
	}
	res := pluginproto.Result{Items: make([]pluginproto.ItemResult, len(cmd.Items))}
	for i, it := range cmd.Items {
		s.job.expect(shortStep)
		out, iv, err := s.gcmOne(k, cmd.Op, it)
		if err != nil && !isCorrupt(err) {
			res.Wipe()
			return pluginproto.Result{}, err // it is none of the item's
		}
		res.Items[i] = pluginproto.ItemResult{Output: out, IV: iv, Err: err}
	}
	return res, nil
}

func isCorrupt(err error) bool {
	e, ok := errors.AsType[*pluginproto.Error](err)
	return ok && e.Class == pluginproto.ClassCaller && e.CKR == pluginproto.CKREncryptedDataInvalid
}

func (s *session) gcmOne(k *cachedKey, op pluginproto.Op, it pluginproto.Item) (out, iv []byte, err error) {
	if op == pluginproto.OpEncrypt {
		out, iv, err = s.seal(k.use, it.IV, it.AAD, it.Input)
		return out, iv, s.fail(opName(op), err)
	}
	out, err = s.open(k.use, it.IV, it.AAD, it.Input)
	if s.ambiguous(err) {
		out, err = s.open(k.use, it.IV, it.AAD, it.Input)
	}
	if err != nil {
		return nil, nil, s.explainTag(err)
	}
	return out, it.IV, nil
}

// seal encrypts. used is the IV that the token has taken, which may be another than iv.
func (s *session) seal(key pkcs11.ObjectHandle, iv, aad, plaintext []byte) (out, used []byte, err error) {
	ivs, err := s.c.ivUse(s.h, key)
	if err != nil {
		return nil, nil, err
	}
	out, param, err := s.c.encryptGCM(s.h, key, ivs.give(iv), aad, plaintext)
	if err != nil {
		return nil, nil, err
	}
	sealed, used, ok := ivs.split(out, param, len(plaintext))
	if !ok {
		return nil, nil, pluginproto.Errorf(pluginproto.ClassMember, "encrypting",
			"the token answered %d bytes to %d, and an IV of %d; at first the IV was %s", len(out), len(plaintext), len(param), ivs)
	}
	return sealed, used, nil
}

// errTag wraps what C_Decrypt answered after C_DecryptInit went well.
type errTag struct{ err error }

func (e errTag) Error() string { return e.err.Error() }
func (e errTag) Unwrap() error { return e.err }

func (s *session) open(key pkcs11.ObjectHandle, iv, aad, ciphertext []byte) ([]byte, error) {
	out, err := s.c.decryptGCM(s.h, key, iv, aad, ciphertext)
	if err != nil {
		return nil, err
	}
	if len(out) != len(ciphertext)-pluginproto.GCMTagSize {
		n := len(out)
		clear(out)
		return nil, pluginproto.Errorf(pluginproto.ClassMember, "decrypting", "the token answered %d bytes to %d", n, len(ciphertext))
	}
	return out, nil
}

// invalidData are the answers of C_Decrypt that can only mean the data.
var invalidData = []uint{pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE} // never written to

// ambiguous reports whether err may mean that the data does not authenticate and
// may mean trouble with the device.
func (s *session) ambiguous(err error) bool {
	ckr, known := ckrOf(err)
	return errors.As(err, new(errTag)) && known && ckr == s.d.quirks.GCMTagFault && !slices.Contains(invalidData, ckr)
}

// explainTag tells data that does not authenticate from trouble with the device,
// which some libraries say with one return value. An ambiguous answer has been given
// twice.
func (s *session) explainTag(err error) error {
	const op = "decrypting"
	ckr, _ := ckrOf(err)
	certain := errors.As(err, new(errTag)) && slices.Contains(invalidData, ckr)
	if !certain && (!s.ambiguous(err) || s.roundTrip() != nil) {
		return s.fail(op, err)
	}
	return &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: pluginproto.CKREncryptedDataInvalid, Op: op,
		Msg: "the ciphertext does not authenticate under this key, IV and additional data"}
}

// probeToken finds out whether the token does what it is there for. Its round trip
// has a session of its own, and a library may answer there while a call hangs in
// another: a probe that took no notice would speak for a token that serves nobody.
// So it waits for every call that takes longer than it may, and is silent for as
// long as one hangs.
func (d *Driver) probeToken(ctx context.Context) error {
	_, err := call(ctx, d, d.probe, func(s *session) (struct{}, error) {
		return struct{}{}, s.read(func() error { return s.fail(opName(pluginproto.OpProbe), s.roundTrip()) })
	})
	for _, l := range []*lane{d.fast, d.slow, d.rare} {
		if err != nil {
			return err
		}
		err = l.settle(ctx)
	}
	return err
}

// roundTrip encrypts and decrypts under the probe key.
func (s *session) roundTrip() error {
	if s.c.probeKey == 0 {
		_, err := s.c.lib.GenerateRandom(s.h, 32)
		return err
	}
	var text [32]byte
	iv := make([]byte, pluginproto.GCMIVSize)
	_, _ = rand.Read(iv) // never fails
	sealed, used, err := s.seal(s.c.probeKey, iv, nil, text[:])
	if err != nil {
		return err
	}
	opened, err := s.open(s.c.probeKey, used, nil, sealed)
	if err != nil {
		return err
	}
	if !slices.Equal(opened, text[:]) {
		return pluginproto.Errorf(pluginproto.ClassMember, "probing the token", "it decrypted something other than was encrypted")
	}
	return nil
}

func (s *session) random(cmd pluginproto.Command) (pluginproto.Result, error) {
	out, err := s.c.lib.GenerateRandom(s.h, cmd.Length)
	if err == nil && len(out) != cmd.Length {
		err = pluginproto.Errorf(pluginproto.ClassMember, opName(cmd.Op), "the token answered %d bytes to %d", len(out), cmd.Length)
	}
	return pluginproto.Result{Output: out}, s.fail(opName(cmd.Op), err)
}

func (s *session) hmac(cmd pluginproto.Command) (pluginproto.Result, error) {
	op := opName(cmd.Op)
	k, err := s.use(cmd, pluginproto.HMACSHA256)
	if err != nil {
		return pluginproto.Result{}, err
	}
	if err := s.c.lib.SignInit(s.h, mechanism(pkcs11.CKM_SHA256_HMAC, nil), k.use); err != nil {
		return pluginproto.Result{}, s.fail(op, err)
	}
	mac, err := s.c.lib.Sign(s.h, cmd.Input)
	if err != nil {
		return pluginproto.Result{}, s.fail(op, err)
	}
	if len(mac) != crypto.SHA256.Size() {
		return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassMember, op, "the token answered %d bytes", len(mac))
	}
	if cmd.Op == pluginproto.OpMAC {
		return pluginproto.Result{Output: mac}, nil
	}
	if !hmac.Equal(mac, cmd.Signature) {
		return pluginproto.Result{}, signatureInvalid()
	}
	return pluginproto.Result{}, nil
}

func signatureInvalid() error {
	return &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: pluginproto.CKRSignatureInvalid, Op: opName(pluginproto.OpVerify)}
}
