package lunasim_test

import (
	"math/rand/v2"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
	"kmsd/plugins/luna/lunasim/internal/ca"
)

// vendor functions and how many parameters they have.
var vendor = map[string]int{
	"CA_GetTokenCertificates": 4, "CA_GenerateCloningKEV": 3, "CA_CloneAsSourceInit": 6, "CA_CloneAsTargetInit": 8,
	"CA_CloneAsSource": 8, "CA_CloneAsTarget": 9, "CA_CloneObject": 5,
	"CA_MigrationStartSessionNegotiation": 6, "CA_MigrationContinueSessionNegotiation": 12, "CA_MigrationCloseSession": 3,
	"CA_Extract": 2, "CA_Insert": 2, "CA_SIMExtract": 11, "CA_SIMInsert": 9,
	"CA_GetTokenPolicies": 5, "CA_GetTokenCapabilities": 5, "CA_GetHSMPolicySet": 5, "CA_GetHSMCapabilitySet": 5, "CA_GetContainerPolicySet": 6,
	"CA_GetFirmwareVersion": 4, "CA_GetContainerStatus": 6, "CA_GetTokenStorageInformation": 6, "CA_GetContainerStorageInformation": 7,
	"CA_GetSessionInfo": 5, "CA_GetObjectUID": 5, "CA_GetObjectHandle": 5, "CA_GetTokenObjectUID": 4, "CA_GetTokenObjectHandle": 4,
	"CA_SetApplicationID": 2, "CA_RandomizeApplicationID": 0,
}

func TestNULLIsRefused(t *testing.T) {
	for _, o := range []lunasim.Options{{}, {Kind: "sim"}, {Firmware: "7.4.0"}} {
		k := start(t, o)
		for function, n := range vendor {
			for _, first := range []uint{0, uint(k.h)} {
				args := make([]any, n)
				for i := range args {
					args[i] = 0
				}
				if n > 0 {
					args[0] = first
				}
				rv := k.ca.Call(function, args...)
				if harmless := function == "CA_SetApplicationID" || function == "CA_RandomizeApplicationID"; (rv == 0) != harmless {
					t.Errorf("%s with nothing but %d answered %s", function, first, name(rv))
				}
			}
		}
	}
}

func TestFunctionsOfPKCS11RefuseNULL(t *testing.T) {
	k := start(t, lunasim.Options{})
	key := uint(k.aes("k"))
	for function, args := range map[string][]any{
		"C_GetFunctionList": {0}, "C_GetInfo": {0}, "C_GetSlotList": {0, 0, 0}, "C_GetSlotInfo": {0, 0}, "C_GetTokenInfo": {0, 0},
		"C_GetMechanismList": {0, 0, 0}, "C_GetMechanismInfo": {0, 0, 0}, "C_OpenSession": {0, 6, 0, 0, 0}, "C_GetSessionInfo": {uint(k.h), 0},
		"C_Login": {uint(k.h), 7, 0, 0}, "C_CreateObject": {uint(k.h), 0, 1, 0}, "C_CopyObject": {uint(k.h), key, 0, 1, 0},
		"C_GetAttributeValue": {uint(k.h), key, 0, 1}, "C_SetAttributeValue": {uint(k.h), key, 0, 1}, "C_FindObjectsInit": {uint(k.h), 0, 1},
		"C_FindObjects": {uint(k.h), 0, 1, 0}, "C_EncryptInit": {uint(k.h), 0, key}, "C_Encrypt": {uint(k.h), 0, 0, 0, 0},
		"C_DecryptInit": {uint(k.h), 0, key}, "C_Decrypt": {uint(k.h), 0, 0, 0, 0}, "C_SignInit": {uint(k.h), 0, key}, "C_Sign": {uint(k.h), 0, 0, 0, 0},
		"C_GenerateKey": {uint(k.h), 0, 0, 0, 0}, "C_GenerateKeyPair": {uint(k.h), 0, 0, 0, 0, 0, 0, 0}, "C_WrapKey": {uint(k.h), 0, key, key, 0, 0},
		"C_EncryptUpdate": {uint(k.h), 0, 8, 0, 0}, "C_EncryptFinal": {uint(k.h), 0, 0}, "C_DecryptUpdate": {uint(k.h), 0, 8, 0, 0}, "C_DecryptFinal": {uint(k.h), 0, 0},
		"C_DigestInit": {uint(k.h), 0}, "C_Digest": {uint(k.h), 0, 8, 0, 0}, "C_DigestUpdate": {uint(k.h), 0, 8}, "C_DigestFinal": {uint(k.h), 0, 0},
		"C_SignUpdate": {uint(k.h), 0, 8}, "C_SignFinal": {uint(k.h), 0, 0}, "C_VerifyInit": {uint(k.h), 0, key}, "C_Verify": {uint(k.h), 0, 8, 0, 8},
		"C_VerifyUpdate": {uint(k.h), 0, 8}, "C_VerifyFinal": {uint(k.h), 0, 8}, "C_GetObjectSize": {uint(k.h), key, 0}, "C_DestroyObject": {uint(k.h), 0},
		"C_UnwrapKey": {uint(k.h), 0, key, 0, 0, 0, 0, 0}, "C_GenerateRandom": {uint(k.h), 0, 8}, "C_DeriveKey": {uint(k.h), 0, 0, 0, 0, 0},
	} {
		if rv := k.ca.Call(function, args...); rv == 0 {
			t.Errorf("%s took NULL", function)
		}
	}
	for _, mode := range []string{"caller", "appended"} { // with an operation under way
		k.p.Set("gcm_iv", mode)
		params := pkcs11.NewGCMParams(make([]byte, 12), nil, 128)
		defer params.Free()
		if err := k.EncryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), pkcs11.ObjectHandle(key)); err != nil {
			t.Fatal(err)
		}
		if rv := k.ca.Call("C_Encrypt", uint(k.h), 0, 8, 0, 0); rv == 0 {
			t.Errorf("an encryption with the %s's IV took NULL", mode)
		}
		k.h = k.session()
	}
}

