package p11

import (
	"errors"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// classes says who has to act on a return value. One that is not here is
// ClassUnknown. PKCS#11 2.40, section 5.1, describes each value; the comments say
// why a class was chosen where that is not obvious.
var classes = map[uint]pluginproto.Class{ // :: return value → class
	// The device, the token or the library is in trouble. GENERAL_ERROR is "an
	// unrecoverable error"; FUNCTION_FAILED is what network HSMs answer when their
	// link drops (Yubico/yubihsm-shell#541). Another member may well succeed.
	pkcs11.CKR_GENERAL_ERROR:                  pluginproto.ClassMember,
	pkcs11.CKR_FUNCTION_FAILED:                pluginproto.ClassMember,
	pkcs11.CKR_DEVICE_ERROR:                   pluginproto.ClassMember,
	pkcs11.CKR_DEVICE_REMOVED:                 pluginproto.ClassMember,
	pkcs11.CKR_TOKEN_NOT_PRESENT:              pluginproto.ClassMember,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:           pluginproto.ClassMember,
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:          pluginproto.ClassMember,
	pkcs11.CKR_SLOT_ID_INVALID:                pluginproto.ClassMember,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:       pluginproto.ClassMember,
	pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED:   pluginproto.ClassMember,
	pkcs11.CKR_CANT_LOCK:                      pluginproto.ClassMember,
	pkcs11.CKR_NEED_TO_CREATE_THREADS:         pluginproto.ClassMember,
	pkcs11.CKR_MUTEX_BAD:                      pluginproto.ClassMember,
	pkcs11.CKR_MUTEX_NOT_LOCKED:               pluginproto.ClassMember,
	pkcs11.CKR_RANDOM_NO_RNG:                  pluginproto.ClassMember,
	pkcs11.CKR_FUNCTION_REJECTED:              pluginproto.ClassMember,
	pkcs11.CKR_INFORMATION_SENSITIVE:          pluginproto.ClassMember,
	pkcs11.CKR_FIPS_SELF_TEST_FAILED:          pluginproto.ClassMember,
	pkcs11.CKR_LIBRARY_LOAD_FAILED:            pluginproto.ClassMember,
	pkcs11.CKR_SAVED_STATE_INVALID:            pluginproto.ClassMember,
	pkcs11.CKR_STATE_UNSAVEABLE:               pluginproto.ClassMember,
	pkcs11.CKR_SESSION_PARALLEL_NOT_SUPPORTED: pluginproto.ClassMember,
	pkcs11.CKR_SESSION_EXISTS:                 pluginproto.ClassMember,
	pkcs11.CKR_SESSION_READ_ONLY:              pluginproto.ClassMember,
	pkcs11.CKR_SESSION_READ_ONLY_EXISTS:       pluginproto.ClassMember,
	pkcs11.CKR_SESSION_READ_WRITE_SO_EXISTS:   pluginproto.ClassMember,
	pkcs11.CKR_USER_TYPE_INVALID:              pluginproto.ClassMember,
	pkcs11.CKR_USER_TOO_MANY_TYPES:            pluginproto.ClassMember,
	pkcs11.CKR_USER_ALREADY_LOGGED_IN:         pluginproto.ClassMember,
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: pluginproto.ClassMember,
	pkcs11.CKR_OPERATION_NOT_INITIALIZED:      pluginproto.ClassMember,

	// Sessions, logins and handles that are gone. They are seen here only after
	// the connection was made anew and the call failed once more.
	pkcs11.CKR_SESSION_CLOSED:         pluginproto.ClassMember,
	pkcs11.CKR_SESSION_HANDLE_INVALID: pluginproto.ClassMember,
	pkcs11.CKR_USER_NOT_LOGGED_IN:     pluginproto.ClassMember,
	pkcs11.CKR_KEY_HANDLE_INVALID:     pluginproto.ClassMember,
	pkcs11.CKR_OBJECT_HANDLE_INVALID:  pluginproto.ClassMember,
	pkcs11.CKR_OPERATION_ACTIVE:       pluginproto.ClassMember,

	// Logging in. These are permanent, see permanentCKR.
	pkcs11.CKR_PIN_INCORRECT:            pluginproto.ClassMember,
	pkcs11.CKR_PIN_INVALID:              pluginproto.ClassMember,
	pkcs11.CKR_PIN_LEN_RANGE:            pluginproto.ClassMember,
	pkcs11.CKR_PIN_EXPIRED:              pluginproto.ClassMember,
	pkcs11.CKR_PIN_LOCKED:               pluginproto.ClassMember,
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED: pluginproto.ClassMember,

	// Short of something for now. Some network HSMs answer DEVICE_MEMORY under a
	// burst (miekg/pkcs11#112).
	pkcs11.CKR_HOST_MEMORY:   pluginproto.ClassBusy,
	pkcs11.CKR_DEVICE_MEMORY: pluginproto.ClassBusy,
	pkcs11.CKR_SESSION_COUNT: pluginproto.ClassBusy,

	// The request would be refused by every member. MECHANISM_INVALID is here
	// because members of one group are checked to be alike when they join.
	pkcs11.CKR_ARGUMENTS_BAD:                    pluginproto.ClassCaller,
	pkcs11.CKR_ACTION_PROHIBITED:                pluginproto.ClassCaller,
	pkcs11.CKR_ATTRIBUTE_READ_ONLY:              pluginproto.ClassCaller,
	pkcs11.CKR_ATTRIBUTE_SENSITIVE:              pluginproto.ClassCaller,
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:           pluginproto.ClassCaller,
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:          pluginproto.ClassCaller,
	pkcs11.CKR_CURVE_NOT_SUPPORTED:              pluginproto.ClassCaller,
	pkcs11.CKR_DATA_INVALID:                     pluginproto.ClassCaller,
	pkcs11.CKR_DATA_LEN_RANGE:                   pluginproto.ClassCaller,
	pkcs11.CKR_DOMAIN_PARAMS_INVALID:            pluginproto.ClassCaller,
	pkcs11.CKR_ENCRYPTED_DATA_INVALID:           pluginproto.ClassCaller,
	pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE:         pluginproto.ClassCaller,
	pkcs11.CKR_EXCEEDED_MAX_ITERATIONS:          pluginproto.ClassCaller,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:           pluginproto.ClassCaller,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED:       pluginproto.ClassCaller,
	pkcs11.CKR_KEY_NOT_WRAPPABLE:                pluginproto.ClassCaller,
	pkcs11.CKR_KEY_SIZE_RANGE:                   pluginproto.ClassCaller,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:            pluginproto.ClassCaller,
	pkcs11.CKR_KEY_UNEXTRACTABLE:                pluginproto.ClassCaller,
	pkcs11.CKR_MECHANISM_INVALID:                pluginproto.ClassCaller,
	pkcs11.CKR_MECHANISM_PARAM_INVALID:          pluginproto.ClassCaller,
	pkcs11.CKR_SIGNATURE_INVALID:                pluginproto.ClassCaller,
	pkcs11.CKR_SIGNATURE_LEN_RANGE:              pluginproto.ClassCaller,
	pkcs11.CKR_TEMPLATE_INCOMPLETE:              pluginproto.ClassCaller,
	pkcs11.CKR_TEMPLATE_INCONSISTENT:            pluginproto.ClassCaller,
	pkcs11.CKR_UNWRAPPING_KEY_SIZE_RANGE:        pluginproto.ClassCaller,
	pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT: pluginproto.ClassCaller,
	pkcs11.CKR_WRAPPED_KEY_INVALID:              pluginproto.ClassCaller,
	pkcs11.CKR_WRAPPED_KEY_LEN_RANGE:            pluginproto.ClassCaller,
	pkcs11.CKR_WRAPPING_KEY_SIZE_RANGE:          pluginproto.ClassCaller,
	pkcs11.CKR_WRAPPING_KEY_TYPE_INCONSISTENT:   pluginproto.ClassCaller,
}

// permanentCKR holds the answers to a login that trying again will not mend, and
// that may lock the token when tried again.
var permanentCKR = map[uint]string{ // :: return value → what to do about it
	pkcs11.CKR_PIN_INCORRECT:            "the PIN is wrong; it is not tried again until the PIN file changes",
	pkcs11.CKR_PIN_INVALID:              "the PIN has characters that the token does not take",
	pkcs11.CKR_PIN_LEN_RANGE:            "the PIN is too short or too long for the token",
	pkcs11.CKR_PIN_EXPIRED:              "the PIN has expired; set a new one on the token",
	pkcs11.CKR_PIN_LOCKED:               "the PIN is locked; the security officer has to reset it",
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED: "the token has no user PIN; initialise it first",
}

// gone holds the answers which may mean that the session, the login or a handle
// no longer exists, or that the session can no longer be used.
var gone = map[uint]bool{
	pkcs11.CKR_SESSION_CLOSED:           true,
	pkcs11.CKR_SESSION_HANDLE_INVALID:   true,
	pkcs11.CKR_USER_NOT_LOGGED_IN:       true,
	pkcs11.CKR_KEY_HANDLE_INVALID:       true,
	pkcs11.CKR_OBJECT_HANDLE_INVALID:    true,
	pkcs11.CKR_OPERATION_ACTIVE:         true,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED: true,

	pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID:   true,
	pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID: true,
}

// errEpoch says that the connection was made anew since the worker took its
// session.
var errEpoch = errors.New("the connection to the token was made anew")

// meaning says what a return value means: to the vendor, else in PKCS#11.
func (c Codes) meaning(ckr uint) Code {
	if code, ok := c[ckr]; ok {
		return code
	}
	hint, permanent := permanentCKR[ckr]
	return Code{Class: classes[ckr], Permanent: permanent, Hint: hint, Gone: gone[ckr]}
}

// isGone reports whether err may mean a lost session, login or handle.
func (c Codes) isGone(err error) bool {
	ckr, ok := ckrOf(err)
	return ok && c.meaning(ckr).Gone || errors.Is(err, errEpoch)
}

// isUnfit reports whether err shows that a session is no use although it lives: one
// that some failure left half way through an operation can only be replaced.
func isUnfit(err error) bool {
	ckr, _ := ckrOf(err)
	return ckr == pkcs11.CKR_OPERATION_ACTIVE
}

// ckrOf finds the return value in an error. crypto11 wraps with a library that
// offers Cause and not Unwrap.
func ckrOf(err error) (uint, bool) {
	for err != nil {
		if e := pkcs11.Error(0); errors.As(err, &e) {
			return uint(e), true
		}
		if e := (*pluginproto.Error)(nil); errors.As(err, &e) {
			return e.CKR, e.CKR != pluginproto.CKROK
		}
		c, ok := err.(interface{ Cause() error })
		if !ok {
			return 0, false
		}
		err = c.Cause()
	}
	return 0, false
}

// fail turns what the library or crypto11 answered into an error of the contract.
// One that is of the contract already passes unchanged.
func (c Codes) fail(op string, err error) error {
	if e := (*pluginproto.Error)(nil); err == nil || errors.As(err, &e) || errors.Is(err, errEpoch) {
		return err
	}
	ckr, ok := ckrOf(err)
	if !ok {
		return &pluginproto.Error{Class: pluginproto.ClassUnknown, Op: op, Msg: err.Error()}
	}
	m := c.meaning(ckr)
	return &pluginproto.Error{Class: m.Class, CKR: ckr, Op: op, Msg: m.Hint, Permanent: m.Permanent}
}

func (s *session) fail(op string, err error) error { return s.c.codes.fail(op, err) }
