package p11_test

import (
	"errors"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func TestReturnValuesAreClassed(t *testing.T) {
	const caller, busy, member, unknown = pluginproto.ClassCaller, pluginproto.ClassBusy, pluginproto.ClassMember, pluginproto.ClassUnknown
	for _, tc := range []struct {
		ckr       uint
		class     pluginproto.Class
		permanent bool
	}{
		{pkcs11.CKR_DEVICE_ERROR, member, false},
		{pkcs11.CKR_DEVICE_REMOVED, member, false},
		{pkcs11.CKR_TOKEN_NOT_PRESENT, member, false},
		{pkcs11.CKR_GENERAL_ERROR, member, false},
		{pkcs11.CKR_FUNCTION_FAILED, member, false},
		{pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, member, false},
		{pkcs11.CKR_SESSION_HANDLE_INVALID, member, false},
		{pkcs11.CKR_SESSION_CLOSED, member, false},
		{pkcs11.CKR_USER_NOT_LOGGED_IN, member, false},
		{pkcs11.CKR_OBJECT_HANDLE_INVALID, member, false},
		{pkcs11.CKR_KEY_HANDLE_INVALID, member, false},
		{pkcs11.CKR_OPERATION_ACTIVE, member, false},
		{pkcs11.CKR_PIN_INCORRECT, member, true},
		{pkcs11.CKR_PIN_LOCKED, member, true},
		{pkcs11.CKR_PIN_EXPIRED, member, true},
		{pkcs11.CKR_USER_PIN_NOT_INITIALIZED, member, true},
		{pkcs11.CKR_HOST_MEMORY, busy, false},
		{pkcs11.CKR_DEVICE_MEMORY, busy, false},
		{pkcs11.CKR_SESSION_COUNT, busy, false},
		{pkcs11.CKR_ARGUMENTS_BAD, caller, false},
		{pkcs11.CKR_DATA_LEN_RANGE, caller, false},
		{pkcs11.CKR_ENCRYPTED_DATA_INVALID, caller, false},
		{pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, caller, false},
		{pkcs11.CKR_KEY_TYPE_INCONSISTENT, caller, false},
		{pkcs11.CKR_KEY_UNEXTRACTABLE, caller, false},
		{pkcs11.CKR_MECHANISM_INVALID, caller, false},
		{pkcs11.CKR_SIGNATURE_INVALID, caller, false},
		{pkcs11.CKR_TEMPLATE_INCONSISTENT, caller, false},
		{pkcs11.CKR_WRAPPED_KEY_INVALID, caller, false},
		{pkcs11.CKR_FUNCTION_CANCELED, unknown, false},
		{pkcs11.CKR_BUFFER_TOO_SMALL, unknown, false},
		{pkcs11.CKR_VENDOR_DEFINED + 7, unknown, false},
	} {
		t.Run(pluginproto.CKRName(tc.ckr), func(t *testing.T) {
			for _, err := range []error{p11.Classify(tc.ckr), p11.ClassifyWrapped(tc.ckr)} {
				var e *pluginproto.Error
				if !errors.As(err, &e) || e.Class != tc.class || e.CKR != tc.ckr || e.Permanent != tc.permanent {
					t.Errorf("%#v, want class %s", err, tc.class)
				}
				if e != nil && e.Permanent && e.Msg == "" {
					t.Error("a permanent failure does not say what to do")
				}
			}
		})
	}
}
