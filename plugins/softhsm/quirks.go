package main

import (
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// quirks is what was found with SoftHSM 2.6.1 on OpenSSL 3.
func quirks() p11.Quirks {
	return p11.Quirks{
		Driver: "softhsm",
		Modules: []string{
			"/usr/lib/softhsm/libsofthsm2.so",
			"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
			"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
			"/usr/lib64/softhsm/libsofthsm2.so",
			"/usr/lib64/pkcs11/libsofthsm2.so",
			"/usr/lib/pkcs11/libsofthsm2.so",
			"/usr/local/lib/softhsm/libsofthsm2.so",
			"/opt/homebrew/lib/softhsm/libsofthsm2.so",
		},
		Env: map[string]string{"softhsm_conf": "SOFTHSM2_CONF"},
		// Of 480 starts of the library, by four processes at a time that log in to
		// tokens of one directory, 21 did not find their token, and one crashed. With
		// the lock none did.
		Apart: "softhsm_conf",

		// AES-256-GCM encryptions of 32 bytes in one process, two cores, thousands
		// a second, by threads with a session each:
		//
		//	threads         1    2    4    8
		//	token object   41   32   50   59
		//	session copy  115   91   94   99
		//
		// One thread on a copy is the fastest and the safest: the library takes its
		// own locks around everything that is short.
		SessionCopies: true,
		FastWorkers:   1,
		// Private operations are long and run side by side.
		SlowWorkers: 2,

		CallersIV: true,
		// C_Decrypt answers the same to a wrong tag as to a broken token.
		GCMTagFault: pluginproto.CKRGeneralError,
		// CKM_RSA_PKCS_OAEP takes SHA-1 only; C_DecryptInit answers SHA-256 with
		// CKR_ARGUMENTS_BAD (2.6.1).
		RawOAEP: true,
	}
}
