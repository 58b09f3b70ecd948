package vendor

// #include "vendor.h"
import "C"

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// TokenPolicies returns the policies of the partition in a slot by their numbers.
func (l *Library) TokenPolicies(slot uint) (map[uint]uint, error) {
	return l.settings(GetTokenPolicies, slot)
}

// TokenCapabilities returns what the partition's policies may be set to, by their numbers.
func (l *Library) TokenCapabilities(slot uint) (map[uint]uint, error) {
	return l.settings(GetTokenCapabilities, slot)
}

// HSMPolicies returns the policies of the HSM that the partition is on.
func (l *Library) HSMPolicies(slot uint) (map[uint]uint, error) {
	return l.settings(GetHSMPolicySet, slot)
}

// HSMCapabilities returns what the HSM's policies may be set to.
func (l *Library) HSMCapabilities(slot uint) (map[uint]uint, error) {
	return l.settings(GetHSMCapabilitySet, slot)
}

const (
	// maxSettings is more than any partition or HSM has.
	maxSettings = 1024
	// notWritten is where the library has written no number: zero is one.
	notWritten = ^C.ulong_t(0)
)

// settings calls a function that gives numbers and their values in two arrays, and is asked
// for their lengths first. One that finds the arrays too short after all is given what it then
// wants, once.
func (l *Library) settings(which Function, slot uint) (map[uint]uint, error) {
	f, err := l.need(which)
	if err != nil {
		return nil, err
	}
	var nIDs, nValues C.ulong_t
	if err := check(which, C.ca_policies(f, C.ulong_t(slot), nil, &nIDs, nil, &nValues)); err != nil {
		return nil, err
	}
	for again := true; ; again = false {
		n := max(nIDs, nValues)
		if n > maxSettings {
			return nil, fmt.Errorf("%s speaks of %d settings: %w", which, n, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
		}
		if n == 0 {
			return map[uint]uint{}, nil
		}
		ids, values := make([]C.ulong_t, n), make([]C.ulong_t, n)
		for i := range ids {
			ids[i] = notWritten
		}
		nIDs, nValues = n, n
		rv := C.ca_policies(f, C.ulong_t(slot), &ids[0], &nIDs, &values[0], &nValues)
		if rv == pkcs11.CKR_BUFFER_TOO_SMALL && max(nIDs, nValues) > n && again {
			continue
		}
		if err := check(which, rv); err != nil {
			return nil, err
		}
		all := map[uint]uint{}
		for i, id := range ids[:min(nIDs, nValues, n)] {
			if id != notWritten {
				all[uint(id)] = uint(values[i])
			}
		}
		return all, nil
	}
}
