package luna_test

import (
	"slices"
	"strings"
	"testing"

	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// The procedure of docs/luna.md, "Mixed firmware and rolling upgrades", from end to end, and
// at every step the group works: from firmware before 7.7.0 to one that has CPv4.
func TestRollingUpgrade(t *testing.T) {
	old := lunasim.Options{Firmware: "7.4.2"}
	s := start(t, old, old, old)
	s.create("before", "")
	for _, name := range []string{"hsm-c", "hsm-b"} {
		s.upgrade(name)
		s.create("while-"+name, "")
		s.awaitWhole()
	}
	if out, _, _ := s.cli("group", "check"); !strings.Contains(out, "no member can give it keys") {
		t.Errorf("group check says nothing of the primary:\n%s", out)
	}
	s.upgrade("hsm-a")
	s.awaitWhole()
	s.wantProtocol("cpv1-7.7")
	s.create("by-cpv1", "rsa-2048")

	for _, m := range s.members {
		m.partition.Set("policy.42", "0")
	}
	if err := s.server.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.serve()
	s.awaitWhole()
	if out, _, code := s.cli("group", "sync"); code != 0 {
		t.Errorf("group sync ends with %d:\n%s", code, out)
	}
	if out, _, code := s.cli("group", "check"); code != 0 || !strings.Contains(out, "every member fits") {
		t.Errorf("group check ends with %d:\n%s", code, out)
	}
	s.wantProtocol("cpv4")
	s.create("by-cpv4", "")
	s.works("before")
	s.sameKeys(5)
}

// upgrade gives a member another firmware as an operator does. The update ends its sessions.
func (s *site) upgrade(name string) {
	s.t.Helper()
	if _, errs, code := s.cli("member", "drain", name); code != 0 {
		s.t.Fatalf("draining %s: %d\n%s", name, code, errs)
	}
	p := s.members[slices.IndexFunc(s.members, func(m member) bool { return m.name == name })].partition
	p.Set("firmware", "7.8.4")
	p.Set("policy.42", "1")
	p.PowerCycle()
	s.await(name, "without its driver", func(m api.Member) bool { return strings.Contains(m.Reason, "its firmware is 7.8.4 where it was 7.4.2") })
	if _, errs, code := s.cli("member", "active", name); code != 0 {
		s.t.Fatalf("taking %s back: %d\n%s", name, code, errs)
	}
	if m := s.now(name); m.State != api.MemberActive || m.Token.Firmware != "7.8.4" {
		s.t.Errorf("%s is %s, with firmware %s", name, m.State, m.Token.Firmware)
	}
}

// wantProtocol checks by which protocol every member would be given keys.
func (s *site) wantProtocol(name string) {
	s.t.Helper()
	for _, m := range s.members {
		for _, f := range s.now(m.name).Token.Facts {
			if f.Name == "cloning" && !strings.HasPrefix(f.Value, name+",") {
				s.t.Errorf("%s clones by %s, want %s first", m.name, f.Value, name)
			}
		}
	}
}
