package p11

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
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
func (q Quirks) locate(lib *pkcs11.Ctx, s settings) (_ place, err error) {
	const op = "looking for the token"
	switch err := lib.Initialize(); {
	case err == nil:
		defer func() {
			if ferr := lib.Finalize(); err == nil && ferr != nil {
				err = q.Codes.fail("finalising the library", ferr)
			}
		}()
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)):
		// Another driver of this process has it open, which only tests do.
	default:
		return place{}, q.unready(q.Codes.fail("initialising the library", err))
	}

	slots, err := lib.GetSlotList(true)
	if err != nil {
		return place{}, q.Codes.fail("listing the slots", err)
	}
	var seen sighting
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err != nil {
			// A broken reader in another slot is not our token's trouble.
			seen.others = append(seen.others, fmt.Sprintf("slot %d: %v", slot, err))
			continue
		}
		matches := (s.label == "" || info.Label == s.label) && (s.serial == "" || info.SerialNumber == s.serial)
		switch {
		case info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0:
		case slices.Contains(q.VirtualModels, info.Model):
			if matches {
				seen.virtual = append(seen.virtual, fmt.Sprintf("slot %d, model %s", slot, info.Model))
			} else { // the library may hide the tokens behind it
				seen.others = append(seen.others, fmt.Sprintf("%q (an HA group that the client library makes up)", info.Label))
			}
		case matches:
			seen.found = append(seen.found, place{slot, info})
		default:
			seen.others = append(seen.others, fmt.Sprintf("%q (serial %s)", info.Label, info.SerialNumber))
		}
	}
	return seen.choose(op, s)
}

// unready adds where to look to a library that does not begin and gives no reason that the
// codes have words for.
func (q Quirks) unready(err error) error {
	e, ok := errors.AsType[*pluginproto.Error](err)
	names := slices.Sorted(maps.Keys(q.Env))
	names = append(names, slices.Sorted(maps.Keys(q.ConfDirs))...)
	if ok && e.Msg == "" && len(names) > 0 {
		e.Msg = fmt.Sprintf("is its configuration there and the right one (%s), and may the user of kmsd read all that it names?", strings.Join(names, ", "))
	}
	return err
}

// sighting is what a look at all slots has shown.
type sighting struct {
	found   []place  // that are what the settings mean
	virtual []string // that would be, but stand for several tokens
	others  []string
}

// choose takes the one token that was found, and says what is wrong when there is not one.
func (g sighting) choose(op string, s settings) (place, error) {
	switch {
	case len(g.found) == 1:
		return g.found[0], nil
	case len(g.found) == 0 && len(g.virtual) > 0:
		// The token itself may be off, and have the label of its group; a serial number is
		// the group's own.
		e := permanent(op, fmt.Sprintf("the token %s is an HA group that the client library makes up (%s); "+
			"a member is one physical token: name that one, and let kmsd do the grouping", s.target(), strings.Join(g.virtual, "; ")))
		e.CKR, e.Permanent = pluginproto.CKRTokenNotPresent, s.serial != ""
		return place{}, e
	case len(g.found) == 0:
		msg := fmt.Sprintf("there is no token %s; check %s and %s", s.target(), settingLabel, settingSerial)
		if len(g.others) > 0 {
			msg += "; present: " + strings.Join(g.others, ", ")
		}
		// Not permanent: the library leaves out a token whose HSM is off, and it comes back.
		return place{}, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRTokenNotPresent, Op: op, Msg: msg}
	default:
		serials := make([]string, len(g.found))
		for i, p := range g.found {
			serials[i] = p.info.SerialNumber
		}
		return place{}, permanent(op, fmt.Sprintf("there are %d tokens %s; choose one by %s: %s",
			len(g.found), s.target(), settingSerial, strings.Join(serials, ", ")))
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
