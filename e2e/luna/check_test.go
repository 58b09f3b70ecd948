package luna_test

import (
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

// A group without keys clones nothing when it starts, so a partition of another domain serves
// there. It is found before the first key, by whoever asks.
func TestGroupCheckFindsAnotherDomainBeforeTheFirstKey(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{Domain: "blue"})
	out, _, code := s.cli("group", "check")
	for _, want := range []string{"could not supply a key to member hsm-b", "no cloning domain in common"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("code %d without %q:\n%s", code, want, out)
		}
	}
}
