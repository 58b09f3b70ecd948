package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// cpv1 is one transfer by CPv1, step by step.
type cpv1 struct {
	source, target      *token
	s, t                pkcs11.SessionHandle
	key                 pkcs11.ObjectHandle
	cert, kev, one, two []byte
	made                uint
}

func newCPv1(source, target *token, key pkcs11.ObjectHandle) *cpv1 {
	return &cpv1{source: source, target: target, s: source.session(), t: target.session(), key: key}
}

// certificate asks for both types, as somebody does who does not know which.
func (x *cpv1) certificate() (rv uint) {
	for _, typ := range []uint{0xb, 0xf} {
		if x.cert, rv = x.source.blob("CA_GetTokenCertificates", firstLunaSlot, typ); rv == 0 {
			return 0
		}
	}
	return rv
}

func (x *cpv1) makeKEV() (rv uint) {
	x.kev, rv = x.target.blob("CA_GenerateCloningKEV", uint(x.t))
	return rv
}

func (x *cpv1) targetInit() (rv uint) {
	x.one, rv = x.target.blob("CA_CloneAsTargetInit", uint(x.t), x.cert, len(x.cert), x.kev, len(x.kev), 0)
	return rv
}

func (x *cpv1) asSource() (rv uint) {
	x.two, rv = x.source.blob("CA_CloneAsSource", uint(x.s), 0, uint(x.key), x.one, len(x.one), 0)
	return rv
}

func (x *cpv1) asTarget() uint {
	return x.target.ca.Call("CA_CloneAsTarget", uint(x.t), x.kev, len(x.kev), x.two, len(x.two), 0, 0, 0, &x.made)
}

func (x *cpv1) run() uint {
	rv := x.steps(x.makeKEV)
	if rv != pkcs11.CKR_DATA_INVALID {
		return rv
	}
	return x.steps(func() (rv uint) { // the KEV is the source's, by the other reading
		x.kev, rv = x.source.blob("CA_GenerateCloningKEV", uint(x.s))
		return rv
	})
}

func (x *cpv1) steps(kev func() uint) uint {
	for _, step := range []func() uint{x.certificate, kev, x.targetInit, x.asSource, x.asTarget} {
		if rv := step(); rv != 0 {
			return rv
		}
	}
	return 0
}

func TestCPv1ClonesAPrivateKeyWithItsOUID(t *testing.T) {
	old := lunasim.Options{Firmware: "6.24.7"}
	source, target := start(t, old), start(t, old)
	_, private := source.rsa("r")
	x := newCPv1(source, target, private)
	wantCode(t, "the transfer", x.run(), 0)
	if got, want := target.ouid(pkcs11.ObjectHandle(x.made)), source.ouid(private); got != want {
		t.Errorf("the OUID is %s on the target and %s on the source", got, want)
	}
	if want := source.bytesOf("r"); len(want) == 0 || !bytes.Equal(target.bytesOf("r"), want) {
		t.Error("the key has other bytes on the target")
	}
}

func TestCPv1RefusesWhatIsNotOfTheTransfer(t *testing.T) {
	old := lunasim.Options{Firmware: "7.4.0"}
	source, target, third := start(t, old), start(t, old), start(t, old)
	key := source.aes("k")
	other := newCPv1(source, target, key)
	wantCode(t, "another transfer", other.run(), 0)
	if err := target.DestroyObject(target.h, pkcs11.ObjectHandle(other.made)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		after int // spoil comes behind so many steps
		spoil func(x *cpv1)
		want  uint
	}{
		{"a certificate that was altered", 1, func(x *cpv1) { x.cert[15] ^= 1 }, pkcs11.CKR_DATA_INVALID},
		{"another HSM's certificate", 1, func(x *cpv1) {
			x.cert, _ = third.blob("CA_GetTokenCertificates", firstLunaSlot, 0xb)
		}, pkcs11.CKR_DATA_INVALID},
		{"a KEV of nobody's", 2, func(x *cpv1) { x.kev = make([]byte, len(x.kev)) }, pkcs11.CKR_DATA_INVALID},
		{"part 1 altered", 3, func(x *cpv1) { x.one[15] ^= 1 }, pkcs11.CKR_DATA_INVALID},
		{"part 2 altered", 4, func(x *cpv1) { x.two[len(x.two)/2] ^= 1 }, pkcs11.CKR_DATA_INVALID},
		{"part 2 of another transfer", 4, func(x *cpv1) { x.two = other.two }, pkcs11.CKR_DATA_INVALID},
		{"the KEV of another transfer", 4, func(x *cpv1) { x.kev = other.kev }, pkcs11.CKR_DATA_INVALID},
		{"part 1 in place of part 2", 4, func(x *cpv1) { x.two = x.one }, pkcs11.CKR_DATA_INVALID},
		{"something else on the session", 4, func(x *cpv1) { target.use(x.t) }, pkcs11.CKR_OPERATION_NOT_INITIALIZED},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newCPv1(source, target, key)
			rv := uint(0)
			for i, step := range []func() uint{x.certificate, x.makeKEV, x.targetInit, x.asSource, x.asTarget} {
				if i == c.after {
					c.spoil(x)
				}
				if rv = step(); rv != 0 {
					break
				}
			}
			wantCode(t, "the transfer", rv, c.want)
			if n := len(target.find(attr(pkcs11.CKA_TOKEN, true))); n != 0 {
				t.Errorf("%d objects were left", n)
			}
		})
	}
}

func TestOneCertificateTypeIsTaken(t *testing.T) {
	k := start(t, lunasim.Options{})
	for _, c := range []struct {
		set       string
		typ, want uint
	}{
		{"twc3", 0xb, 0}, {"twc3", 0xf, pkcs11.CKR_ARGUMENTS_BAD},
		{"ecc", 0xf, 0}, {"ecc", 0xb, pkcs11.CKR_ARGUMENTS_BAD},
		{"any", 0xb, 0}, {"any", 0xf, 0}, {"any", 9, pkcs11.CKR_ARGUMENTS_BAD},
	} {
		k.p.Set("twc", c.set)
		_, rv := k.blob("CA_GetTokenCertificates", firstLunaSlot, c.typ)
		wantCode(t, c.set, rv, c.want)
	}
}