// TestBlobsOfNoise gives the functions that take bytes ones that nobody made, and ones
// that somebody made for something else.
func TestBlobsOfNoise(t *testing.T) {
	k, source := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	sim := start(t, lunasim.Options{Kind: "sim"})
	x := newCPv3(source, k, source.aes("k"))
	x.run()
	kept, _ := sim.mask(0, 0, sim.aes("s"))
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		blob := make([]byte, r.IntN(200))
		for j := range blob {
			blob[j] = byte(r.Uint32())
		}
		if real := [][]byte{x.a, x.b, x.c, kept}; i%2 == 0 {
			blob = append([]byte(nil), real[r.IntN(len(real))]...)
			blob = blob[:r.IntN(len(blob))]
		}
		y := newCPv3(source, k, x.key)
		y.sourceInit()
		y.a = blob
		if rv := y.targetInit(); rv == 0 {
			t.Fatalf("a first blob of noise was taken: %x", blob)
		}
		y.b = blob
		if rv := y.asSource(); rv == 0 {
			t.Fatalf("a second blob of noise was taken: %x", blob)
		}
		if _, rv := sim.unmask(blob, 4); rv == 0 {
			t.Fatalf("a masked key of noise was taken: %x", blob)
		}
		for _, h := range []pkcs11.SessionHandle{y.s, y.t} {
			_ = y.source.CloseSession(h)
			_ = y.target.CloseSession(h)
		}
	}
}

func TestParametersOfNoise(t *testing.T) {
	k := start(t, lunasim.Options{})
	for _, function := range []string{"CA_Extract", "CA_Insert"} {
		for _, words := range [][]uint{{}, {cpv4Extract, 0, 0}, {cpv4Insert, 0, 0}, {cpv4Extract, 0, 88}, {cpv4Insert, 0, 96}, {7, 0, 0}} {
			var m ca.Memory
			at, _ := m.Words(append(words, 0, 0, 0)...)
			if rv := k.ca.Call(function, uint(k.h), at); rv == 0 {
				t.Errorf("%s took %v", function, words)
			}
			zeros, _ := m.Bytes(nil, 96)
			for mechanism, size := range map[uint]uint{cpv4Extract: 88, cpv4Insert: 96} {
				at, _ = m.Words(mechanism, zeros, size)
				if rv := k.ca.Call(function, uint(k.h), at); rv == 0 {
					t.Errorf("%s took a structure of zeros", function)
				}
			}
			m.Free()
		}
	}
}
