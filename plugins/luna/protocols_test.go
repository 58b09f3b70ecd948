package main

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
	"kmsd/plugins/luna/lunasim"
)

// everything is a library that has all functions.
func everything(...vendor.Function) []vendor.Function { return nil }

// without is a library that lacks some.
func without(gone ...vendor.Function) func(...vendor.Function) []vendor.Function {
	return func(need ...vendor.Function) []vendor.Function {
		return slices.DeleteFunc(slices.Clone(need), func(f vendor.Function) bool { return !slices.Contains(gone, f) })
	}
}

func TestOffers(t *testing.T) {
	clones := policies{policyPrivateCloning: 1, policySecretCloning: 1}
	with := func(more policies) policies {
		all := policies{policyPrivateCloning: 1, policySecretCloning: 1}
		for id, v := range more {
			all[id] = v
		}
		return all
	}
	for _, tc := range []struct {
		name    string
		part    partition
		missing func(...vendor.Function) []vendor.Function
		gives   string
		takes   string
		fact    string // of the fact "cloning"
		warning bool
		lacks   string // of the fact "lacks"
	}{
		{"firmware 5", partition{firmware: version3{5, 4, 1}, policies: clones}, everything, "cpv1", "cpv1", "cpv1", false, ""},
		{"firmware 7.6", partition{firmware: version3{7, 6, 9}, policies: clones}, everything, "cpv1", "cpv1", "cpv1", false, ""},
		{"firmware 7.7 that clones by CPv3", partition{firmware: version3{7, 7, 0}, policies: with(policies{policyCPv1: 0})}, everything,
			"cpv3", "cpv3 cpv1", "cpv3, cpv1 (from older firmware)", false, ""},
		{"firmware 7.8", partition{firmware: version3{7, 8, 0}, policies: with(policies{policyCPv1: 0})}, everything,
			"cpv4 cpv3", "cpv4 cpv3 cpv1", "cpv4, cpv3, cpv1 (from older firmware)", false, ""},
		{"firmware 8", partition{firmware: version3{8, 0, 0}, policies: with(policies{policyCPv1: 0})}, everything,
			"cpv4 cpv3", "cpv4 cpv3 cpv1", "cpv4, cpv3", false, ""},
		{"firmware 7.8 held to CPv1", partition{firmware: version3{7, 8, 0}, policies: with(policies{policyCPv1: 1})}, everything,
			"cpv1-7.7", "cpv1-7.7 cpv1", "cpv1-7.7, cpv1 (from older firmware)", false, ""},
		{"firmware 7.8 that shows no policies", partition{firmware: version3{7, 8, 0}}, everything,
			"cpv4 cpv3 cpv1-7.7", "cpv4 cpv3 cpv1-7.7 cpv1", "cpv4, cpv3", false, ""},
		{"SIM", partition{firmware: version3{7, 8, 0}, policies: policies{0: 0, 4: 0, policySecretMask: 1}}, everything, "sim", "sim", "sim", false, ""},
		{"SIM that clones too", partition{firmware: version3{7, 4, 0}, policies: with(policies{policyPrivateMask: 1})}, everything, "cpv1 sim", "cpv1 sim", "cpv1, sim", false, ""},
		{"private keys stay", partition{firmware: version3{7, 4, 0}, policies: policies{0: 0, 4: 1}}, everything, "cpv1", "cpv1", "private keys stay where they are: policy 0 is off", true, ""},
		{"secret keys stay", partition{firmware: version3{7, 4, 0}, policies: policies{0: 1, 4: 0}}, everything, "cpv1", "cpv1", "secret keys stay where they are: policy 4 is off", true, ""},
		{"nothing clones", partition{firmware: version3{7, 8, 0}, policies: policies{0: 0, 4: 0}}, everything, "", "", "none: policies 0 and 4 of the partition", true, ""},
		{"the HSM forbids cloning", partition{firmware: version3{7, 8, 0}, policies: clones, hsm: policies{hsmCloning: 0}}, everything, "", "", "none: policy 7 of the HSM", true, ""},
		{"the HSM forbids replication", partition{firmware: version3{7, 8, 0}, policies: clones, hsm: policies{hsmReplication: 0}}, everything, "", "", "none: policy 16 of the HSM", true, ""},
		{"a client without CPv4", partition{firmware: version3{7, 8, 0}, policies: with(policies{policyCPv1: 0})}, without(vendor.Extract, vendor.Insert),
			"cpv3", "cpv3 cpv1", "cpv3", false, "cpv4 (CA_Extract, CA_Insert)"},
		{"a client without CPv3", partition{firmware: version3{7, 7, 0}, policies: with(policies{policyCPv1: 0})}, without(vendor.CloneAsSourceInit),
			"", "cpv1", "cpv1 (from older firmware)", false, "cpv3 (CA_CloneAsSourceInit)"},
		{"a client without anything", partition{firmware: version3{7, 4, 0}, policies: clones}, without(vendor.CloneAsSource),
			"", "", "none: the client library has no function for it", true, "cpv1 (CA_CloneAsSource)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := tc.part.offers(tc.missing)
			gives := names(o.protocols, func(p pluginproto.CloneProtocol) bool { return p.Gives })
			takes := names(o.protocols, func(p pluginproto.CloneProtocol) bool { return p.Takes })
			if gives != tc.gives || takes != tc.takes {
				t.Errorf("gives %q, takes %q; want %q, %q", gives, takes, tc.gives, tc.takes)
			}
			facts := tc.part.facts(o)
			if f := fact(facts, "cloning"); !strings.Contains(f.Value, tc.fact) || f.Warning != tc.warning {
				t.Errorf("cloning: %+v", f)
			}
			if f := fact(facts, "lacks"); !strings.HasSuffix(f.Value, tc.lacks) || f.Warning != (tc.lacks != "" && tc.takes == "") {
				t.Errorf("lacks: %+v, want %q", f, tc.lacks)
			}
		})
	}
}

