package lunasim_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// tryLogin logs in and answers with the code.
func (k *token) tryLogin(user uint, pin string) uint {
	k.t.Helper()
	return code(k.Login(k.h, user, pin))
}

// state is that of a session.
func (k *token) state() uint {
	k.t.Helper()
	info, err := k.GetSessionInfo(k.h)
	if err != nil {
		k.t.Fatal(err)
	}
	return info.State
}

func TestWrongPINsLockThePartition(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{Switches: map[string]string{"login_limit": "3"}})
	k := open(t, p)
	wantCode(t, "the first wrong PIN", k.tryLogin(pkcs11.CKU_USER, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	if err := k.Finalize(); err != nil {
		t.Fatal(err)
	}
	k = open(t, p) // the count is the partition's, not the process's
	wantCode(t, "the second", k.tryLogin(pkcs11.CKU_USER, ""), pkcs11.CKR_PIN_INCORRECT)
	if got := p.FailedLogins(); got != 2 {
		t.Errorf("%d logins have failed, want 2", got)
	}
	if info, err := k.GetTokenInfo(firstLunaSlot); err != nil || info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY == 0 {
		t.Errorf("the flags are %#x, %v", info.Flags, err)
	}
	wantCode(t, "the Crypto User's first", k.tryLogin(ckuCryptoUser, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	var flags, so, user, limited uint
	wantCode(t, "CA_GetContainerStatus", k.ca.Call("CA_GetContainerStatus", firstLunaSlot, 1, &flags, &so, &user, &limited), 0)
	if user != 2 || limited != 1 || so != 0 || flags != 0x02000001 {
		t.Errorf("the status is %#x, %d, %d, %d", flags, so, user, limited)
	}
	wantCode(t, "the right one", k.tryLogin(pkcs11.CKU_USER, p.PIN), 0)
	if got := p.FailedLogins(); got != 0 {
		t.Errorf("%d logins have failed after one that did not", got)
	}
	if err := k.Logout(k.h); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		wantCode(t, "a wrong PIN", k.tryLogin(pkcs11.CKU_USER, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	}
	wantCode(t, "the right one, too late", k.tryLogin(pkcs11.CKU_USER, p.PIN), pkcs11.CKR_PIN_LOCKED)
	if info, err := k.GetTokenInfo(firstLunaSlot); err != nil || info.Flags&pkcs11.CKF_USER_PIN_LOCKED == 0 {
		t.Errorf("the flags are %#x, %v", info.Flags, err)
	}
	wantCode(t, "the Crypto User, who has a count of its own", k.tryLogin(ckuCryptoUser, p.CUPIN), 0)
}

func TestWhoMayLogIn(t *testing.T) {
	k := open(t, lunasim.New(t, lunasim.Options{}))
	wantCode(t, "a security officer", k.tryLogin(pkcs11.CKU_SO, k.p.PIN), pkcs11.CKR_USER_TYPE_INVALID)
	wantCode(t, "the Crypto User with the officer's PIN", k.tryLogin(ckuCryptoUser, k.p.PIN), pkcs11.CKR_PIN_INCORRECT)
	wantCode(t, "the Crypto Officer", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), 0)
	wantCode(t, "the same again", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	wantCode(t, "somebody else beside", k.tryLogin(ckuCryptoUser, k.p.CUPIN), pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN)
	k.p.Set("cu_pin", "")
	if err := k.Logout(k.h); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a role that there is not", k.tryLogin(ckuCryptoUser, ""), pkcs11.CKR_USER_PIN_NOT_INITIALIZED)
}

func TestTheCryptoUserUsesKeysAndChangesNothing(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	officer := login(t, p)
	key := officer.aes("k")
	if err := officer.Finalize(); err != nil {
		t.Fatal(err)
	}
	k := open(t, p)
	wantCode(t, "logging in", k.tryLogin(ckuCryptoUser, p.CUPIN), 0)
	key = k.find(attr(pkcs11.CKA_ID, []byte("k")))[0]
	session := []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_VALUE_LEN, 32)}
	generate := func() error {
		_, err := k.GenerateKey(k.h, mech(pkcs11.CKM_AES_KEY_GEN, nil), session)
		return err
	}
	for _, c := range []struct {
		name string
		do   func() error
		want uint
	}{
		{"encrypting", func() error { return k.seal(key, pkcs11.NewGCMParams(make([]byte, 12), nil, 128)) }, 0},
		{"drawing random bytes", func() error { _, err := k.GenerateRandom(k.h, 8); return err }, 0},
		{"making a session key", generate, 0},
		{"making a token key", func() error { _, err := k.tryAES("x"); return err }, ckrNotAuthorized},
		{"changing a key", func() error {
			return k.SetAttributeValue(k.h, key, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "x")})
		}, ckrNotAuthorized},
		{"copying a key", func() error { _, err := k.CopyObject(k.h, key, nil); return err }, ckrNotAuthorized},
		{"destroying a key", func() error { return k.DestroyObject(k.h, key) }, ckrNotAuthorized},
	} {
		wantCode(t, c.name, code(c.do()), c.want)
	}
	var n uint
	wantCode(t, "cloning", k.ca.Call("CA_CloneAsSourceInit", uint(k.h), 0, 0, []byte(nil), &n, 0), ckrNotAuthorized)
	p.Set("cu_session_objects", "no")
	wantCode(t, "making a session key, by the other reading", code(generate()), ckrNotAuthorized)
}

