package chaos_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"kmsd/e2e/chaos"
)

func TestThePlanFollowsFromItsSeed(t *testing.T) {
	plan := func(seed uint64, members int) string {
		p, err := chaos.New(chaos.SoftHSM, seed, 300, members)
		if err != nil {
			t.Fatal(err)
		}
		return p.String()
	}
	if first, second := plan(7, 3), plan(7, 3); first != second {
		t.Error("one seed has two plans")
	}
	if plan(7, 3) == plan(8, 3) || plan(7, 3) == plan(7, 4) {
		t.Error("two seeds, or two groups, have the same plan")
	}
	// A replay is worth nothing if a plan changes with the code: this is the first step
	// of seed 1, to be changed with the plans only.
	if got, want := strings.Split(plan(1, 3), "\n")[1], "   1  token-removed     member 1  hold 654ms  pause 154ms  choice 227046"; got != want {
		t.Errorf("seed 1 begins with %q, want %q", got, want)
	}
}

func TestAPlanHasEveryKindAndOnlyOneLosesAll(t *testing.T) {
	for _, driver := range []chaos.Driver{chaos.SoftHSM, chaos.Luna} {
		kinds := chaos.Kinds(driver)
		p, err := chaos.New(driver, fixedSeed, len(kinds), 3)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range p.Steps {
			if n := len(s.Hurts(3)); n > 2 && s.Kind != chaos.LoseAll {
				t.Errorf("%v hurts %d of 3 members", s, n)
			}
			if i := slices.Index(kinds, s.Kind); i >= 0 {
				kinds = slices.Delete(kinds, i, i+1)
			}
		}
		if len(kinds) > 0 {
			t.Errorf("the plan for %s is without %v", driver, kinds)
		}
	}
}

func TestAPlanCanBeOfSomeKindsOnly(t *testing.T) {
	p, err := chaos.New(chaos.SoftHSM, 3, 20, 3, chaos.KillDriver, chaos.Drain)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range p.Steps {
		if s.Kind != chaos.KillDriver && s.Kind != chaos.Drain {
			t.Errorf("the plan has %v", s)
		}
	}
	for _, bad := range []chaos.Kind{"bad-luck", chaos.Tampered} {
		if _, err := chaos.New(chaos.SoftHSM, 3, 20, 3, bad); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", bad)) {
			t.Errorf("got %v, want an error that names the kind %s", err, bad)
		}
	}
	if _, err := chaos.New("abacus", 3, 20, 3); err == nil || !strings.Contains(err.Error(), `"abacus"`) {
		t.Errorf("got %v, want an error that names the driver", err)
	}
}

func TestAPlanNeedsTwoMembers(t *testing.T) {
	if _, err := chaos.New(chaos.SoftHSM, 1, 10, 1); err == nil || !strings.Contains(err.Error(), "at least 2") {
		t.Errorf("got %v", err)
	}
}

func TestEveryKindCanBeCarriedOut(t *testing.T) {
	for _, k := range chaos.Kinds(chaos.Luna) { // which has all
		if carry[k] == nil {
			t.Errorf("nothing carries out %s", k)
		}
	}
}

func TestOneMemberIsLeftWholeUnlessAllAreToBeLost(t *testing.T) {
	q := newTriage(3)
	take := func(want bool, them ...int) {
		t.Helper()
		if _, ok := q.tryTake(them); ok != want {
			t.Errorf("taking %v: %v, want %v", them, ok, want)
		}
	}
	take(true, 0)
	take(false, 0)    // nobody is hurt twice
	take(false, 1, 2) // nobody would be left
	take(true)        // hurts nobody
	take(true, 1)
	take(false, 2) // the last one
	q.giveBack([]int{0})
	take(true, 2)
	take(false, 0)
	take(false, 0, 1, 2) // all, when somebody is hurt
	q.giveBack([]int{1})
	q.giveBack([]int{2})
	take(true, 0, 1, 2) // all, on purpose
	take(false, 1)
	q.giveBack([]int{0, 1, 2})
	take(true, 0, 2)
}
