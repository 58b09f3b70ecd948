package luna_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/plugins/luna/lunasim"
)

// What a check finds before anything is served: no fault, but what will be one.
func TestCheckTellsWhatAPartitionWarnsOf(t *testing.T) {
	s := newSite(t)
	s.members = []member{
		on("hsm-a", lunasim.New(t, lunasim.Options{})),
		on("hsm-b", lunasim.New(t, lunasim.Options{Policies: map[int]int{23: 0}})),
	}
	s.write()
	out, errs, code := s.cli("check", "-c", filepath.Join(s.dir, "kmsd.yaml"))
	if code != 0 || !strings.Contains(out, "has no faults") {
		t.Errorf("code %d:\n%s%s", code, out, errs)
	}
	if want := "hsm-b warns: activation: activated, but auto-activation (policy 23) is off"; strings.Count(errs, "\n") != 1 || !strings.Contains(errs, want) {
		t.Errorf("stderr says %q, want %q", errs, want)
	}
}

// A group that is new clones a canary key before it has any other, so a partition of another
// domain is found at the start and not when somebody needs a key.
func TestAnotherDomainIsFoundBeforeTheFirstKey(t *testing.T) {
	s := newSite(t)
	s.members = []member{on("hsm-a", lunasim.New(t, lunasim.Options{})), on("hsm-b", lunasim.New(t, lunasim.Options{Domain: "blue"}))}
	s.serve()
	bad := ""
	s.poll(func() error {
		for _, name := range []string{"hsm-a", "hsm-b"} { // whichever comes second
			if m := s.now(name); failed(m) && strings.Contains(m.Reason, "no cloning domain in common") {
				bad = name
				return nil
			}
		}
		return fmt.Errorf("nobody has failed: %+v, %+v", s.now("hsm-a"), s.now("hsm-b"))
	})
	out, _, code := s.cli("group", "check")
	for _, want := range []string{bad, "no cloning domain in common"} {
		if code != 1 || !strings.Contains(flat(out), want) {
			t.Errorf("code %d without %q:\n%s", code, want, out)
		}
	}
}
