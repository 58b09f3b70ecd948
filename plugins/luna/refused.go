package main

import (
	"errors"
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// refusals are PKCS#11's own return values by which an HSM may say that it does not take what
// another one has said. Which of them it is for another cloning domain, CPv1 and CPv3 do not
// tell.
var refusals = []pkcs11.Error{
	pkcs11.CKR_ARGUMENTS_BAD,
	pkcs11.CKR_DATA_INVALID,
	pkcs11.CKR_DATA_LEN_RANGE,
	pkcs11.CKR_ENCRYPTED_DATA_INVALID,
	pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE,
	pkcs11.CKR_SIGNATURE_INVALID,
	pkcs11.CKR_SIGNATURE_LEN_RANGE,
	pkcs11.CKR_WRAPPED_KEY_INVALID,
	pkcs11.CKR_WRAPPED_KEY_LEN_RANGE,
	pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT,
	pkcs11.CKR_TEMPLATE_INCONSISTENT,
}

// isRefusal reports whether err is one of them.
func isRefusal(err error) bool {
	ckr, ok := errors.AsType[pkcs11.Error](err)
	return ok && slices.Contains(refusals, ckr)
}

// refused tells the operator what a refusal usually means. Other errors pass.
func refused(err error) error {
	if !isRefusal(err) {
		return err
	}
	return &pluginproto.Error{
		Class: pluginproto.ClassCaller, CKR: ckrOf(err), Op: "cloning from one HSM to the other",
		Msg: "the HSM does not take what the other one said: most likely the cloning domains of the two partitions differ " +
			"(red key or domain string), so compare those first",
	}
}

// only is the one object of a protocol that carries one at a time.
func only(objects []pkcs11.ObjectHandle) (pkcs11.ObjectHandle, error) {
	if len(objects) != 1 {
		return 0, pluginproto.Errorf(pluginproto.ClassCaller, "cloning keys", "the protocol carries one key at a time, not %d", len(objects))
	}
	return objects[0], nil
}
