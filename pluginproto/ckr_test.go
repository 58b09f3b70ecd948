package pluginproto_test

import (
	"testing"

	"kmsd/pluginproto"
)

func TestCKRName(t *testing.T) {
	for _, tc := range []struct {
		name string
		ckr  uint
		want string
	}{
		{"success", 0x00, "CKR_OK"},
		{"the device is gone", pluginproto.CKRDeviceError, "CKR_DEVICE_ERROR"},
		{"the device has forgotten us", 0x32, "CKR_DEVICE_REMOVED"},
		{"a general error", pluginproto.CKRGeneralError, "CKR_GENERAL_ERROR"},
		{"a tag that does not match", pluginproto.CKREncryptedDataInvalid, "CKR_ENCRYPTED_DATA_INVALID"},
		{"a wrong PIN", pluginproto.CKRPINIncorrect, "CKR_PIN_INCORRECT"},
		{"a locked PIN", pluginproto.CKRPINLocked, "CKR_PIN_LOCKED"},
		{"a wrong signature", pluginproto.CKRSignatureInvalid, "CKR_SIGNATURE_INVALID"},
		{"no token in the slot", pluginproto.CKRTokenNotPresent, "CKR_TOKEN_NOT_PRESENT"},
		{"a lost session", 0xB3, "CKR_SESSION_HANDLE_INVALID"},
		{"nobody logged in", 0x101, "CKR_USER_NOT_LOGGED_IN"},
		{"the last of the standard's values", 0x200, "CKR_FUNCTION_REJECTED"},
		{"a number the standard does not have", 0x7777, "CKR_0x00007777"},
		{"a key that a Luna holds already", 0x8000006F, "CKR_OBJECT_ALREADY_EXISTS"},
		{"a Luna whose clock is not set", 0x80000110, "CKR_ATTESTATION_EXPIRED"},
		{"a vendor's number without a name here", 0x80000007, "CKR_0x80000007"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := pluginproto.CKRName(tc.ckr); got != tc.want {
				t.Errorf("CKRName(%#x) = %q, want %q", tc.ckr, got, tc.want)
			}
		})
	}
}
