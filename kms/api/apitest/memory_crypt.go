package apitest

import (
	"cmp"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"

	"kmsd/kms/api"
)

// generate makes the secret of a version, and its public half in DER.
func generate(kind string) (secret, []byte, error) {
	var s secret
	rand.Read(s.identity[:])
	var err error
	switch kind {
	case "aes-256", "hmac-sha256":
		s.bytes = randomBytes(32)
		return s, nil, nil
	case "aes-128":
		s.bytes = randomBytes(16)
		return s, nil, nil
	case "ec-p256":
		s.private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "rsa-2048":
		s.private, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		return secret{}, nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("no key type is named %q", kind), nil)
	}
	if err != nil {
		return secret{}, nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(s.private.Public())
	return s, public, err
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// The envelope of a Memory is identity | IV | ciphertext and tag.
const idLen, ivLen, tagLen = 16, 12, 16

func (k *memoryKey) wrap(plaintext, aad []byte) ([]byte, error) {
	switch {
	case len(plaintext) == 0:
		return nil, api.NewError(api.CodeBadRequest, "the plaintext is empty", nil)
	case len(plaintext) > api.MaxPlaintext:
		return nil, api.NewError(api.CodeTooLarge, fmt.Sprintf("the plaintext is longer than %d bytes", api.MaxPlaintext), nil)
	}
	s := k.secrets[k.Primary-1]
	gcm, err := s.gcm()
	if err != nil {
		return nil, err
	}
	out := append(s.identity[:], randomBytes(ivLen)...)
	return gcm.Seal(out, out[idLen:], plaintext, aad), nil
}

func (s secret) gcm() (cipher.AEAD, error) {
	block, err := aes.NewCipher(s.bytes)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (k *memoryKey) unwrap(wrapped, aad []byte) ([]byte, error) {
	if len(wrapped) < idLen+ivLen+tagLen {
		return nil, api.NewError(api.CodeCorrupt, "the envelope is too short", nil)
	}
	for i, s := range k.secrets {
		if [idLen]byte(wrapped) != s.identity {
			continue
		}
		if err := k.enabled(i + 1); err != nil {
			return nil, err
		}
		gcm, err := s.gcm()
		if err != nil {
			return nil, err
		}
		plaintext, err := gcm.Open(nil, wrapped[idLen:idLen+ivLen], wrapped[idLen+ivLen:], aad)
		if err != nil {
			return nil, api.NewError(api.CodeCorrupt, "the envelope does not authenticate", nil)
		}
		return plaintext, nil
	}
	return nil, api.NewError(api.CodeWrongKey, "the envelope belongs to another key", nil)
}

// do is one item of a batch.
func (k *memoryKey) do(op api.Op, item api.Item) (r api.Result, err error) {
	r.Version = k.Primary
	switch op {
	case api.OpWrap:
		r.Wrapped, err = k.wrap(item.Plaintext, item.AAD)
	case api.OpUnwrap:
		r.Plaintext, err = k.unwrap(item.Wrapped, item.AAD)
		for i, s := range k.secrets {
			if err == nil && [idLen]byte(item.Wrapped) == s.identity {
				r.Version = i + 1
			}
		}
	case api.OpRewrap:
		var plaintext []byte
		if plaintext, err = k.unwrap(item.Wrapped, item.AAD); err == nil {
			r.Wrapped, err = k.wrap(plaintext, item.AAD)
		}
	case api.OpDataKey:
		n := cmp.Or(item.Bytes, 32)
		if n < 1 || n > api.MaxDataKey {
			return api.Result{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("a data key has 1 to %d bytes", api.MaxDataKey), nil)
		}
		plaintext := randomBytes(n)
		r.Wrapped, err = k.wrap(plaintext, item.AAD)
		if !item.WrappedOnly {
			r.Plaintext = plaintext
		}
	}
	if err != nil {
		return api.Result{}, err
	}
	return r, nil
}

// use is with for what a key can do only when it is enabled and of a fitting type.
func (m *Memory) use(ctx context.Context, method, name string, types []string, f func(k *memoryKey) error) error {
	return m.with(ctx, method, name, func(k *memoryKey) error {
		if err := k.is(api.StateEnabled); err != nil {
			return err
		}
		for _, t := range types {
			if k.Type == t {
				return f(k)
			}
		}
		return api.NewError(api.CodeBadRequest, fmt.Sprintf("key %s is %s, which cannot do that", name, k.Type), nil)
	})
}

func aesTypes() []string { return []string{"aes-256", "aes-128"} }

func (m *Memory) single(ctx context.Context, method, name string, op api.Op, item api.Item) (r api.Result, err error) {
	err = m.use(ctx, method, name, aesTypes(), func(k *memoryKey) (err error) {
		r, err = k.do(op, item)
		return err
	})
	return r, err
}

// Wrap encrypts plaintext under the newest version.
func (m *Memory) Wrap(ctx context.Context, name string, plaintext, aad []byte) ([]byte, error) {
	r, err := m.single(ctx, "Wrap", name, api.OpWrap, api.Item{Plaintext: plaintext, AAD: aad})
	return r.Wrapped, err
}

// Unwrap decrypts an envelope.
func (m *Memory) Unwrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	r, err := m.single(ctx, "Unwrap", name, api.OpUnwrap, api.Item{Wrapped: wrapped, AAD: aad})
	return r.Plaintext, err
}

// Rewrap moves an envelope to the newest version.
func (m *Memory) Rewrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	r, err := m.single(ctx, "Rewrap", name, api.OpRewrap, api.Item{Wrapped: wrapped, AAD: aad})
	return r.Wrapped, err
}

