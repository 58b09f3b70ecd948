package lunasim_test

import (
	"slices"
	"testing"

	"kmsd/plugins/luna/lunasim"
)

// settings returns the values that a function tells, by their numbers.
func (k *token) settings(function string) map[uint]uint {
	k.t.Helper()
	var n, m uint
	wantCode(k.t, function, k.ca.Call(function, firstLunaSlot, []byte(nil), &n, []byte(nil), &m), 0)
	ids, values := make([]byte, 8*n), make([]byte, 8*m)
	wantCode(k.t, function, k.ca.Call(function, firstLunaSlot, ids, &n, values, &m), 0)
	all := map[uint]uint{}
	for i := range int(n) {
		all[word(ids[8*i:])] = word(values[8*i:])
	}
	return all
}

func TestCapabilitiesBoundThePolicies(t *testing.T) {
	for _, c := range []struct {
		name     string
		options  lunasim.Options
		function string
		on, off  []uint
	}{
		{"a partition that clones", lunasim.Options{}, "CA_GetTokenCapabilities", []uint{0, 1, 4, 5, 22, 23, 42, 43}, []uint{3, 7}},
		{"one of older firmware", lunasim.Options{Firmware: "7.6.0"}, "CA_GetTokenCapabilities", []uint{0, 4}, nil},
		{"one that masks", lunasim.Options{Kind: "sim"}, "CA_GetTokenCapabilities", []uint{0, 3, 4, 7}, nil},
		{"one that needs no activation", lunasim.Options{Policies: map[int]int{22: 0, 23: 0}}, "CA_GetTokenCapabilities", nil, []uint{22, 23}},
		{"one that could be activated", lunasim.Options{Policies: map[int]int{23: 0}}, "CA_GetTokenCapabilities", []uint{22, 23}, nil},
		{"one that may not clone", lunasim.Options{Policies: map[int]int{4: 0}, Capabilities: map[int]int{4: 0}}, "CA_GetTokenCapabilities", []uint{0}, []uint{4}},
		{"one whose HSM does not clone", lunasim.Options{HSMPolicies: map[int]int{7: 0}}, "CA_GetTokenCapabilities", nil, []uint{0, 4}},
		{"the policies of that one", lunasim.Options{HSMPolicies: map[int]int{7: 0}}, "CA_GetTokenPolicies", nil, []uint{0, 4}},
		{"an HSM that does not clone and could", lunasim.Options{HSMPolicies: map[int]int{7: 0}}, "CA_GetHSMCapabilitySet", []uint{7, 12, 16}, nil},
		{"an HSM that cannot clone", lunasim.Options{HSMPolicies: map[int]int{7: 0}, HSMCapabilities: map[int]int{7: 0}}, "CA_GetHSMCapabilitySet",
			[]uint{12, 16}, []uint{7}},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := open(t, lunasim.New(t, c.options)).settings(c.function)
			for _, id := range slices.Concat(c.on, c.off) {
				if v, known := all[id]; !known || (v != 0) != slices.Contains(c.on, id) {
					t.Errorf("%d is %d, %v", id, v, known)
				}
			}
			if _, known := all[42]; known != (c.options.Firmware == "" && c.function != "CA_GetHSMCapabilitySet") {
				t.Errorf("42 is known: %v", known)
			}
		})
	}
}

// What a process is told of a policy that changes is not known.
func TestPoliciesAreToldAnewOrAsTheyWere(t *testing.T) {
	k := open(t, lunasim.New(t, lunasim.Options{}))
	k.p.Set("policy.42", "1")
	if v := k.settings("CA_GetTokenPolicies")[42]; v != 1 {
		t.Errorf("told anew: %d", v)
	}
	k.p.Set("policies_kept", "yes")
	if v := k.settings("CA_GetTokenPolicies")[42]; v != 0 {
		t.Errorf("told as it was: %d", v)
	}
	if err := k.Finalize(); err != nil {
		t.Fatal(err)
	}
	if v := open(t, k.p).settings("CA_GetTokenPolicies")[42]; v != 1 {
		t.Errorf("told to one that begins now: %d", v)
	}
}
