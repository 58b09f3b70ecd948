package luna_test

import (
	"os"
	"strings"
	"testing"

	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// What does not fit the group is refused when an operator adds it, with one error that says
// what to do, and the group goes on.
func TestWhatDoesNotFitIsRefusedAtJoin(t *testing.T) {
	s, place := withPlace(t, lunasim.Options{}, lunasim.Options{})
	s.create("shop", "")
	tests := []struct {
		name      string
		partition lunasim.Options
		says      []string
	}{
		{"another cloning domain", lunasim.Options{Domain: "blue"}, []string{"domain"}},
		{"another cloning domain, by CPv3", lunasim.Options{Domain: "blue", Firmware: "7.7.1"}, []string{"domain"}},
		{"a clock that is not set", lunasim.Options{Switches: map[string]string{"clock": "no"}}, []string{"clock"}},
		{"secret keys that are not cloned", lunasim.Options{Policies: map[int]int{4: 0}}, []string{"policy 4"}},
		{"an HSM that does not clone", lunasim.Options{HSMPolicies: map[int]int{7: 0}}, []string{"policy 7"}},
		{"an HSM that is not replicated", lunasim.Options{HSMPolicies: map[int]int{16: 0}}, []string{"policy 16"}},
		{"keys that leave wrapped", lunasim.Options{Kind: "export"}, []string{"key-export"}},
		{"keys that leave masked", lunasim.Options{Kind: "sim"}, []string{"cpv4", "hsm-c takes them by sim"}},
		{"firmware that newer ones do not give to", lunasim.Options{Firmware: "7.4.0"}, []string{"no member can give it keys", "cpv1"}},
		{"a client library without cloning", lunasim.Options{Without: []string{
			"CA_Extract", "CA_CloneAsSourceInit", "CA_GetTokenCertificates",
		}}, []string{"CA_Extract", "CA_CloneAsSourceInit", "CA_GetTokenCertificates"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			place.put(t, lunasim.New(t, tt.partition))
			refused(t, s, place.member, tt.says...)
		})
	}
	if out, _, code := s.cli("group", "check"); code != 0 {
		t.Errorf("after all refusals group check ends with %d:\n%s", code, out)
	}
	s.works("shop")
	s.create("after", "")
	s.sameKeys(2)
}

// place is where a client of Luna HSMs is configured, which an operator may add a member of:
// kmsd.yaml has one there, which was taken out of the group.
type place struct{ member }

// withPlace starts a kmsd with such a place beside the members.
func withPlace(t *testing.T, partitions ...lunasim.Options) (*site, *place) {
	t.Helper()
	s := start(t, append(partitions, partitions[0])...)
	last := len(s.members) - 1
	p := &place{s.members[last]}
	s.members = s.members[:last]
	if err := s.c.RemoveMember(t.Context(), "default", p.name, false); err != nil {
		t.Fatal(err)
	}
	return s, p
}

// put makes another partition the one that is found there.
func (p *place) put(t *testing.T, new *lunasim.Partition) {
	t.Helper()
	for from, to := range map[string]string{new.Module: p.settings["module"], new.Conf: p.settings["chrystoki_conf"]} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		// Not over the old file, which a process may have loaded.
		if err := os.WriteFile(to+".new", b, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(to+".new", to); err != nil {
			t.Fatal(err)
		}
	}
	p.settings["token_label"], p.settings["token_serial"] = new.Label, new.Serial
	p.partition, p.pin = new, new.PIN
}

// refused adds a member, which has to fail with an error that has these texts.
func refused(t *testing.T, s *site, m member, says ...string) {
	t.Helper()
	_, err := s.c.AddMember(t.Context(), "default", s.spec(m))
	e := api.AsError(err)
	if err == nil {
		t.Fatalf("%s has joined", m.name)
	}
	t.Logf("%s, %s: %s", e.Code, e.CKR, e.Message)
	for _, text := range says {
		if !strings.Contains(e.Message+e.Hint, text) {
			t.Errorf("the error does not say %q", text)
		}
	}
	if strings.Contains(e.Message, "\n") {
		t.Error("it is more than one error")
	}
	g, err := s.c.Group(t.Context(), "default")
	if err != nil || len(g.Members) != 2 {
		t.Errorf("the group has %d members, %v", len(g.Members), err)
	}
}

// Members of a group of masking partitions share a masking key.
func TestAnotherMaskingKeyIsRefused(t *testing.T) {
	s, place := withPlace(t, lunasim.Options{Kind: "sim"}, lunasim.Options{Kind: "sim"})
	s.create("shop", "")
	place.put(t, lunasim.New(t, lunasim.Options{Kind: "sim", Switches: map[string]string{"smk": "2"}}))
	refused(t, s, place.member, "masking key")
}

// A newer HSM takes from an older one and gives nothing back, which the group says.
func TestAnUpgradeIsPossibleOneWayAndSaidToBe(t *testing.T) {
	s, place := withPlace(t, lunasim.Options{Firmware: "7.4.0"}, lunasim.Options{Firmware: "7.4.0"})
	s.create("shop", "")
	newer := lunasim.New(t, lunasim.Options{Firmware: "7.8.0"})
	place.put(t, newer)
	refused(t, s, place.member, "policy 42")
	newer.Set("policy.42", "1")
	if _, err := s.c.AddMember(t.Context(), "default", s.spec(place.member)); err != nil {
		t.Fatalf("adding a newer member: %v", err)
	}
	s.members = append(s.members, place.member)
	s.awaitWhole()
	s.sameKeys(1)
	out, _, code := s.cli("group", "check")
	t.Logf("group check ends with %d:\n%s", code, out)
	for _, text := range []string{"cpv1", place.name} {
		if !strings.Contains(out, text) {
			t.Errorf("group check does not say %q", text)
		}
	}
}
