package memdriver

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"math/big"

	"kmsd/pluginproto"
)

// run does what the command says. The command has been checked.
func (d *Driver) run(cmd pluginproto.Command) (pluginproto.Result, error) {
	switch cmd.Op {
	case pluginproto.OpProbe:
		return pluginproto.Result{}, nil
	case pluginproto.OpRandom:
		out := make([]byte, cmd.Length)
		rand.Read(out) // never fails
		return pluginproto.Result{Output: out}, nil
	}
	k, ok := d.token.find(cmd.Key)
	if !ok {
		return pluginproto.Result{}, absent("finding key", cmd.Key)
	}
	switch {
	case cmd.Mech == pluginproto.AESGCM && k.aead != nil:
		return d.cipherAES(k, cmd)
	case cmd.Mech == pluginproto.HMAC && k.typ == pluginproto.HMACSHA256:
		return authenticate(k, cmd)
	case cmd.Mech == pluginproto.ECDSA:
		if signer, ok := k.signer.(*ecdsa.PrivateKey); ok {
			return signECDSA(signer, cmd)
		}
	case cmd.Mech == pluginproto.RSAPKCS1v15, cmd.Mech == pluginproto.RSAPSS, cmd.Mech == pluginproto.RSAOAEP:
		if signer, ok := k.signer.(*rsa.PrivateKey); ok {
			return useRSA(signer, cmd)
		}
	}
	return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassCaller, "using key "+cmd.Key.String(),
		"a key of type %s cannot do that", k.typ)
}

func (d *Driver) cipherAES(k *key, cmd pluginproto.Command) (pluginproto.Result, error) {
	if len(cmd.Items) > 0 {
		out := pluginproto.Result{Items: make([]pluginproto.ItemResult, len(cmd.Items))}
		for i, it := range cmd.Items {
			res, err := d.cipherAES(k, pluginproto.Command{Op: cmd.Op, Input: it.Input, IV: it.IV, AAD: it.AAD})
			out.Items[i] = pluginproto.ItemResult{Output: res.Output, IV: res.IV, Err: err}
		}
		return out, nil
	}
	iv := append([]byte(nil), cmd.IV...)
	if cmd.Op == pluginproto.OpEncrypt && d.opts.OwnIV != 0 {
		iv = make([]byte, d.opts.OwnIV)
		rand.Read(iv) // never fails
	}
	aead, err := k.gcm(len(iv))
	if err != nil {
		return pluginproto.Result{}, refused(pluginproto.CKRGeneralError, "using AES-GCM", err.Error())
	}
	if cmd.Op == pluginproto.OpEncrypt {
		return pluginproto.Result{Output: aead.Seal(nil, iv, cmd.Input, cmd.AAD), IV: iv}, nil
	}
	out, err := aead.Open(nil, iv, cmd.Input, cmd.AAD)
	if err != nil {
		return pluginproto.Result{}, refused(pluginproto.CKREncryptedDataInvalid, "decrypting", "the ciphertext does not authenticate")
	}
	return pluginproto.Result{Output: out}, nil
}

// gcm returns AES-GCM under the key, for IVs of a size.
func (k *key) gcm(ivSize int) (cipher.AEAD, error) {
	if ivSize == k.aead.NonceSize() {
		return k.aead, nil
	}
	block, err := aes.NewCipher(k.secret)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithNonceSize(block, ivSize)
}

func authenticate(k *key, cmd pluginproto.Command) (pluginproto.Result, error) {
	sum := mac(k.secret, cmd.Input)
	if cmd.Op == pluginproto.OpMAC {
		return pluginproto.Result{Output: sum}, nil
	}
	if !hmac.Equal(sum, cmd.Signature) {
		return pluginproto.Result{}, wrongSignature()
	}
	return pluginproto.Result{}, nil
}

func signECDSA(k *ecdsa.PrivateKey, cmd pluginproto.Command) (pluginproto.Result, error) {
	n := (k.Curve.Params().BitSize + 7) / 8
	if cmd.Op == pluginproto.OpVerify {
		if len(cmd.Signature) != 2*n {
			return pluginproto.Result{}, wrongSignature()
		}
		r, s := new(big.Int).SetBytes(cmd.Signature[:n]), new(big.Int).SetBytes(cmd.Signature[n:])
		if !ecdsa.Verify(&k.PublicKey, cmd.Input, r, s) {
			return pluginproto.Result{}, wrongSignature()
		}
		return pluginproto.Result{}, nil
	}
	r, s, err := ecdsa.Sign(rand.Reader, k, cmd.Input)
	if err != nil {
		return pluginproto.Result{}, refused(pluginproto.CKRGeneralError, "signing", err.Error())
	}
	out := make([]byte, 2*n)
	r.FillBytes(out[:n])
	s.FillBytes(out[n:])
	return pluginproto.Result{Output: out}, nil
}

func useRSA(k *rsa.PrivateKey, cmd pluginproto.Command) (pluginproto.Result, error) {
	var (
		hash = cryptoHash(cmd.Hash)
		pss  = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
		out  []byte
		err  error
	)
	switch {
	case cmd.Op == pluginproto.OpDecrypt:
		if out, err = rsa.DecryptOAEP(hash.New(), nil, k, cmd.Input, nil); err != nil {
			return pluginproto.Result{}, refused(pluginproto.CKREncryptedDataInvalid, "decrypting", "the ciphertext is not for this key")
		}
	case cmd.Op == pluginproto.OpSign && cmd.Mech == pluginproto.RSAPSS:
		out, err = rsa.SignPSS(rand.Reader, k, hash, cmd.Input, pss)
	case cmd.Op == pluginproto.OpSign:
		out, err = rsa.SignPKCS1v15(nil, k, hash, cmd.Input)
	case cmd.Mech == pluginproto.RSAPSS:
		if rsa.VerifyPSS(&k.PublicKey, hash, cmd.Input, cmd.Signature, pss) != nil {
			return pluginproto.Result{}, wrongSignature()
		}
	default:
		if rsa.VerifyPKCS1v15(&k.PublicKey, hash, cmd.Input, cmd.Signature) != nil {
			return pluginproto.Result{}, wrongSignature()
		}
	}
	if err != nil {
		return pluginproto.Result{}, refused(pluginproto.CKRGeneralError, "signing", err.Error())
	}
	return pluginproto.Result{Output: out}, nil
}

func cryptoHash(h pluginproto.Hash) crypto.Hash {
	switch h {
	case pluginproto.SHA384:
		return crypto.SHA384
	case pluginproto.SHA512:
		return crypto.SHA512
	default:
		return crypto.SHA256
	}
}

func absent(op string, id pluginproto.KeyID) error {
	return pluginproto.Errorf(pluginproto.ClassNotFound, op+" "+id.String(), "it is not on the token")
}

func refused(ckr uint, op, msg string) error {
	return &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: ckr, Op: op, Msg: msg}
}

func wrongSignature() error {
	return refused(pluginproto.CKRSignatureInvalid, "verifying a signature", "it is not by this key over this input")
}