func names(all []pluginproto.CloneProtocol, may func(pluginproto.CloneProtocol) bool) string {
	var out []string
	for _, p := range all {
		if may(p) {
			out = append(out, p.Name)
		}
	}
	return strings.Join(out, " ")
}

func fact(all []pluginproto.Fact, name string) pluginproto.Fact {
	for _, f := range all {
		if f.Name == name {
			return f
		}
	}
	return pluginproto.Fact{}
}

// Every pair of firmware: the protocol that the core would take, and that the HSMs are content
// with it, or refuse whatever is tried.
func TestEveryPairOfFirmware(t *testing.T) {
	held := map[int]int{policyCPv1: 1}
	kinds := []struct {
		name    string
		options lunasim.Options
	}{
		{"6.2.1", lunasim.Options{Firmware: "6.2.1"}},
		{"7.4.0", lunasim.Options{Firmware: "7.4.0"}},
		{"7.7.1", lunasim.Options{Firmware: "7.7.1"}},
		{"7.7.1 held to CPv1", lunasim.Options{Firmware: "7.7.1", Policies: held}},
		{"7.8.0", lunasim.Options{Firmware: "7.8.0"}},
		{"7.8.0 held to CPv1", lunasim.Options{Firmware: "7.8.0", Policies: held}},
		{"SIM", lunasim.Options{Kind: "sim"}},
	}
	// The row gives, the column takes. "!" is one that the HSM refuses with a word on policy
	// 42, "-" is that they have none in common.
	want := []string{
		"cpv1  cpv1  cpv1!     cpv1      cpv1!     cpv1      -",
		"cpv1  cpv1  cpv1!     cpv1      cpv1!     cpv1      -",
		"-     -     cpv3      -         cpv3      -         -",
		"-     -     -         cpv1-7.7  -         cpv1-7.7  -",
		"-     -     cpv3      -         cpv4      -         -",
		"-     -     -         cpv1-7.7  -         cpv1-7.7  -",
		"-     -     -         -         -         -         sim",
	}
	givers, takers := make([]*end, len(kinds)), make([]*end, len(kinds))
	for i, kind := range kinds {
		givers[i], takers[i] = openEnd(t, kind.options), openEnd(t, kind.options)
	}
	for i, from := range givers {
		key := from.aes(t, kinds[i].name)
		for k, to := range takers {
			t.Run(kinds[i].name+" to "+kinds[k].name, func(t *testing.T) {
				cell, refused := strings.CutSuffix(strings.Fields(want[i])[k], "!")
				way, ok := pluginproto.CommonProtocol(from.info.Cloning, to.info.Cloning)
				switch {
				case !ok && cell == "-":
					refusesAll(t, from, to, key)
				case way.Name != cell:
					t.Errorf("%q is taken, want %q", way.Name, cell)
				case refused:
					received, err := (&transfer{protocol: way.Name}).run(t, from, to, key)
					if err := firstError(received, err); ckrOf(err) != own+0x111 || !strings.Contains(codes[own+0x111].Hint, "policy 42") {
						t.Errorf("refused with %v", err)
					}
				default:
					received, err := (&transfer{protocol: way.Name}).run(t, from, to, key)
					arrives(t, to, received, err, kinds[i].name)
				}
			})
		}
	}
}

// refusesAll tries every protocol on a pair that has none in common.
func refusesAll(t *testing.T, from, to *end, key pkcs11.ObjectHandle) {
	t.Helper()
	before := len(to.find(t, ""))
	for _, protocol := range []string{cpv1, cpv1New, cpv3, cpv4, sim} {
		received, err := (&transfer{protocol: protocol}).run(t, from, to, key)
		if firstError(received, err) == nil {
			t.Errorf("%s goes", protocol)
		}
	}
	if now := len(to.find(t, "")); now != before {
		t.Errorf("%d keys on the partition, before %d", now, before)
	}
}

func TestOtherProtocolsAreUnknown(t *testing.T) {
	x := &extension{}
	_, sourceErr := x.Source("cpv2", p11.Place{}, 1)
	_, targetErr := x.Target("cpv2", p11.Place{}, 1)
	for _, err := range []error{sourceErr, targetErr} {
		if e, ok := errors.AsType[*pluginproto.Error](err); !ok || e.Class != pluginproto.ClassCaller || !strings.Contains(e.Msg, cpv1New) {
			t.Errorf("%v", err)
		}
	}
}
