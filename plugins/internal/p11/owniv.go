package p11

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"fmt"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// ivUse is how a token treats the IV of an AES-GCM encryption. PKCS#11 says that it takes
// the one that it is given. In FIPS mode an HSM has to make its own, and each says in
// another way which one that was.
type ivUse struct {
	// given is how many bytes of an IV the token is given: 0 to one that refuses any, and
	// GCMLongIVSize to one that needs the room for its own.
	given int
	// appended is how many bytes of an IV follow the tag. Zero: the IV is in the
	// parameter of the mechanism, where the token may have written over the one given.
	appended int
	// own says that the IV is not the one given.
	own bool
}

// give is what a token gets of an IV that the caller has drawn. A longer one ends in
// zeros, and is as good as the one it begins with.
func (u ivUse) give(iv []byte) []byte {
	if u.given == len(iv) {
		return iv
	}
	out := make([]byte, u.given)
	copy(out, iv)
	return out
}

// split takes apart what a token has answered to an encryption of n bytes: the ciphertext
// with its tag, and the IV. param is what the parameter of the mechanism says afterwards.
func (u ivUse) split(out, param []byte, n int) (sealed, iv []byte, ok bool) {
	end := n + pluginproto.GCMTagSize
	if len(out) != end+u.appended {
		return nil, nil, false
	}
	iv = param
	if u.appended > 0 {
		iv = out[end:]
	}
	return out[:end:end], iv, pluginproto.GCMIV(len(iv))
}

// recognise finds out how a token treats IVs from what it has answered to one.
func recognise(given, out, param []byte, n int) (u ivUse, ok bool) {
	u.given = len(given)
	for _, u.appended = range []int{0, pluginproto.GCMIVSize, pluginproto.GCMLongIVSize} {
		if _, iv, ok := u.split(out, param, n); ok {
			u.own = !bytes.Equal(iv, given)
			return u, true
		}
	}
	return ivUse{}, false
}

// String says in status and in messages where the IV comes from.
func (u ivUse) String() string {
	switch {
	case !u.own:
		return "the caller's"
	case u.appended > 0:
		return fmt.Sprintf("the token's own, %d bytes after the tag", u.appended)
	default:
		return "the token's own, in the mechanism's parameter"
	}
}

const opLearn = "finding out how the token treats the IV of AES-GCM"

// ivUse returns how the token treats IVs. It is found out once for a connection, under
// the probe key, or under the first key that is used where there is no probe key.
func (c *conn) ivUse(h pkcs11.SessionHandle, key pkcs11.ObjectHandle) (ivUse, error) {
	if known := c.ivs.Load(); known != nil {
		return *known, nil
	}
	found, err := c.learnIVs(h, key)
	if err == nil {
		c.ivs.Store(&found)
	}
	return found, err
}

// learnIVs finds out how the token treats IVs with one encryption. A token with which that
// goes wrong is asked again: without an IV, and with one that has room for a long one.
func (c *conn) learnIVs(h pkcs11.SessionHandle, key pkcs11.ObjectHandle) (ivUse, error) {
	iv := make([]byte, pluginproto.GCMLongIVSize)
	rand.Read(iv) // never fails
	var refusal error
	for _, n := range []int{pluginproto.GCMIVSize, 0, pluginproto.GCMLongIVSize} {
		use, err := c.tryIV(h, key, iv[:n])
		if err == nil {
			return use, nil
		}
		if class := pluginproto.ClassOf(err); class != pluginproto.ClassCaller && class != pluginproto.ClassUnknown {
			if refusal != nil && isUnfit(err) {
				break // what was refused has left the session unfit
			}
			return ivUse{}, err // it says nothing about IVs
		}
		refusal = cmp.Or(refusal, err)
	}
	return ivUse{}, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKROf(refusal), Op: opLearn,
		Msg: fmt.Sprintf("it encrypts nothing that it decrypts, with an IV and without: the token has to allow AES-GCM (at first: %v)", refusal)}
}

// tryIV encrypts once with an IV, which may be empty, and decrypts with what the answer was
// taken for. An error of ClassCaller or ClassUnknown means that this is not the way.
func (c *conn) tryIV(h pkcs11.SessionHandle, key pkcs11.ObjectHandle, given []byte) (ivUse, error) {
	text, aad := make([]byte, 32), []byte(opLearn)
	rand.Read(text) // never fails
	out, param, err := c.encryptGCM(h, key, given, aad, text)
	if err != nil {
		return ivUse{}, c.codes.fail(opLearn, err)
	}
	use, ok := recognise(given, out, param, len(text))
	if !ok {
		return ivUse{}, pluginproto.Errorf(pluginproto.ClassUnknown, opLearn, "it answers %d bytes to %d, and an IV of %d in the parameter",
			len(out), len(text), len(param))
	}
	sealed, iv, _ := use.split(out, param, len(text))
	opened, err := c.decryptGCM(h, key, iv, aad, sealed)
	if err != nil {
		return ivUse{}, c.codes.fail(opLearn, err)
	}
	if !bytes.Equal(opened, text) {
		return ivUse{}, pluginproto.Errorf(pluginproto.ClassUnknown, opLearn, "it decrypts something other than it has encrypted")
	}
	return use, nil
}

// encryptGCM returns what the token answers, and the IV that the parameter of the
// mechanism says afterwards.
func (c *conn) encryptGCM(h pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, plaintext []byte) (out, param []byte, err error) {
	p := pkcs11.NewGCMParams(iv, aad, 8*pluginproto.GCMTagSize)
	defer p.Free()
	if err := c.lib.EncryptInit(h, mechanism(pkcs11.CKM_AES_GCM, p), key); err != nil {
		return nil, nil, err
	}
	if out, err = c.lib.Encrypt(h, plaintext); err != nil {
		return nil, nil, err
	}
	return out, p.IV(), nil
}

// decryptGCM returns an errTag when the token has taken the key and the parameter, but
// not the data.
func (c *conn) decryptGCM(h pkcs11.SessionHandle, key pkcs11.ObjectHandle, iv, aad, ciphertext []byte) ([]byte, error) {
	p := pkcs11.NewGCMParams(iv, aad, 8*pluginproto.GCMTagSize)
	defer p.Free()
	if err := c.lib.DecryptInit(h, mechanism(pkcs11.CKM_AES_GCM, p), key); err != nil {
		return nil, err
	}
	out, err := c.lib.Decrypt(h, ciphertext)
	if err != nil {
		return nil, errTag{err}
	}
	return out, nil
}
