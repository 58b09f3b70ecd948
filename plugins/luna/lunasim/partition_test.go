package lunasim_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

func TestATokenSaysWhatItIs(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{Label: "payroll", Serial: "1234567890123", Firmware: "7.7.1"})
	k := open(t, p)
	slots, err := k.GetSlotList(true)
	if err != nil || !slices.Equal(slots, []uint{firstLunaSlot}) {
		t.Fatalf("the slots are %v, %v", slots, err)
	}
	info, err := k.GetTokenInfo(firstLunaSlot)
	if err != nil {
		t.Fatal(err)
	}
	if info.Label != "payroll" || info.SerialNumber != "1234567890123" || !strings.HasPrefix(info.Model, "LunaSA") {
		t.Errorf("the token is %+v", info)
	}
	if info.FirmwareVersion.Major != 7 || info.FirmwareVersion.Minor != 7 || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
		t.Errorf("the token is %+v", info)
	}
	var v [3]uint
	wantCode(t, "CA_GetFirmwareVersion", k.ca.Call("CA_GetFirmwareVersion", firstLunaSlot, &v[0], &v[1], &v[2]), 0)
	if v != [3]uint{7, 7, 1} {
		t.Errorf("the firmware is %v", v)
	}
	if k.FailedLogins() != 0 {
		t.Errorf("%d logins have failed", k.FailedLogins())
	}
}

// FailedLogins is the partition's.
func (k *token) FailedLogins() int { return k.p.FailedLogins() }

func TestAKeyClaimsToBeALunaKey(t *testing.T) {
	k := start(t, lunasim.Options{})
	key := k.aes("k")
	_, private := k.rsa("r")
	for _, o := range []pkcs11.ObjectHandle{key, private} {
		for typ, want := range map[uint]byte{
			pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 1, pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_TOKEN: 1,
			pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_NEVER_EXTRACTABLE: 1,
		} {
			if got := k.get(o, typ); !bytes.Equal(got, []byte{want}) {
				t.Errorf("attribute %#x is %v, want %d", typ, got, want)
			}
		}
	}
	for o, typ := range map[pkcs11.ObjectHandle]uint{key: pkcs11.CKA_VALUE, private: pkcs11.CKA_PRIVATE_EXPONENT} {
		_, err := k.GetAttributeValue(k.h, o, []*pkcs11.Attribute{attr(typ, nil)})
		wantCode(t, "reading the value of a key", code(err), pkcs11.CKR_ATTRIBUTE_SENSITIVE)
	}
	if got := string(k.get(key, pkcs11.CKA_LABEL)); got != "label of k" {
		t.Errorf("the label is %q", got)
	}
	if got := k.get(key, ckaOUID); len(got) != 12 {
		t.Errorf("the OUID is %x", got)
	}
	if len(k.p.KeyBytes(t)) != 2 {
		t.Errorf("the keys on the token are %v", k.p.KeyBytes(t))
	}
}

func TestAKeyEncryptsAndDecrypts(t *testing.T) {
	k := start(t, lunasim.Options{})
	key, iv, text := k.aes("k"), bytes.Repeat([]byte{7}, 12), []byte("what a database holds")
	params := pkcs11.NewGCMParams(iv, nil, 128)
	defer params.Free()
	if err := k.EncryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), key); err != nil {
		t.Fatal(err)
	}
	sealed, err := k.Encrypt(k.h, text)
	if err != nil || len(sealed) != len(text)+16 {
		t.Fatalf("the ciphertext has %d bytes, %v", len(sealed), err)
	}
	if err := k.DecryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), key); err != nil {
		t.Fatal(err)
	}
	if opened, err := k.Decrypt(k.h, sealed); err != nil || !bytes.Equal(opened, text) {
		t.Fatalf("it decrypts to %q, %v", opened, err)
	}
}

func TestAPartitionOutlivesItsProcess(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	k := login(t, p)
	ouid := k.ouid(k.aes("k"))
	if err := k.Finalize(); err != nil {
		t.Fatal(err)
	}
	again := login(t, p)
	found := again.find(attr(pkcs11.CKA_ID, []byte("k")))
	if len(found) != 1 || again.ouid(found[0]) != ouid {
		t.Errorf("there are %d keys", len(found))
	}
}
