package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// mask extracts keys; none means all of them.
func (k *token) mask(form uint, remove int, keys ...pkcs11.ObjectHandle) ([]byte, uint) {
	k.t.Helper()
	var list []byte
	for _, o := range keys {
		list = append(list, words(uint(o))...)
	}
	var n uint
	args := []any{uint(k.h), len(keys), list, 0, 0, form, 0, 0, remove, &n}
	if rv := k.ca.Call("CA_SIMExtract", append(args, []byte(nil))...); rv != 0 {
		return nil, rv
	}
	out := make([]byte, n)
	return out, k.ca.Call("CA_SIMExtract", append(args, out)...)
}

func (k *token) unmask(blob []byte, room int) (made []uint, rv uint) {
	k.t.Helper()
	n, out := uint(room), make([]byte, 8*room)
	rv = k.ca.Call("CA_SIMInsert", uint(k.h), 0, 0, 0, 0, len(blob), blob, &n, out)
	for i := range min(int(n), room) {
		made = append(made, word(out[8*i:]))
	}
	return made, rv
}

// words writes a CK_ULONG as the machine has it.
func words(v uint) []byte {
	b := make([]byte, 8)
	for i := range b {
		b[i] = byte(v >> (8 * i))
	}
	return b
}

func word(b []byte) (v uint) {
	for i := range 8 {
		v |= uint(b[i]) << (8 * i)
	}
	return v
}

func TestSIMKeepsKeysOutside(t *testing.T) {
	k := start(t, lunasim.Options{Kind: "sim"})
	a, b := k.aes("a"), k.aes("b")
	ouids, want := []string{k.ouid(a), k.ouid(b)}, k.bytesOf("a")
	blob, rv := k.mask(0, 0, a, b)
	wantCode(t, "CA_SIMExtract", rv, 0)
	if bytes.Contains(blob, want) {
		t.Error("the key can be read in the blob")
	}
	if _, rv := k.unmask(blob, 2); rv != ckrExists {
		t.Errorf("inserting beside itself answered %s", name(rv))
	}
	all, rv := k.mask(0, 1)
	wantCode(t, "extracting everything and deleting it", rv, 0)
	if n := len(k.find(attr(pkcs11.CKA_TOKEN, true))); n != 0 {
		t.Fatalf("%d keys are left", n)
	}
	if _, rv := k.unmask(all, 1); rv != pkcs11.CKR_BUFFER_TOO_SMALL {
		t.Errorf("too few handles answered %s", name(rv))
	}
	made, rv := k.unmask(blob, 2)
	wantCode(t, "CA_SIMInsert", rv, 0)
	for i, o := range made {
		if got := k.ouid(pkcs11.ObjectHandle(o)); got != ouids[i] {
			t.Errorf("key %d has the OUID %s, want %s", i, got, ouids[i])
		}
	}
	if !bytes.Equal(k.bytesOf("a"), want) {
		t.Error("the key has other bytes")
	}
}

func TestSIMRefusesABlob(t *testing.T) {
	source := start(t, lunasim.Options{Kind: "sim"})
	blob, rv := source.mask(0, 0, source.aes("k"))
	wantCode(t, "CA_SIMExtract", rv, 0)
	spoilt := bytes.Clone(blob)
	spoilt[len(spoilt)/2] ^= 1
	for _, c := range []struct {
		name   string
		target lunasim.Options
		blob   []byte
		want   uint
	}{
		{"under the same masking key it is taken", lunasim.Options{Kind: "sim"}, blob, 0},
		{"under another masking key", lunasim.Options{Kind: "sim", Switches: map[string]string{"smk": "2"}}, blob, ckrNoSMK},
		{"where there is no masking key", lunasim.Options{Kind: "sim", Switches: map[string]string{"smk": "0"}}, blob, ckrNoSMK},
		{"altered", lunasim.Options{Kind: "sim"}, spoilt, ckrSIMCorrupt},
		{"cut", lunasim.Options{Kind: "sim"}, blob[:40], ckrSIMCorrupt},
		{"on a partition that clones", lunasim.Options{}, blob, ckrNotAllowed},
		{"where only private keys are masked", lunasim.Options{Kind: "sim", Policies: map[int]int{7: 0}}, blob, ckrNotAllowed},
		{"where there is no room", lunasim.Options{Kind: "sim", Switches: map[string]string{"limit_bytes": "1"}}, blob, ckrStorageFull},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := open(t, lunasim.New(t, c.target))
			if err := target.Login(target.h, pkcs11.CKU_USER, target.p.PIN); err != nil {
				t.Fatal(err)
			}
			if c.want == ckrStorageFull {
				target.p.Set("limit_bytes", "0")
				target.aes("filler")
				target.p.Set("limit_bytes", "1")
			}
			_, rv := target.unmask(c.blob, 1)
			wantCode(t, "CA_SIMInsert", rv, c.want)
			if n := len(target.find(attr(pkcs11.CKA_ID, []byte("k")))); n != 0 && c.want != 0 {
				t.Errorf("%d keys were left", n)
			}
		})
	}
	_, rv = source.mask(1, 0)
	wantCode(t, "another form of authorization", rv, ckrSIMAuthForm)
}
