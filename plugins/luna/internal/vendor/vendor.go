// Package vendor answers: which functions of its own does the loaded Luna library have, and
// how are they called?
//
// They are found by name, because their places in Luna's own function table have changed over
// the versions; each may be missing, and then its call answers CKR_FUNCTION_NOT_SUPPORTED
// without reaching the library. Every error that the library answered is a pkcs11.Error. What
// it writes is taken within bounds: a library that asks for too much memory, or says that it
// wrote more than it was given, is an error and no panic.
//
// A [Library] holds nothing that has to be given back and is safe for concurrent use as far
// as the library is. It may be used for as long as somebody else keeps the library loaded.
package vendor

// #cgo LDFLAGS: -ldl
// #include <stdlib.h>
// #include "vendor.h"
import "C"

import (
	"fmt"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Function is one of Luna's own functions.
type Function int

const (
	RandomizeApplicationID Function = iota
	SetApplicationID
	GetFirmwareVersion
	GetTokenPolicies
	GetTokenCapabilities
	GetHSMPolicySet
	GetHSMCapabilitySet
	GetSessionInfo
	GetContainerStatus
	GetContainerStorageInformation
	GetTokenStorageInformation
	GetTokenObjectUID
	GetObjectUID
	GetTokenObjectHandle
	GetObjectHandle
	GetTokenCertificates
	GenerateCloningKEV
	CloneAsSourceInit
	CloneAsTargetInit
	CloneAsSource
	CloneAsTarget
	MigrationStartSessionNegotiation
	MigrationContinueSessionNegotiation
	MigrationCloseSession
	Extract
	Insert
	SIMExtract
	SIMInsert
	functions
)

// names are what the library calls them.
var names = [functions]string{ // :: function → symbol
	RandomizeApplicationID:              "CA_RandomizeApplicationID",
	SetApplicationID:                    "CA_SetApplicationID",
	GetFirmwareVersion:                  "CA_GetFirmwareVersion",
	GetTokenPolicies:                    "CA_GetTokenPolicies",
	GetTokenCapabilities:                "CA_GetTokenCapabilities",
	GetHSMPolicySet:                     "CA_GetHSMPolicySet",
	GetHSMCapabilitySet:                 "CA_GetHSMCapabilitySet",
	GetSessionInfo:                      "CA_GetSessionInfo",
	GetContainerStatus:                  "CA_GetContainerStatus",
	GetContainerStorageInformation:      "CA_GetContainerStorageInformation",
	GetTokenStorageInformation:          "CA_GetTokenStorageInformation",
	GetTokenObjectUID:                   "CA_GetTokenObjectUID",
	GetObjectUID:                        "CA_GetObjectUID",
	GetTokenObjectHandle:                "CA_GetTokenObjectHandle",
	GetObjectHandle:                     "CA_GetObjectHandle",
	GetTokenCertificates:                "CA_GetTokenCertificates",
	GenerateCloningKEV:                  "CA_GenerateCloningKEV",
	CloneAsSourceInit:                   "CA_CloneAsSourceInit",
	CloneAsTargetInit:                   "CA_CloneAsTargetInit",
	CloneAsSource:                       "CA_CloneAsSource",
	CloneAsTarget:                       "CA_CloneAsTarget",
	MigrationStartSessionNegotiation:    "CA_MigrationStartSessionNegotiation",
	MigrationContinueSessionNegotiation: "CA_MigrationContinueSessionNegotiation",
	MigrationCloseSession:               "CA_MigrationCloseSession",
	Extract:                             "CA_Extract",
	Insert:                              "CA_Insert",
	SIMExtract:                          "CA_SIMExtract",
	SIMInsert:                           "CA_SIMInsert",
}

func (f Function) String() string { return names[f] }

// Library is the functions of one loaded library.
type Library struct {
	found [functions]C.fn_t // :: function → where it is, nil when it is missing
}

// Load finds the functions of the library at a path, which is loaded already.
func Load(module string) (*Library, error) {
	path := C.CString(module)
	defer C.free(unsafe.Pointer(path))
	var symbols [functions]*C.char
	for f, name := range names {
		symbols[f] = C.CString(name)
		defer C.free(unsafe.Pointer(symbols[f]))
	}
	l := &Library{}
	// The array of C strings is Go's memory with C's pointers, which cgo allows.
	if C.find_functions(path, &symbols[0], &l.found[0], C.int(functions)) == 0 {
		return nil, fmt.Errorf("the library %s is not loaded", module)
	}
	return l, nil
}

// Missing returns which of some functions the library does not have.
func (l *Library) Missing(all ...Function) []Function {
	var missing []Function
	for _, f := range all {
		if l.found[f] == nil {
			missing = append(missing, f)
		}
	}
	return missing
}

// Has reports whether the library has all of some functions.
func (l *Library) Has(all ...Function) bool { return len(l.Missing(all...)) == 0 }

// need returns where a function is.
func (l *Library) need(f Function) (C.fn_t, error) {
	if l.found[f] == nil {
		return nil, fmt.Errorf("%s, which the library does not have: %w", f, pkcs11.Error(pkcs11.CKR_FUNCTION_NOT_SUPPORTED))
	}
	return l.found[f], nil
}

// check makes an error of what a function answered.
func check(f Function, rv C.ulong_t) error {
	if rv == pkcs11.CKR_OK {
		return nil
	}
	return fmt.Errorf("%s: %w", f, pkcs11.Error(rv))
}

// pointer is where bytes are, nil for none.
func pointer(b []byte) *C.byte_t { return (*C.byte_t)(unsafe.SliceData(b)) }

// maxOutput bounds, in bytes, what the library may ask for in one call. The largest buffer
// that Thales' samples give is 65,536.
const maxOutput = 512 << 10

// output calls a function that is asked for the size of its output first. One that finds
// the buffer too small after all is given as much as it then wants, once.
func output(f Function, call func(out *C.byte_t, n *C.ulong_t) C.ulong_t) ([]byte, error) {
	var size C.ulong_t
	if err := check(f, call(nil, &size)); err != nil {
		return nil, err
	}
	return outputOf(f, size, call)
}

// outputOf is output for a function that is given a buffer of some size at once.
func outputOf(f Function, size C.ulong_t, call func(out *C.byte_t, n *C.ulong_t) C.ulong_t) ([]byte, error) {
	for again := true; ; again = false {
		if size == 0 || size > maxOutput {
			return nil, fmt.Errorf("%s asks for a buffer of %d bytes: %w", f, size, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
		}
		buf, n := make([]byte, size), size
		rv := call(pointer(buf), &n)
		if rv == pkcs11.CKR_BUFFER_TOO_SMALL && n > size && again {
			size = n
			continue
		}
		if err := check(f, rv); err != nil {
			return nil, err
		}
		if n > size {
			return nil, fmt.Errorf("%s says that it wrote %d bytes where there is room for %d: %w", f, n, size, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
		}
		return buf[:n], nil
	}
}