// DataKey makes n random bytes.
func (m *Memory) DataKey(ctx context.Context, name string, n int, aad []byte) (api.DataKey, error) {
	if n == 0 {
		return api.DataKey{}, api.NewError(api.CodeBadRequest, "a data key has at least 1 byte", nil)
	}
	r, err := m.single(ctx, "DataKey", name, api.OpDataKey, api.Item{Bytes: n, AAD: aad})
	return api.DataKey{Plaintext: r.Plaintext, Wrapped: r.Wrapped, Version: r.Version}, err
}

// Batch does one operation on many items.
func (m *Memory) Batch(ctx context.Context, op api.Op, name string, items []api.Item) ([]api.Result, error) {
	switch {
	case len(items) == 0:
		return nil, api.NewError(api.CodeBadRequest, "items is empty", nil)
	case len(items) > api.MaxItems:
		return nil, api.NewError(api.CodeTooLarge, fmt.Sprintf("at most %d items", api.MaxItems), nil)
	}
	if !slices.Contains([]api.Op{api.OpWrap, api.OpUnwrap, api.OpRewrap, api.OpDataKey}, op) {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("no operation is named %q", op), nil)
	}
	results := make([]api.Result, len(items))
	err := m.use(ctx, "Batch", name, aesTypes(), func(k *memoryKey) error {
		for i, item := range items {
			r, err := k.do(op, item)
			if err != nil {
				r.Error = api.AsError(err)
			}
			results[i] = r
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return results, nil
}

// Sign signs a SHA-256 digest.
func (m *Memory) Sign(ctx context.Context, name string, req api.SignRequest) (s api.Signature, err error) {
	err = m.use(ctx, "Sign", name, []string{"ec-p256", "rsa-2048"}, func(k *memoryKey) (err error) {
		opts, err := signOptions(k.Type, req)
		if err != nil {
			return err
		}
		s.Version = k.Primary
		s.Signature, err = k.secrets[k.Primary-1].private.Sign(rand.Reader, req.Digest, opts)
		return err
	})
	return s, err
}

func signOptions(kind string, req api.SignRequest) (crypto.SignerOpts, error) {
	if len(req.Digest) != sha256.Size || cmp.Or(req.Hash, "sha-256") != "sha-256" {
		return nil, api.NewError(api.CodeBadRequest, "want a SHA-256 digest", nil)
	}
	if kind == "rsa-2048" && req.Padding != "pkcs1v15" {
		return &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}, nil
	}
	return crypto.SHA256, nil
}

// VerifySignature says whether a signature matches.
func (m *Memory) VerifySignature(ctx context.Context, name string, req api.VerifyRequest) (ok bool, err error) {
	err = m.use(ctx, "VerifySignature", name, []string{"ec-p256", "rsa-2048"}, func(k *memoryKey) error {
		opts, err := signOptions(k.Type, req.SignRequest)
		if err != nil {
			return err
		}
		version := cmp.Or(req.Version, k.Primary)
		if version < 1 || version > len(k.secrets) {
			return api.NewError(api.CodeNotFound, fmt.Sprintf("key %s has no version %d", name, version), nil)
		}
		if err := k.enabled(version); err != nil {
			return err
		}
		switch public := k.secrets[version-1].private.Public().(type) {
		case *ecdsa.PublicKey:
			ok = ecdsa.VerifyASN1(public, req.Digest, req.Signature)
		case *rsa.PublicKey:
			if pss, is := opts.(*rsa.PSSOptions); is {
				ok = rsa.VerifyPSS(public, crypto.SHA256, req.Digest, req.Signature, pss) == nil
			} else {
				ok = rsa.VerifyPKCS1v15(public, crypto.SHA256, req.Digest, req.Signature) == nil
			}
		}
		return nil
	})
	return ok, err
}

// Decrypt undoes RSA-OAEP with SHA-256.
func (m *Memory) Decrypt(ctx context.Context, name string, req api.DecryptRequest) (plaintext []byte, err error) {
	err = m.use(ctx, "Decrypt", name, []string{"rsa-2048"}, func(k *memoryKey) error {
		private := k.secrets[k.Primary-1].private.(*rsa.PrivateKey)
		if plaintext, err = rsa.DecryptOAEP(sha256.New(), nil, private, req.Ciphertext, nil); err != nil {
			return api.NewError(api.CodeCorrupt, "the ciphertext does not decrypt", nil)
		}
		return nil
	})
	return plaintext, err
}

// MAC computes an HMAC-SHA-256.
func (m *Memory) MAC(ctx context.Context, name string, req api.MACRequest) (mac api.MAC, err error) {
	err = m.use(ctx, "MAC", name, []string{"hmac-sha256"}, func(k *memoryKey) error {
		h := hmac.New(sha256.New, k.secrets[k.Primary-1].bytes)
		h.Write(req.Message)
		mac = api.MAC{MAC: h.Sum(nil), Version: k.Primary}
		return nil
	})
	return mac, err
}
