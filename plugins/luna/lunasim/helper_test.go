package lunasim_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
	"kmsd/plugins/luna/lunasim/internal/ca"
)

// Codes that PKCS#11 does not have, by the name in the facts on Luna.
const (
	ckrMissingDomain      = 0x80000009
	ckrSIMCorrupt         = 0x80000019
	ckrNotAuthorized      = 0x8000001a
	ckrSIMAuthForm        = 0x8000001d
	ckrDisabled           = 0x80000020
	ckrStorageFull        = 0x8000002c
	ckrNotAllowed         = 0x80000030
	ckrExists             = 0x8000006f
	ckrTampered           = 0x80000076
	ckrNoSMK              = 0x80000099
	ckrNotAttempted       = 0x80000107
	ckrNoPSK              = 0x80000108
	ckrNoAlgs             = 0x8000010a
	ckrNegotiation        = 0x8000010c
	ckrTunnelInvalid      = 0x8000010d
	ckrTunnelExpired      = 0x8000010f
	ckrClock              = 0x80000110
	ckrProtocolOff        = 0x80000111
	ckrObjectType         = 0x80000112
	ckaOUID               = 0x80000005
	ckuCryptoUser         = 0x80000001
	firstLunaSlot         = 0
	rwSession             = pkcs11.CKF_SERIAL_SESSION | pkcs11.CKF_RW_SESSION
	environment           = "ChrystokiConfigurationPath"
	anyCode          uint = 1 << 62 // where only that it is refused counts
)

// token is a partition that is open in this process.
type token struct {
	*pkcs11.Ctx
	ca *ca.Library
	p  *lunasim.Partition
	t  testing.TB
	h  pkcs11.SessionHandle
}

// load loads the library of a partition and opens nothing.
func load(t testing.TB, p *lunasim.Partition) *token {
	t.Helper()
	setenv(t, p)
	ctx := pkcs11.New(p.Module)
	if ctx == nil {
		t.Fatal("the library cannot be loaded")
	}
	t.Cleanup(ctx.Destroy)
	lib, err := ca.Open(p.Module)
	if err != nil {
		t.Fatal(err)
	}
	return &token{Ctx: ctx, ca: lib, p: p, t: t}
}

// open opens a partition and a session, and logs nobody in.
func open(t testing.TB, p *lunasim.Partition) *token {
	t.Helper()
	k := load(t, p)
	if err := k.Initialize(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Finalize() })
	k.h = k.session()
	return k
}

// start makes a partition and logs the Crypto Officer in.
func start(t testing.TB, o lunasim.Options) *token {
	t.Helper()
	return login(t, lunasim.New(t, o))
}

func login(t testing.TB, p *lunasim.Partition) *token {
	t.Helper()
	k := open(t, p)
	if err := k.Login(k.h, pkcs11.CKU_USER, p.PIN); err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *token) session() pkcs11.SessionHandle {
	k.t.Helper()
	h, err := k.OpenSession(firstLunaSlot, rwSession)
	if err != nil {
		k.t.Fatal(err)
	}
	return h
}

// aes makes a token key with an ID and a label.
func (k *token) aes(id string) pkcs11.ObjectHandle {
	k.t.Helper()
	o, err := k.tryAES(id)
	if err != nil {
		k.t.Fatal(err)
	}
	return o
}

func (k *token) tryAES(id string, more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return k.GenerateKey(k.h, mech(pkcs11.CKM_AES_KEY_GEN, nil), append([]*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, []byte(id)), attr(pkcs11.CKA_LABEL, "label of "+id),
		attr(pkcs11.CKA_VALUE_LEN, 32), attr(pkcs11.CKA_ENCRYPT, true), attr(pkcs11.CKA_DECRYPT, true),
	}, more...))
}

// rsa makes a pair of token keys.
func (k *token) rsa(id string) (public, private pkcs11.ObjectHandle) {
	k.t.Helper()
	common := []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, []byte(id))}
	public, private, err := k.GenerateKeyPair(k.h, mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil),
		append(common[:2:2], attr(pkcs11.CKA_MODULUS_BITS, 1024), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), attr(pkcs11.CKA_VERIFY, true)),
		append(common[:2:2], attr(pkcs11.CKA_SIGN, true)))
	if err != nil {
		k.t.Fatal(err)
	}
	return public, private
}

func (k *token) find(t ...*pkcs11.Attribute) []pkcs11.ObjectHandle {
	k.t.Helper()
	if err := k.FindObjectsInit(k.h, t); err != nil {
		k.t.Fatal(err)
	}
	found, _, err := k.FindObjects(k.h, 100)
	if err != nil {
		k.t.Fatal(err)
	}
	if err := k.FindObjectsFinal(k.h); err != nil {
		k.t.Fatal(err)
	}
	return found
}

func (k *token) get(o pkcs11.ObjectHandle, typ uint) []byte {
	k.t.Helper()
	v, err := k.GetAttributeValue(k.h, o, []*pkcs11.Attribute{attr(typ, nil)})
	if err != nil {
		k.t.Fatal(err)
	}
	return v[0].Value
}

func (k *token) ouid(o pkcs11.ObjectHandle) string {
	k.t.Helper()
	return hex.EncodeToString(k.get(o, ckaOUID))
}

// bytesOf are a key's true bytes.
func (k *token) bytesOf(id string) []byte {
	k.t.Helper()
	return k.p.KeyBytes(k.t)[hex.EncodeToString([]byte(id))]
}

func attr(typ uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, v) }

func mech(typ uint, param any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(typ, param)}
}

// code is the return value behind an error; 0 for none.
func code(err error) uint {
	var e pkcs11.Error
	errors.As(err, &e)
	return uint(e)
}

func wantCode(t testing.TB, what string, got, want uint) {
	t.Helper()
	if got == want || want == anyCode && got != 0 {
		return
	}
	t.Errorf("%s: answered %s, want %s", what, name(got), name(want))
}

func name(ckr uint) string { return fmt.Sprintf("0x%08x", ckr) }

// blob calls a function that ends with a buffer and its length, twice, and returns what
// it wrote.
func (k *token) blob(function string, args ...any) ([]byte, uint) {
	k.t.Helper()
	var n uint
	if rv := k.ca.Call(function, append(args[:len(args):len(args)], []byte(nil), &n)...); rv != 0 {
		return nil, rv
	}
	buf := make([]byte, n)
	rv := k.ca.Call(function, append(args[:len(args):len(args)], buf, &n)...)
	return buf[:min(n, uint(len(buf)))], rv
}

// setenv says to the library that is loaded next where its partition is.
func setenv(t testing.TB, p *lunasim.Partition) {
	t.Setenv(environment, filepath.Dir(p.Conf))
}
