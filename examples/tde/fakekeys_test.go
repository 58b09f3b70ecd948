package tde_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"sync"

	"kmsd/kms/api"
)

// fakeKeys is kmsd in memory: master keys with versions. An envelope is the
// version followed by a sealed key.
type fakeKeys struct {
	mu       sync.Mutex
	versions map[string][]cipher.AEAD // :: master key → versions
	fail     error                    // of every call, when set
	issued   [][]byte                 // every data key, in the clear
}

func newFakeKeys() *fakeKeys { return &fakeKeys{versions: map[string][]cipher.AEAD{}} }

func newAEAD() cipher.AEAD {
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func (f *fakeKeys) CreateMasterKey(_ context.Context, name string, _ api.KeyOptions) (api.Key, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return api.Key{}, f.fail
	}
	if f.versions[name] != nil {
		return api.Key{}, api.ErrExists
	}
	f.versions[name] = []cipher.AEAD{newAEAD()}
	return api.Key{Name: name, Primary: 1}, nil
}

func (f *fakeKeys) Rotate(_ context.Context, name string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return 0, f.fail
	}
	f.versions[name] = append(f.versions[name], newAEAD())
	return len(f.versions[name]), nil
}

func (f *fakeKeys) DataKey(_ context.Context, name string, n int, aad []byte) (api.DataKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return api.DataKey{}, f.fail
	}
	plain := make([]byte, n)
	rand.Read(plain)
	f.issued = append(f.issued, append([]byte(nil), plain...))
	return api.DataKey{Plaintext: plain, Wrapped: f.wrapLocked(name, plain, aad)}, nil
}

func (f *fakeKeys) wrapLocked(name string, plain, aad []byte) []byte {
	vs := f.versions[name]
	return vs[len(vs)-1].Seal([]byte{byte(len(vs))}, nil, plain, aad)
}

func (f *fakeKeys) Unwrap(_ context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	return f.unwrapLocked(name, wrapped, aad)
}

func (f *fakeKeys) unwrapLocked(name string, wrapped, aad []byte) ([]byte, error) {
	vs := f.versions[name]
	if len(wrapped) == 0 || int(wrapped[0]) > len(vs) || wrapped[0] == 0 {
		return nil, api.ErrWrongKey
	}
	plain, err := vs[wrapped[0]-1].Open(nil, nil, wrapped[1:], aad)
	if err != nil {
		return nil, errors.Join(api.ErrCorrupt, err)
	}
	return plain, nil
}

func (f *fakeKeys) Rewrap(_ context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	plain, err := f.unwrapLocked(name, wrapped, aad)
	if err != nil {
		return nil, err
	}
	return f.wrapLocked(name, plain, aad), nil
}
