package p11

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// place is where the token is and what it says of itself.
type place struct {
	slot uint
	info pkcs11.TokenInfo
}

// load opens the library, not yet initialised. The caller destroys it.
func load(s settings) (*pkcs11.Ctx, error) {
	for name, value := range s.env {
		// The library reads it with getenv; cgo keeps the two environments alike.
		if err := os.Setenv(name, value); err != nil {
			return nil, fmt.Errorf("setting %s: %w", name, err)
		}
	}
	lib := pkcs11.New(s.module)
	if lib == nil {
		return nil, permanent("loading the PKCS#11 library",
			fmt.Sprintf("%s cannot be loaded: is it a PKCS#11 library for this machine, and are the libraries it needs installed?", s.module))
	}
	return lib, nil
}

// locate initialises the library, finds the one token that the settings mean, and
// finalises the library again, so that crypto11 can initialise it.
func locate(lib *pkcs11.Ctx, s settings) (_ place, err error) {
	const op = "looking for the token"
	switch err := lib.Initialize(); {
	case err == nil:
		defer func() {
			if ferr := lib.Finalize(); err == nil && ferr != nil {
				err = fail("finalising the library", ferr)
			}
		}()
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)):
		// Another driver of this process has it open, which only tests do.
	default:
		return place{}, fail("initialising the library", err)
	}

	slots, err := lib.GetSlotList(true)
	if err != nil {
		return place{}, fail("listing the slots", err)
	}
	var found []place
	var others []string
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err != nil {
			// A broken reader in another slot is not our token's trouble.
			others = append(others, fmt.Sprintf("slot %d: %v", slot, err))
			continue
		}
		switch {
		case info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
		case (s.label == "" || info.Label == s.label) && (s.serial == "" || info.SerialNumber == s.serial):
			found = append(found, place{slot, info})
		default:
			others = append(others, fmt.Sprintf("%q (serial %s)", info.Label, info.SerialNumber))
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		msg := fmt.Sprintf("there is no token %s; check %s and %s", s.target(), settingLabel, settingSerial)
		if len(others) > 0 {
			msg += "; present: " + strings.Join(others, ", ")
		}
		// Not permanent: the library leaves out a token whose HSM is off, and it comes back.
		return place{}, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRTokenNotPresent, Op: op, Msg: msg}
	default:
		serials := make([]string, len(found))
		for i, p := range found {
			serials[i] = p.info.SerialNumber
		}
		return place{}, permanent(op, fmt.Sprintf("there are %d tokens %s; choose one by %s: %s",
			len(found), s.target(), settingSerial, strings.Join(serials, ", ")))
	}
}

// checkPIN refuses to log in where one more wrong PIN could lock the token.
// Flags are CK_TOKEN_INFO.flags, PKCS#11 2.40 section 3.2.
func checkPIN(flags uint) error {
	const op = "checking the token before logging in"
	e := func(ckr uint, msg string) error {
		return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: ckr, Op: op, Msg: msg, Permanent: true}
	}
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return e(pkcs11.CKR_PIN_LOCKED, permanentCKR[pkcs11.CKR_PIN_LOCKED])
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return e(pkcs11.CKR_PIN_INCORRECT, "one try is left before the token locks; log in once by hand with the right PIN, then start again")
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return e(pkcs11.CKR_USER_PIN_NOT_INITIALIZED, permanentCKR[pkcs11.CKR_USER_PIN_NOT_INITIALIZED])
	case flags&pkcs11.CKF_USER_PIN_TO_BE_CHANGED != 0:
		return e(pkcs11.CKR_PIN_EXPIRED, permanentCKR[pkcs11.CKR_PIN_EXPIRED])
	}
	return nil
}
