package p11

import (
	"crypto"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// cachedKey is a key as one connection knows it. It is not changed once it is in
// the cache, but for checked.
type cachedKey struct {
	typ   pluginproto.KeyType
	token pkcs11.ObjectHandle // the secret or private key on the token
	use   pkcs11.ObjectHandle // what commands use: token, or a session copy of it

	signer crypto.Signer    // pairs only
	pub    crypto.PublicKey // pairs only

	checked time.Time // when the token object was last seen; guarded by conn.mu
}

func (k *cachedKey) copied() bool { return k.use != k.token }

// maxCached bounds the handle cache, and with it the session objects.
const maxCached = 8192

// cached returns a key for a command. It calls into the library when the key is not known,
// or when the token was not asked about it for a while: a session copy outlives its key, and
// a handle of a key that was removed by other means may be another key's by now.
func (s *session) cached(id pluginproto.KeyID) (*cachedKey, error) {
	now := time.Now()
	s.c.mu.Lock()
	k := s.c.keys[id]
	fresh := k != nil && now.Sub(k.checked) < s.d.quirks.copyCheck()
	s.c.mu.Unlock()
	if fresh {
		return k, nil
	}
	if k != nil {
		if s.shows(id, k.token) {
			s.c.mu.Lock()
			k.checked = now
			s.c.mu.Unlock()
			return k, nil
		}
		s.c.drop(id)
	}
	k, err := s.lookUp(id)
	if err != nil {
		return nil, err
	}
	k.checked = now
	return s.c.keep(id, k), nil
}

func (s *session) lookUp(id pluginproto.KeyID) (*cachedKey, error) {
	o, err := s.knownKey(id)
	if err != nil {
		return nil, err
	}
	d, err := s.describe(o)
	if err != nil {
		return nil, err
	}
	if d.typ == "" {
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, "looking for the key "+id.String(), "it is of a type that is not supported")
	}
	k := &cachedKey{typ: d.typ, pub: d.pub}
	if d.typ.Symmetric() {
		k.token = o.secret[0]
		k.use, err = s.sessionCopy(k.token)
		return k, err
	}
	k.token, k.use = o.private[0], o.private[0]
	k.signer, err = s.signer(id)
	return k, err
}

// sessionCopy makes the copy of a secret key that commands run on, where that
// pays. The copy is sensitive as the key is, and cannot be extracted as it can. A key
// of another program's that may not be copied, or not so, serves itself.
func (s *session) sessionCopy(key pkcs11.ObjectHandle) (pkcs11.ObjectHandle, error) {
	if !s.d.quirks.SessionCopies {
		return key, nil
	}
	h, err := s.c.lib.CopyObject(s.c.keeper, key, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
	})
	if err = s.fail("copying a key into the session", err); pluginproto.ClassOf(err) == pluginproto.ClassCaller {
		return key, nil
	}
	return h, err
}

// signer asks crypto11 for a pair that is known to be whole.
func (s *session) signer(id pluginproto.KeyID) (crypto.Signer, error) {
	const op = "opening a key pair"
	set := crypto11.NewAttributeSet()
	if err := set.Set(crypto11.CkaId, id[:]); err != nil {
		return nil, s.fail(op, err)
	}
	if err := set.Set(crypto11.CkaToken, true); err != nil {
		return nil, s.fail(op, err)
	}
	k, err := s.c.c11.FindKeyPairWithAttributes(set)
	if err != nil {
		return nil, s.fail(op, err)
	}
	if k == nil {
		// This session saw it a moment ago, so crypto11's have lost their login, or
		// the pair was removed in between. Both are told apart by trying again.
		return nil, s.fail(op, pkcs11.Error(pkcs11.CKR_KEY_HANDLE_INVALID))
	}
	return k, nil
}

// keep puts a key into the cache and returns the one to use: the first, when two
// workers looked at the same time.
func (c *conn) keep(id pluginproto.KeyID, k *cachedKey) *cachedKey {
	use, surplus := c.keepOnly(id, k)
	c.release(surplus)
	return use
}

func (c *conn) keepOnly(id pluginproto.KeyID, k *cachedKey) (use, surplus *cachedKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if was := c.keys[id]; was != nil {
		return was, k
	}
	if len(c.keys) >= maxCached {
		for other, was := range c.keys { // any one will do
			delete(c.keys, other)
			surplus = was
			break
		}
	}
	c.keys[id] = k
	return k, surplus
}

// drop forgets a key and gives its session copy back.
func (c *conn) drop(id pluginproto.KeyID) {
	c.mu.Lock()
	k := c.keys[id]
	delete(c.keys, id)
	c.mu.Unlock()
	c.release(k)
}

// forget empties the cache and the index and gives the session copies back.
func (c *conn) forget() {
	c.index.forget()
	c.mu.Lock()
	keys := c.keys
	c.keys = map[pluginproto.KeyID]*cachedKey{}
	c.mu.Unlock()
	for _, k := range keys {
		c.release(k)
	}
}

// release destroys a session copy. One that cannot be destroyed dies with its
// session.
func (c *conn) release(k *cachedKey) {
	if k != nil && k.copied() {
		_ = c.lib.DestroyObject(c.keeper, k.use)
	}
}