// seal encrypts something and throws it away.
func (k *token) seal(key pkcs11.ObjectHandle, params *pkcs11.GCMParams) error {
	defer params.Free()
	if err := k.EncryptInit(k.h, mech(pkcs11.CKM_AES_GCM, params), key); err != nil {
		return err
	}
	_, err := k.Encrypt(k.h, []byte("text"))
	return err
}

func TestADeactivatedPartitionLetsNobodyIn(t *testing.T) {
	k := start(t, lunasim.Options{})
	key := k.aes("k")
	k.p.Set("activated", "no")
	if got := k.state(); got != pkcs11.CKS_RW_PUBLIC_SESSION {
		t.Errorf("the session's state is %d", got)
	}
	if err := k.seal(key, pkcs11.NewGCMParams(make([]byte, 12), nil, 128)); err == nil {
		t.Error("a key is used")
	}
	for _, want := range []uint{ckrDisabled, pkcs11.CKR_USER_NOT_LOGGED_IN} {
		k.p.Set("deactivated_code", name(want))
		wantCode(t, "logging in", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), want)
	}
	if got := k.p.FailedLogins(); got != 0 {
		t.Errorf("%d logins were counted as failed", got)
	}
	k.p.Set("activated", "yes")
	wantCode(t, "logging in again", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), 0)
	key = k.find(attr(pkcs11.CKA_ID, []byte("k")))[0] // a login makes the handles of private objects anew
	if err := k.seal(key, pkcs11.NewGCMParams(make([]byte, 12), nil, 128)); err != nil {
		t.Errorf("using the key again: %v", err)
	}
}

func TestAPowerCycleEndsSessionsAndMayEndTheActivation(t *testing.T) {
	for _, c := range []struct {
		name string
		mfa  string
		auto int
		want uint
	}{
		{"with a password", "no", 0, 0},
		{"with a PED and auto-activation", "yes", 1, 0},
		{"with a PED alone", "yes", 0, ckrDisabled},
	} {
		k := start(t, lunasim.Options{Policies: map[int]int{23: c.auto}, Switches: map[string]string{"mfa": c.mfa}})
		k.p.PowerCycle()
		_, err := k.GetSessionInfo(k.h)
		wantCode(t, c.name+": the session", code(err), pkcs11.CKR_SESSION_HANDLE_INVALID)
		k.h = k.session()
		wantCode(t, c.name+": logging in", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), c.want)
	}
}

func TestATamperedHSMAnswersNothingElse(t *testing.T) {
	k := start(t, lunasim.Options{})
	k.p.Set("tampered", "yes")
	_, err := k.GenerateRandom(k.h, 8)
	wantCode(t, "a command", code(err), ckrTampered)
	_, err = k.GetSlotList(true)
	wantCode(t, "listing the slots", code(err), ckrTampered)
	var v [3]uint
	wantCode(t, "a vendor function", k.ca.Call("CA_GetFirmwareVersion", firstLunaSlot, &v[0], &v[1], &v[2]), ckrTampered)
}

func TestASharedApplicationIDBringsSomebodyElsesLogin(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{Switches: map[string]string{"appid_shared": "yes"}})
	k := open(t, p)
	wantCode(t, "logging in with any PIN", k.tryLogin(pkcs11.CKU_USER, "wrong"), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	if got := k.state(); got != pkcs11.CKS_RW_USER_FUNCTIONS {
		t.Errorf("the session's state is %d", got)
	}
	for function, args := range map[string][]any{"CA_RandomizeApplicationID": nil, "CA_SetApplicationID": {1, 2}} {
		if err := k.Finalize(); err != nil {
			t.Fatal(err)
		}
		k = open(t, p)
		wantCode(t, function, k.ca.Call(function, args...), 0)
		wantCode(t, "then a wrong PIN", k.tryLogin(pkcs11.CKU_USER, "wrong"), pkcs11.CKR_PIN_INCORRECT)
		wantCode(t, "then the right one", k.tryLogin(pkcs11.CKU_USER, p.PIN), 0)
	}
}

func TestAPEDWithoutActivationLetsNobodyIn(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{Policies: map[int]int{22: 0}})
	k := open(t, p)
	p.Set("mfa", "yes")
	wantCode(t, "with a PED", k.tryLogin(pkcs11.CKU_USER, p.PIN), ckrDisabled)
	p.Set("mfa", "no")
	wantCode(t, "with a password", k.tryLogin(pkcs11.CKU_USER, p.PIN), 0)
}
