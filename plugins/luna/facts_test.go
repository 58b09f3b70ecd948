package main

import (
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/internal/vendor"
	"kmsd/plugins/luna/lunasim"
)

// Each fact, as it is told while the partition changes under the driver.
func TestFactsFollowThePartition(t *testing.T) {
	e := openEnd(t, lunasim.Options{Firmware: "7.8.4"})
	if e.info.Firmware != "7.8.4" {
		t.Errorf("firmware %q", e.info.Firmware)
	}
	told := func(name, value string, warning bool) {
		t.Helper()
		facts, err := e.Facts(e.place())
		if err != nil {
			t.Fatal(err)
		}
		if f := fact(facts, name); !strings.Contains(f.Value, value) || value == "" && f.Name != "" || f.Warning != warning {
			t.Errorf("%s: %+v, want %q, %v", name, f, value, warning)
		}
	}
	told("cloning", "cpv4, cpv3", false)
	told("FIPS mode", "off", false)
	told("lacks", "", false)
	told("activation", "again by itself after a restart", false)
	told("failed logins", "none", false)
	told("storage", "0 objects", false)

	e.aes(t, "one")
	told("storage", "1 objects", false)
	e.p.Set("limit_bytes", "100")
	told("storage", "0 of 100 bytes free: destroy what is not needed", true)
	e.p.Set("limit_bytes", "0")
	told("storage", "bytes free", false)

	if err := e.Logout(e.h); err != nil {
		t.Fatal(err)
	}
	if err := e.Login(e.h, cryptoUser, "wrong"); err != pkcs11.Error(pkcs11.CKR_PIN_INCORRECT) {
		t.Fatalf("a wrong PIN: %v", err)
	}
	told("failed logins", "0 as Crypto Officer, 1 as Crypto User", true)

	// What a partition and its client bring with them.
	noPartition := []string{"CA_GetSessionInfo"}
	noStatus := []string{"CA_GetContainerStatus", "CA_GetContainerStorageInformation"}
	little := []string{
		"CA_GetContainerStorageInformation", "CA_GetTokenStorageInformation", "CA_GetHSMPolicySet", "CA_GetTokenPolicies", "CA_GetFirmwareVersion",
	}
	for _, tc := range []struct {
		name    string
		options lunasim.Options
		fact    string
		value   string
		warning bool
	}{
		{"activation that a restart ends", lunasim.Options{Policies: map[int]int{policyAutoActivation: 0}}, "activation", "policy 23) is off", true},
		{"a partition that needs none", lunasim.Options{Policies: map[int]int{policyActivation: 0}}, "activation", "", false},
		{"FIPS mode", lunasim.Options{HSMPolicies: map[int]int{hsmNonFIPS: 0}}, "FIPS mode", "on", false},
		{"a client that does not say how the partition is", lunasim.Options{Without: noStatus}, "failed logins", "", false},
		{"a client that knows the token's storage alone", lunasim.Options{Without: noStatus}, "storage", "0 objects", false},
		{"a client that knows no partitions", lunasim.Options{Without: noPartition}, "failed logins", "", false},
		{"a client that knows no partitions and the token's storage", lunasim.Options{Without: noPartition}, "storage", "0 objects", false},
		{"a client that knows no storage", lunasim.Options{Without: little}, "storage", "", false},
		{"a client that shows no policies of the HSM", lunasim.Options{Without: little}, "FIPS mode", "", false},
		{"a client that shows no policies", lunasim.Options{Without: little}, "cloning", "cpv1-7.7", false},
		{"a client that knows the short firmware version", lunasim.Options{Firmware: "7.8.4", Without: little}, "cloning", "cpv4", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e = openEnd(t, tc.options)
			told(tc.fact, tc.value, tc.warning)
		})
	}
}

// What the HSM says is refused is not known; a broken link is an error.
func TestFactsTellARefusalFromAFailure(t *testing.T) {
	e := openEnd(t, lunasim.Options{})
	for _, function := range []string{"CA_GetContainerStatus", "CA_GetContainerStorageInformation"} {
		for _, answer := range []struct {
			ckr  uint
			fine bool
		}{{ckrUserNotAuthorized, true}, {ckrOperationNotAllowed, true}, {pkcs11.CKR_DEVICE_ERROR, false}, {own + 0x1F, false}} {
			f := e.p.Arm(lunasim.Fault{What: lunasim.Answer, Function: function, Arg: uint32(answer.ckr)})
			_, err := e.Facts(e.place())
			if f.Disarm(); (err == nil) != answer.fine || err != nil && ckrOf(err) != answer.ckr {
				t.Errorf("%s answers 0x%X: %v", function, answer.ckr, err)
			}
		}
	}
}

func TestActivationIsWarnedOf(t *testing.T) {
	p := partition{policies: policies{policyActivation: 1, policyAutoActivation: 1}}
	facts := p.statusFacts(vendor.Status{Activated: false})
	if f := fact(facts, "activation"); !f.Warning || !strings.Contains(f.Value, "not activated") {
		t.Errorf("%+v", f)
	}
}

// A number that the library does not know is all bits set, and no alarm.
func TestNumbersThatAreNotKnownAreNoFacts(t *testing.T) {
	for _, fails := range []vendor.Status{{OfficerFails: 1<<64 - 1}, {UserFails: 1<<64 - 1}, {OfficerFails: 1<<64 - 1, UserFails: 1}, {UserFails: 1<<32 - 1}} {
		if facts := (partition{}).statusFacts(fails); len(facts) != 0 {
			t.Errorf("%+v: %+v", fails, facts)
		}
	}
	if facts := (partition{}).statusFacts(vendor.Status{UserFails: 1}); !fact(facts, "failed logins").Warning {
		t.Errorf("one failed login: %+v", facts)
	}
}

func TestIdentitiesAreReadAsTheLibraryCan(t *testing.T) {
	for _, tc := range []struct {
		name  string
		gone  []string
		known bool
	}{
		{"by the token", nil, true},
		{"by the container", []string{"CA_GetTokenObjectUID", "CA_GetTokenObjectHandle"}, true},
		{"not at all", []string{"CA_GetTokenObjectUID", "CA_GetTokenObjectHandle", "CA_GetObjectUID", "CA_GetObjectHandle"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := openEnd(t, lunasim.Options{Without: tc.gone})
			key := e.aes(t, "one")
			uid, err := e.UID(e.place(), key)
			if err != nil || (len(uid) == vendor.UIDSize) != tc.known {
				t.Fatalf("the identity: %x, %v", uid, err)
			}
			found, ok, err := e.ByUID(e.place(), uid)
			if err != nil || ok != tc.known || ok && found != key {
				t.Errorf("found %d, %v, %v", found, ok, err)
			}
		})
	}
}
