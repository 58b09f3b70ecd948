package group

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

var update = flag.Bool("update", false, "write the table of states to testdata/states.txt")

var allStates = []api.MemberState{
	api.MemberActive, api.MemberStandby, api.MemberProbing, api.MemberSyncing, api.MemberDraining, api.MemberDown, api.MemberFailed,
}

var allHappenings = []happening{
	reached, opened, admitted, onStand, silent, answered, lost, missed, refused,
	madeStandby, madeActive, drained, parked, resumed,
}

// grid is a group of one member that no clock and no goroutine moves.
func grid(t *testing.T) (*Group, *member) {
	g, err := New(Config{Members: []MemberConfig{{Name: "a", Connect: connectNever}}})
	if err != nil {
		t.Fatal(err)
	}
	return g, g.members[0]
}

func TestTheTableOfStatesIsTheOneInTestdata(t *testing.T) {
	var lines []string
	for s, c := range transitions {
		lines = append(lines, fmt.Sprintf("%-10s %-18s %-10s %s\n", s.from, strings.ReplaceAll(string(s.what), " ", "_"), c.to, strings.ReplaceAll(string(c.ckr), " ", "_")))
	}
	slices.Sort(lines)
	got := fmt.Sprintf("%-10s %-18s %-10s %s\n", "from", "what", "to", "ckr") + strings.Join(lines, "")
	const file = "testdata/states.txt"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the table is\n%s\nwant\n%s", got, want)
	}
}

func TestOnlyWhatIsInTheTableMovesAMember(t *testing.T) {
	for _, from := range allStates {
		for _, what := range allHappenings {
			g, m := grid(t)
			m.state = from
			g.moveLocked(m, what, errors.New("news"))
			next, moves := transitions[situation{from, what}]
			want := next.to
			if !moves {
				want = from
			}
			if m.state != want {
				t.Errorf("%s, %s: now %s, want %s", from, what, m.state, want)
			}
			if told := len(g.events) > 0; told != moves {
				t.Errorf("%s, %s: told %v, want %v", from, what, told, moves)
			}
		}
	}
}

func TestAMemberEntersTheGroupOnlyThroughSyncing(t *testing.T) {
	serves := func(s api.MemberState) bool { return s == api.MemberActive || s == api.MemberStandby }
	for s, next := range transitions {
		if serves(next.to) && s.from != api.MemberSyncing && !serves(s.from) {
			t.Errorf("%s, %s leads to %s", s.from, s.what, next.to)
		}
		if next.to == api.MemberSyncing && s.what != opened && s.what != answered && s.what != resumed {
			t.Errorf("%s, %s leads to %s", s.from, s.what, next.to)
		}
	}
}

// A walk knows nothing of the table: it follows Luna's rules for what status shows.
func TestWhatStatusShowsFollowsLunaOnAnyWalk(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		g, m := grid(t)
		m.ckr, m.reason = pluginproto.CKROK, ""
		m.state = api.MemberActive
		var walk []happening
		model := lunaModel{ckr: pluginproto.CKROK, serves: true}
		for range 60 {
			possible := slices.DeleteFunc(slices.Clone(allHappenings), func(h happening) bool {
				_, ok := transitions[situation{m.state, h}]
				return !ok
			})
			what := possible[r.IntN(len(possible))]
			var cause error
			if slices.Contains([]happening{silent, lost, missed, refused}, what) {
				cause = &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINLocked, Op: fmt.Sprint("step ", len(walk)), Permanent: what == refused}
			}
			walk = append(walk, what)
			was := m.state
			g.moveLocked(m, what, cause)
			model.step(was, what)
			if m.ckr != model.ckr {
				t.Fatalf("seed %d: after %v status shows %s, want %s", seed, walk, pluginproto.CKRName(m.ckr), pluginproto.CKRName(model.ckr))
			}
			if serves := m.state == api.MemberActive || m.state == api.MemberStandby; serves != model.serves || (serves && m.reason != "") {
				t.Fatalf("seed %d: after %v the member is %s, %q", seed, walk, m.state, m.reason)
			}
			if (m.state == api.MemberFailed) != g.events[len(g.events)-1].Alarm && g.events[len(g.events)-1].Type == api.EventMember {
				t.Fatalf("seed %d: after %v the alarm is wrong", seed, walk)
			}
		}
	}
}

