package p11_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func TestTheWayATokenTreatsIVsIsRecognised(t *testing.T) {
	const n = 32 // bytes that were encrypted
	given, own, long := []byte("was given it"), []byte("has made one"), []byte("has made another")
	sealed := bytes.Repeat([]byte{9}, n+pluginproto.GCMTagSize)
	with := func(iv []byte) []byte { return append(bytes.Clone(sealed), iv...) }
	for _, c := range []struct {
		name              string
		given, out, param []byte
		iv                []byte // nil: nothing is recognised
		says              string
	}{
		{"the caller's", given, sealed, given, given, "the caller's"},
		{"its own, in the parameter", given, sealed, own, own, "the token's own, in the mechanism's parameter"},
		{"its own and long, in the parameter", given, sealed, long, long, "the token's own, in the mechanism's parameter"},
		{"its own, appended", given, with(own), given, own, "the token's own, 12 bytes after the tag"},
		{"its own and long, appended", given, with(long), given, long, "the token's own, 16 bytes after the tag"},
		{"the caller's, appended", given, with(given), given, given, "the caller's"},
		{"its own, appended, when none is given", nil, with(long), nil, long, "the token's own, 16 bytes after the tag"},
		{"its own, in the parameter, when none is given", nil, sealed, own, own, "the token's own, in the mechanism's parameter"},
		{"its own and long, in the parameter, where there was room", bytes.Repeat([]byte{1}, 16), sealed, long, long, "the token's own, in the mechanism's parameter"},
		{"none that is told", nil, sealed, nil, nil, ""},
		{"a parameter of another length", given, sealed, []byte("thirteen byte"), nil, ""},
		{"more than an IV behind the tag", given, with(append(long, 1)), given, nil, ""},
		{"no tag", given, sealed[:n], given, nil, ""},
		{"nothing", given, nil, given, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			use, ok := p11.RecogniseIV(c.given, c.out, c.param, n)
			if ok != (c.iv != nil) || ok && use.String() != c.says {
				t.Fatalf("recognised %v as %s, want %s", ok, use, c.says)
			}
			if !ok {
				return
			}
			got, iv, ok := use.Split(c.out, c.param, n)
			if !ok || !bytes.Equal(got, sealed) || !bytes.Equal(iv, c.iv) {
				t.Errorf("taken apart as %x and %q, %v", got, iv, ok)
			}
			if next := use.Give(own); len(next) != len(c.given) || !bytes.HasPrefix(next, own[:min(len(own), len(next))]) {
				t.Errorf("the next encryption is given %q", next)
			}
			if _, _, ok := use.Split(append(c.out, 0), c.param, n); ok {
				t.Error("an answer that is a byte longer is taken too")
			}
		})
	}
}

// An envelope of a token that chooses long IVs has to open where the caller chooses.
func TestLongIVsAreDecrypted(t *testing.T) {
	d := newBench(t).open(t)
	id := newID()
	importKey(t, d, id, pkcs11.CKK_AES, counting(32))
	block, err := aes.NewCipher(counting(32))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCMWithNonceSize(block, pluginproto.GCMLongIVSize)
	if err != nil {
		t.Fatal(err)
	}
	iv, text, aad := []byte("one of 16 bytes!"), []byte("32 bytes of somebody's table key"), []byte("aad")
	cmd := pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: id, Input: gcm.Seal(nil, iv, text, aad), IV: iv, AAD: aad}
	res, err := d.Do(t.Context(), cmd)
	if err != nil || !bytes.Equal(res.Output, text) {
		t.Errorf("decrypted to %q, %v", res.Output, err)
	}
	cmd.IV = iv[:pluginproto.GCMIVSize]
	if _, err := d.Do(t.Context(), cmd); pluginproto.CKROf(err) != pluginproto.CKREncryptedDataInvalid {
		t.Errorf("with the IV cut to 12 bytes: %v", err)
	}
}

// A token that is short of memory for a moment is opened, and asked again by the first
// command.
func TestATokenThatIsShortOfMemoryIsOpened(t *testing.T) {
	b, lib := faultyBench(t)
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_EncryptInit", Arg: pkcs11.CKR_DEVICE_MEMORY})
	d, _ := b.opened(t, quirks())
	if n := lib.Fired(t, 0); n != 1 {
		t.Errorf("it was short of memory %d times", n)
	}
	if err := roundTrip(t.Context(), d, generate(t, d, pluginproto.AES256).ID); err != nil {
		t.Error(err)
	}
}

// A token without AES-GCM cannot serve, and says so when the driver is opened. What may be
// over in a moment is no judgement on the token.
func TestATokenThatDoesNotEncryptIsNotOpened(t *testing.T) {
	b, lib := faultyBench(t)
	for _, c := range []struct {
		name     string
		function string
		ckr      uint32
		times    uint32
		class    pluginproto.Class
		says     string
	}{
		{"it refuses every IV", "C_EncryptInit", pkcs11.CKR_MECHANISM_INVALID, 3, pluginproto.ClassMember, "the token has to allow AES-GCM"},
		{"it does not decrypt what it encrypts", "C_DecryptInit", pkcs11.CKR_MECHANISM_PARAM_INVALID, 3, pluginproto.ClassMember, "it encrypts nothing that it decrypts"},
		{"it fails while it decrypts", "C_Decrypt", pkcs11.CKR_DEVICE_ERROR, 1, pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: c.function, Times: c.times, Arg: c.ckr})
			defer lib.Disarm(t, 0)
			d := p11.New(quirks(), p11.Options{})
			defer d.Close()
			_, err := d.Open(t.Context(), b.request())
			e, ok := errors.AsType[*pluginproto.Error](err)
			if !ok || e.Class != c.class || e.Permanent || !strings.Contains(err.Error(), c.says) {
				t.Errorf("opened with %v, want one of class %s that says %q and may pass", err, c.class, c.says)
			}
		})
	}
}
