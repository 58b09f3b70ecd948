package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/internal/vendor"
	"kmsd/plugins/luna/lunasim"
)

// Who reads that a policy is off wants to know whether it can be on, and whom to ask.
func TestAPolicyThatIsOffSaysWhetherItCanBeOn(t *testing.T) {
	const (
		forbids = "capabilities forbid it"
		allows  = "capabilities allow it"
	)
	all := policies{0: 1, 4: 1, 7: 1, 16: 1, 22: 1, 23: 1}
	for _, tc := range []struct {
		name string
		part partition
		fact string
		says []string
		not  string // what it must not say
	}{
		{"secret keys stay, and need not", partition{policies: policies{4: 0}, can: all}, "cloning",
			[]string{"secret keys stay where they are: policy 4 is off; the partition's " + allows + " for 4: ask its security officer " +
				"(lunacm: partition changepolicy -policy 4 -value 1), and mind that it may delete the keys in it"}, forbids},
		{"secret keys stay for good", partition{policies: policies{4: 0}, can: policies{4: 0}}, "cloning",
			[]string{"policy 4 is off; the partition's " + forbids + " for 4, so nobody can switch that on"}, allows},
		{"private keys stay, and nobody knows whether they must", partition{policies: policies{0: 0}}, "cloning",
			[]string{"private keys stay where they are: policy 0 is off"}, "capabilit"},
		{"no keys leave, and all may", partition{policies: policies{0: 0, 4: 0}, can: all}, "cloning",
			[]string{"none: policies 0 and 4 of the partition", allows + " for 0 and 4", "-policy 0,4 -value 1,1"}, forbids},
		{"no keys leave, and secret ones may", partition{policies: policies{0: 0, 4: 0}, can: policies{0: 0, 4: 1}}, "cloning",
			[]string{allows + " for 4", "-policy 4 -value 1", forbids + " for 0"}, ""},
		{"the HSM does not clone, and could", partition{hsm: policies{7: 0}, hsmCan: all}, "cloning",
			[]string{"none: policy 7 of the HSM", "the HSM's " + allows + " for 7", "lunash: hsm changepolicy -policy 7 -value 1", "its partitions"}, forbids},
		{"the HSM cannot clone, whatever the partition's capabilities are", partition{hsm: policies{7: 0}, hsmCan: policies{7: 0}, can: all}, "cloning",
			[]string{"none: policy 7 of the HSM", "the HSM's " + forbids + " for 7"}, allows},
		{"the HSM does not replicate, and could", partition{hsm: policies{16: 0}, hsmCan: all}, "cloning",
			[]string{"none: policy 16 of the HSM", "the HSM's " + allows + " for 16"}, forbids},
		{"private keys alone are masked", partition{policies: policies{0: 0, 3: 1, 4: 0, 7: 0}, can: policies{7: 0}}, "cloning",
			[]string{"sim; secret keys stay where they are: policy 7 is off", forbids + " for 7"}, "policy 4"},
		{"a restart ends the activation, and need not", partition{policies: policies{22: 1, 23: 0}, can: all}, "activation",
			[]string{"auto-activation (policy 23) is off", allows + " for 23"}, forbids},
		{"a restart ends the activation for good", partition{policies: policies{22: 1, 23: 0}, can: policies{23: 0}}, "activation",
			[]string{"auto-activation (policy 23) is off", forbids + " for 23"}, allows},
		{"nobody may activate it, who could", partition{policies: policies{22: 0}, can: all}, "activation",
			[]string{"policy 22 is off: every start of the driver needs somebody at the HSM", allows + " for 22"}, forbids},
	} {
		t.Run(tc.name, func(t *testing.T) {
			facts := append(tc.part.facts(tc.part.offers(everything)), tc.part.statusFacts(vendor.Status{Activated: true})...)
			f := fact(facts, tc.fact)
			for _, text := range tc.says {
				if !strings.Contains(f.Value, text) {
					t.Errorf("%+v does not say %q", f, text)
				}
			}
			if !f.Warning || tc.not != "" && strings.Contains(f.Value, tc.not) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// What the library tells of capabilities is in the facts, and so is that it cannot.
func TestCapabilitiesAreReadFromTheLibrary(t *testing.T) {
	blind := []string{"CA_GetTokenCapabilities", "CA_GetHSMCapabilitySet"}
	secretOff, hsmOff := map[int]int{4: 0}, map[int]int{7: 0}
	for _, tc := range []struct {
		name    string
		options lunasim.Options
		says    string
		not     string
	}{
		{"the partition allows it", lunasim.Options{Policies: secretOff}, "the partition's capabilities allow it for 4", "forbid"},
		{"the partition forbids it", lunasim.Options{Policies: secretOff, Capabilities: secretOff}, "the partition's capabilities forbid it for 4", "allow"},
		{"the HSM forbids it", lunasim.Options{HSMPolicies: hsmOff, HSMCapabilities: hsmOff}, "the HSM's capabilities forbid it for 7", "allow"},
		{"the library does not say", lunasim.Options{Policies: secretOff, Without: blind}, "policy 4 is off", "capabilit"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := openEnd(t, tc.options)
			if f := fact(e.info.Facts, "cloning"); !f.Warning || !strings.Contains(f.Value, tc.says) || strings.Contains(f.Value, tc.not) {
				t.Errorf("%+v, want %q", f, tc.says)
			}
			lacks := fact(e.info.Facts, "lacks")
			for _, function := range blind {
				if lacks.Warning || strings.Contains(lacks.Value, function) != (tc.options.Without != nil) {
					t.Errorf("lacks: %+v", lacks)
				}
			}
		})
	}
}

// A partition that can never take part is told from one that has to be changed.
func TestAKeyExportPartitionSaysWhetherItCanClone(t *testing.T) {
	for _, tc := range []struct {
		name         string
		capabilities map[int]int
		says         string
	}{
		{"it can", nil, "capabilities allow it for 0 and 4"},
		{"it cannot", map[int]int{0: 0, 4: 0}, "capabilities forbid it for 0 and 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := lunasim.New(t, lunasim.Options{Kind: "export", Capabilities: tc.capabilities})
			_, err := process(t, nil).Open(t.Context(), pluginproto.OpenRequest{Settings: p.Settings(), PIN: []byte(p.PIN), Domain: newDomain()})
			e, ok := errors.AsType[*pluginproto.Error](err)
			if !ok || !e.Permanent || !strings.Contains(e.Msg, "key-export") || !strings.Contains(e.Msg, tc.says) {
				t.Errorf("%v (%+v)", err, e)
			}
		})
	}
}

// FIPS mode is the HSM's, or from firmware 7.7.1 on one partition's.
func TestFIPSModeIsTheHSMsOrThePartitions(t *testing.T) {
	for _, tc := range []struct {
		name           string
		policies, hsm  policies
		value          string
		mode, lookedAt bool
	}{
		{"neither is told", nil, nil, "", false, false},
		{"the HSM's", nil, policies{hsmNonFIPS: 0}, "on", true, true},
		{"not the HSM's, of older firmware", nil, policies{hsmNonFIPS: 1}, "off", false, true},
		{"the partition's", policies{policyNonFIPS: 0}, policies{hsmNonFIPS: 1}, "on, by policy 43 of the partition", true, true},
		{"the partition's, where the HSM's is not told", policies{policyNonFIPS: 0}, nil, "on, by policy 43 of the partition", true, true},
		{"both", policies{policyNonFIPS: 0}, policies{hsmNonFIPS: 0}, "on", true, true},
		{"neither's", policies{policyNonFIPS: 1}, policies{hsmNonFIPS: 1}, "off", false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := partition{policies: tc.policies, hsm: tc.hsm}
			if on, known := p.fips(); on != tc.mode || known != tc.lookedAt {
				t.Errorf("on %v, known %v", on, known)
			}
			if f := fact(p.facts(offer{}), "FIPS mode"); f.Value != tc.value || f.Warning {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Policies are asked for with the facts. What a change makes of the partition is told, and
// where the group goes by what it was told at the connect, a new driver has to tell it anew.
func TestPoliciesThatChange(t *testing.T) {
	for _, tc := range []struct {
		name    string
		options lunasim.Options
		set     map[string]string
		changed string // of the error; "" means that the driver goes on
		fact    string // of the driver that goes on, or of the next one
		value   string
		warning bool
	}{
		{"CPv1 is forced", lunasim.Options{}, map[string]string{"policy.42": "1"},
			"policy 42 of the partition was 0 and is 1;", "cloning", "cpv1-7.7, cpv1 (from older firmware)", false},
		{"CPv1 is forced no more", lunasim.Options{Policies: map[int]int{42: 1}}, map[string]string{"policy.42": "0"},
			"policy 42 of the partition was 1 and is 0;", "cloning", "cpv4, cpv3", false},
		{"the HSM is in FIPS mode", lunasim.Options{}, map[string]string{"hsm.12": "0"}, "policy 12 of the HSM was 1 and is 0;", "FIPS mode", "on", false},
		{"the partition is in FIPS mode", lunasim.Options{}, map[string]string{"policy.43": "0"}, "policy 43 of the partition was 1 and is 0;",
			"GCM IV", "the token's own", false},
		{"the HSM stops cloning", lunasim.Options{}, map[string]string{"hsm.7": "0"}, "policy 7 of the HSM was 1 and is 0;", "cloning", "none: policy 7", true},
		{"no key is cloned any more", lunasim.Options{}, map[string]string{"policy.0": "0", "policy.4": "0"},
			"policy 0 of the partition was 1 and is 0, policy 4 of the partition was 1 and is 0;", "cloning", "none: policies 0 and 4", true},
		{"secret keys are not cloned any more", lunasim.Options{}, map[string]string{"policy.4": "0"}, "", "cloning", "policy 4 is off", true},
		{"secret keys are cloned again", lunasim.Options{Policies: map[int]int{4: 0}}, map[string]string{"policy.4": "1"}, "", "cloning", "cpv4", false},
		{"activation will end with a restart", lunasim.Options{}, map[string]string{"policy.23": "0"}, "", "activation", "(policy 23) is off", true},
		{"a policy of no concern", lunasim.Options{}, map[string]string{"policy.21": "0"}, "", "cloning", "cpv4", false},
		{"a policy is not told any more", lunasim.Options{}, map[string]string{"policy.42": "unknown"}, "", "cloning", "cpv4", false},
		{"a policy is told that was not", lunasim.Options{Firmware: "7.7.0"}, map[string]string{"policy.43": "0"}, "", "cloning", "cpv3", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			domain := newDomain()
			d := openDriver(t, lunasim.New(t, tc.options), domain, nil)
			if _, err := d.Facts(t.Context()); err != nil {
				t.Fatal(err)
			}
			for name, value := range tc.set {
				d.p.Set(name, value)
			}
			if tc.changed != "" {
				_, err := d.Facts(t.Context())
				e, ok := errors.AsType[*pluginproto.Error](err)
				if !ok || e.Class != pluginproto.ClassMember || e.Permanent || !strings.Contains(e.Msg, tc.changed) {
					t.Fatalf("%v (%+v)", err, e)
				}
				d = openDriver(t, d.p, domain, nil)
			}
			for range 2 { // a change is told once
				facts, err := d.Facts(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if f := fact(facts, tc.fact); !strings.Contains(f.Value, tc.value) || f.Warning != tc.warning {
					t.Errorf("%+v, want %q, %v", f, tc.value, tc.warning)
				}
			}
		})
	}
}

// Policies that cannot be read this time are what they were, whatever the reason, and those of
// a library that goes on to tell what it has read first change with the next driver.
func TestPoliciesThatAreNotToldChangeNothing(t *testing.T) {
	domain := newDomain()
	d := openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil)
	goesOn := func(when string) {
		t.Helper()
		if facts, err := d.Facts(t.Context()); err != nil || !strings.HasPrefix(fact(facts, "cloning").Value, "cpv4") {
			t.Errorf("%s: %+v, %v", when, facts, err)
		}
	}
	for _, function := range []string{"CA_GetTokenPolicies", "CA_GetHSMPolicySet"} {
		for _, ckr := range []uint{ckrUserNotAuthorized, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_GENERAL_ERROR, own + 0x24} {
			f := d.p.Arm(lunasim.Fault{What: lunasim.Answer, Function: function, Arg: uint32(ckr)})
			goesOn(function)
			if f.Disarm(); f.Fired() != 1 {
				t.Errorf("%s was asked %d times", function, f.Fired())
			}
		}
	}
	d.p.Set("policies_kept", "yes")
	d.p.Set("policy.42", "1")
	goesOn("a library that tells what it has read first")
	for _, function := range []string{"CA_GetTokenCapabilities", "CA_GetHSMCapabilitySet"} { // which are good advice, and no more
		defer d.p.Arm(lunasim.Fault{What: lunasim.Answer, Function: function, Times: lunasim.Forever, Arg: pkcs11.CKR_DEVICE_ERROR}).Disarm()
	}
	next := openDriver(t, d.p, domain, nil)
	if f := fact(next.info.Facts, "cloning"); !strings.HasPrefix(f.Value, "cpv1-7.7") {
		t.Errorf("the next driver: %+v", f)
	}
}
