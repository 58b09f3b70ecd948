package vendor_test

import (
	"errors"
	"maps"
	"testing"

	"github.com/miekg/pkcs11"
)

func TestCapabilitiesAreTakenWithinBounds(t *testing.T) {
	l := hostile(t, 1)
	if all, err := l.TokenCapabilities(0); err != nil || !maps.Equal(all, map[uint]uint{4: 1, 7: 0}) {
		t.Errorf("more than there were at first: %v, %v", all, err)
	}
	if all, err := l.HSMCapabilities(0); err != nil || !maps.Equal(all, map[uint]uint{7: 1}) {
		t.Errorf("fewer than are said to be written: %v, %v", all, err)
	}
	if all, err := hostile(t, 4).TokenCapabilities(0); !errors.Is(err, pkcs11.Error(pkcs11.CKR_BUFFER_TOO_SMALL)) {
		t.Errorf("more each time: %v, %v", all, err)
	}
}
