package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

func TestWhoseIVItIs(t *testing.T) {
	mine, text := bytes.Repeat([]byte{7}, 16), []byte("what a database holds")
	for _, c := range []struct {
		name     string
		fips     bool
		mode     string
		length   string // gcm_iv_len
		iv       []byte
		appended int // bytes behind the tag
		own      bool
		want     uint
	}{
		{"the caller's, where nothing else is said", false, "auto", "16", mine[:12], 0, false, 0},
		{"appended in FIPS mode", true, "auto", "16", mine[:12], 16, true, 0},
		{"the caller's in FIPS mode, by another reading", true, "caller", "16", mine[:12], 0, false, 0},
		{"appended though the caller gave none", false, "appended", "16", nil, 16, true, 0},
		{"in the parameter, 12 bytes", false, "params", "12", mine[:12], 0, true, 0},
		{"in the parameter, 16 bytes", false, "params", "16", mine, 0, true, 0},
		{"in a parameter with no room", false, "params", "16", mine[:12], 0, true, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		{"none is taken", false, "refused", "16", mine[:12], 0, true, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		{"none is taken and none given", false, "refused", "16", nil, 16, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := start(t, lunasim.Options{Switches: map[string]string{"gcm_iv": c.mode, "gcm_iv_len": c.length}})
			key := k.aes("k")
			if c.fips {
				k.p.Set("hsm.12", "0")
			}
			params := pkcs11.NewGCMParams(c.iv, []byte("aad"), 128)
			defer params.Free()
			err := k.EncryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), key)
			wantCode(t, "C_EncryptInit", code(err), c.want)
			if err != nil {
				return
			}
			sealed, err := k.Encrypt(k.h, text)
			if err != nil || len(sealed) != len(text)+16+c.appended {
				t.Fatalf("%d bytes, %v", len(sealed), err)
			}
			iv, body := params.IV(), sealed
			if c.appended > 0 {
				body, iv = sealed[:len(sealed)-c.appended], sealed[len(sealed)-c.appended:]
			}
			if bytes.Equal(iv, c.iv) == c.own {
				t.Errorf("the IV is %x, the caller's was %x", iv, c.iv)
			}
			back := pkcs11.NewGCMParams(iv, []byte("aad"), 128)
			defer back.Free()
			if err := k.DecryptInit(k.h, mech(pkcs11.CKM_AES_GCM, back), key); err != nil {
				t.Fatal(err)
			}
			if opened, err := k.Decrypt(k.h, body); err != nil || !bytes.Equal(opened, text) {
				t.Errorf("it decrypts to %q, %v", opened, err)
			}
		})
	}
}

func TestAWrongTagIsAnsweredAsTheSwitchSays(t *testing.T) {
	k := start(t, lunasim.Options{})
	key := k.aes("k")
	for _, want := range []uint{pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_GENERAL_ERROR} {
		k.p.Set("gcm_tag_code", name(want))
		params := pkcs11.NewGCMParams(make([]byte, 12), nil, 128)
		defer params.Free()
		if err := k.DecryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), key); err != nil {
			t.Fatal(err)
		}
		_, err := k.Decrypt(k.h, make([]byte, 40))
		wantCode(t, "zeros", code(err), want)
	}
}
