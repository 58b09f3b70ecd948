package luna_test

import (
	"strings"
	"testing"

	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// A policy that is changed while kmsd runs decides how keys go from then on, without a restart.
// Its member is connected anew, once, and another one serves meanwhile.
func TestAChangedPolicyConnectsItsMemberAnewOnce(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{})
	s.create("before", "")
	s.wantProtocol("cpv4")
	drivers := map[string]int{} // :: member → pid
	for _, m := range s.members {
		was := s.now(m.name).DriverPID
		m.partition.Set("policy.42", "1")
		s.cli("group", "check") // asks for the policies at once
		s.works("before")
		now := s.await(m.name, "connected anew", func(m api.Member) bool {
			return whole(m) && m.DriverPID != was && said(m.Token.Facts, "cloning", "cpv1-7.7")
		})
		drivers[m.name] = now.DriverPID
	}
	s.create("after", "")
	s.sameKeys(2)
	for range 2 {
		if out, _, code := s.cli("group", "check"); code != 0 || !strings.Contains(out, "every member fits") {
			t.Errorf("group check ends with %d:\n%s", code, out)
		}
	}
	log, _, _ := s.cli("group", "log")
	if n := strings.Count(flat(log), "active → down CKR_DEVICE_ERROR (looking at the policies again: policy 42 of the partition was 0 and is 1"); n != len(drivers) {
		t.Errorf("%d changes are told:\n%s", n, log)
	}
	for name, pid := range drivers {
		if m := s.now(name); !whole(m) || m.DriverPID != pid {
			t.Errorf("%s is %s, and its driver is %d where it was %d", name, m.State, m.DriverPID, pid)
		}
	}
}
