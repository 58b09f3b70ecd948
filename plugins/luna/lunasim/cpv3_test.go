package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// cpv3 is one transfer by CPv3, step by step: a step that fails leaves its code.
type cpv3 struct {
	source, target *token
	s, t           pkcs11.SessionHandle
	key            pkcs11.ObjectHandle
	a, b, c        []byte
	made           uint
}

func newCPv3(source, target *token, key pkcs11.ObjectHandle) *cpv3 {
	return &cpv3{source: source, target: target, s: source.session(), t: target.session(), key: key}
}

func (x *cpv3) sourceInit() (rv uint) {
	// The flag comes last here, behind the buffer.
	var n uint
	if rv := x.source.ca.Call("CA_CloneAsSourceInit", uint(x.s), 0, 0, []byte(nil), &n, 0); rv != 0 {
		return rv
	}
	x.a = make([]byte, n)
	return x.source.ca.Call("CA_CloneAsSourceInit", uint(x.s), 0, 0, x.a, &n, 0)
}

func (x *cpv3) targetInit() (rv uint) {
	x.b, rv = x.target.blob("CA_CloneAsTargetInit", uint(x.t), x.a, len(x.a), 0, 0, 0)
	return rv
}

func (x *cpv3) asSource() (rv uint) {
	x.c, rv = x.source.blob("CA_CloneAsSource", uint(x.s), 0, uint(x.key), x.b, len(x.b), 0)
	return rv
}

func (x *cpv3) asTarget() uint {
	return x.target.ca.Call("CA_CloneAsTarget", uint(x.t), 0, 0, x.c, len(x.c), 0, 0, 0, &x.made)
}

// run goes on until a step fails.
func (x *cpv3) run() uint {
	for _, step := range []func() uint{x.sourceInit, x.targetInit, x.asSource, x.asTarget} {
		if rv := step(); rv != 0 {
			return rv
		}
	}
	return 0
}

func TestCPv3ClonesAKeyWithItsOUID(t *testing.T) {
	source, target := start(t, lunasim.Options{Firmware: "7.7.0"}), start(t, lunasim.Options{Firmware: "7.7.0"})
	key := source.aes("k")
	x := newCPv3(source, target, key)
	wantCode(t, "the transfer", x.run(), 0)
	made := pkcs11.ObjectHandle(x.made)
	if got, want := target.ouid(made), source.ouid(key); got != want {
		t.Errorf("the OUID is %s on the target and %s on the source", got, want)
	}
	if got := string(target.get(made, pkcs11.CKA_LABEL)); got != "label of k" {
		t.Errorf("the label is %q", got)
	}
	want := source.bytesOf("k")
	if got := target.bytesOf("k"); len(want) != 32 || !bytes.Equal(got, want) {
		t.Errorf("the target has %x, the source %x", got, want)
	}
	for _, blob := range [][]byte{x.a, x.b, x.c} {
		if bytes.Contains(blob, want) || bytes.Contains(blob, want[:8]) {
			t.Error("the key can be read in a blob")
		}
	}
}