// lunaModel says in prose what the table says in rows.
type lunaModel struct {
	ckr    uint
	serves bool // commands go to it
}

func (l *lunaModel) step(was api.MemberState, what happening) {
	switch what {
	case admitted, onStand:
		*l = lunaModel{ckr: pluginproto.CKROK, serves: true}
	case silent, lost: // the first report, unless it is being brought back
		if l.serves || what == lost {
			l.ckr = pluginproto.CKRDeviceError
		}
		if was == api.MemberDraining { // nobody will try, so there is no second one
			l.ckr = pluginproto.CKRTokenNotPresent
		}
		l.serves = false
	case reached, missed, parked:
		l.ckr, l.serves = pluginproto.CKRTokenNotPresent, false
	case opened:
		if was == api.MemberFailed {
			l.ckr = pluginproto.CKRTokenNotPresent
		}
	case refused:
		l.ckr, l.serves = pluginproto.CKRPINLocked, false
	case drained:
		l.serves = false
	}
}

func TestALastingFailureShowsWhatTheLibrarySaid(t *testing.T) {
	for _, c := range []struct {
		name   string
		before uint
		cause  error
		want   uint
	}{
		{"the library named it", pluginproto.CKROK, &pluginproto.Error{CKR: pluginproto.CKRPINIncorrect}, pluginproto.CKRPINIncorrect},
		{"nobody named it, and it was well", pluginproto.CKROK, errors.New("another domain"), pluginproto.CKRDeviceError},
		{"nobody named it, and it was away", pluginproto.CKRTokenNotPresent, errors.New("another domain"), pluginproto.CKRTokenNotPresent},
	} {
		if got := ckrAfter(itsOwn, c.before, c.cause); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, pluginproto.CKRName(got), pluginproto.CKRName(c.want))
		}
	}
}

func TestGroupState(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []api.MemberState
		want    api.GroupState
	}{
		{"all serve", []api.MemberState{"active", "active", "active"}, api.GroupNormal},
		{"one serves and one stands by", []api.MemberState{"active", "standby"}, api.GroupNormal},
		{"the only member serves", []api.MemberState{"active"}, api.GroupNormal},
		{"one of three is away", []api.MemberState{"active", "down", "active"}, api.GroupDegraded},
		{"one of three is drained", []api.MemberState{"active", "draining", "active"}, api.GroupDegraded},
		{"the standby is away", []api.MemberState{"active", "active", "failed"}, api.GroupDegraded},
		{"one of three is left", []api.MemberState{"active", "down", "probing"}, api.GroupSole},
		{"one is left beside a standby and one that is away", []api.MemberState{"active", "standby", "down"}, api.GroupSole},
		{"only standbys are left", []api.MemberState{"down", "standby", "standby"}, api.GroupStandbyServing},
		{"everybody is away", []api.MemberState{"syncing", "failed"}, api.GroupLost},
		{"the only member is drained", []api.MemberState{"draining"}, api.GroupLost},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &Group{}
			for _, s := range c.members {
				g.members = append(g.members, &member{state: s})
			}
			if got := g.stateLocked(); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			g.members = append(g.members, &member{state: api.MemberProbing, joining: true})
			if got := g.stateLocked(); got != c.want {
				t.Errorf("with a member that has not joined yet: got %s, want %s", got, c.want)
			}
		})
	}
}

func TestTheLossOfAllMembersIsAnAlarm(t *testing.T) {
	g, m := grid(t)
	m.state, g.state = api.MemberActive, api.GroupNormal
	g.moveLocked(m, lost, errors.New("no power"))
	i := slices.IndexFunc(g.events, func(e api.Event) bool { return e.Type == api.EventGroup })
	if i < 0 || !g.events[i].Alarm || g.events[i].To != string(api.GroupLost) || g.events[i].CKR != "CKR_DEVICE_ERROR" {
		t.Errorf("told %+v", g.events)
	}
}
