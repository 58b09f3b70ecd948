// Package chaos answers: what does kmsd still promise when everything around it
// fails, in any order?
//
// A [Plan] is a list of faults that follows from a seed and from nothing else, so a
// seed that has failed can be tried again. A [History] takes down every request that
// was sent while the faults happened and how it ended. [Check] compares the history,
// and what was found on the tokens and in the catalog at the end, with what kmsd has
// promised. Plan, history and check know nothing of processes; the test of this package
// runs a real kmsd on real tokens with them.
package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Kind is what a fault does.
type Kind string

// Faults of the process of a driver.
const (
	KillDriver   Kind = "kill-driver"       // SIGKILL
	FreezeDriver Kind = "freeze-driver"     // SIGSTOP, and SIGCONT after Hold
	CrashAtStart Kind = "crash-at-start"    // killed, and every new one ends at once, for Hold
	SlowStart    Kind = "slow-start"        // killed, and the new one begins after Hold
	Garbage      Kind = "garbage-handshake" // killed, and every new one says nonsense, for Hold
	WrongVersion Kind = "wrong-version"     // killed, and every new one speaks another protocol, for Hold
	KillOthers   Kind = "kill-all-but-one"  // SIGKILL of every driver but Member's, at once
)

// Faults inside the PKCS#11 library, at Function, after After calls, Times times.
const (
	SessionsClosed Kind = "sessions-closed"
	LoggedOut      Kind = "logged-out"
	DeviceMemory   Kind = "device-memory"
	DeviceError    Kind = "device-error"
	HungCall       Kind = "hung-call" // for Hold, or until the driver is given up
)

// Faults of what is stored.
const (
	TokenRemoved    Kind = "token-removed"     // its folder is away for Hold, or empty, by After
	TokenReplaced   Kind = "token-replaced"    // another token with the same label is in its place, until it is accepted after Hold
	ObjectDeleted   Kind = "object-deleted"    // one key, chosen by After, past the driver
	TokenDiskFull   Kind = "token-disk-full"   // for Hold
	CatalogDiskFull Kind = "catalog-disk-full" // for Hold
)

// Acts of an operator, faults of kmsd, and the loss of all.
const (
	Drain      Kind = "drain"       // and active again after Hold
	Standby    Kind = "standby"     // and active again after Hold
	RemoveAdd  Kind = "remove-add"  // added again after Hold
	Reload     Kind = "reload"      // SIGHUP with the member as a standby in kmsd.yaml, and as it was after Hold
	KillDaemon Kind = "kill-daemon" // SIGKILL of kmsd, which is started again at once

	ReloadRemove Kind = "reload-remove" // SIGHUP without the member in kmsd.yaml, and with it again after Hold
	FreezeDaemon Kind = "freeze-daemon" // SIGSTOP of kmsd, and SIGCONT after Hold
	LoseAll      Kind = "lose-all"      // every driver is killed, and every new one ends at once, for Hold
)

// Faults that only a Luna partition has.
const (
	Deactivated Kind = "deactivated" // nobody is let in for Hold; After chooses what it answers
	PowerCycled Kind = "power-cycled"
	Tampered    Kind = "tampered"    // for good; another partition is in its place after Hold
	SlowKeys    Kind = "slow-keys"   // Function takes Hold, which is longer than a command may, Times times
	AnswerLost  Kind = "answer-lost" // Function is carried out and answers a failure, Times times
)

// Driver is what kind of HSM the members of a run are.
type Driver string

// The drivers of a run.
const (
	SoftHSM Driver = "softhsm"
	Luna    Driver = "luna"
)

// Kinds returns every kind that this driver's tokens can suffer.
func Kinds(d Driver) []Kind {
	kinds := []Kind{
		KillDriver, FreezeDriver, CrashAtStart, SlowStart, Garbage, WrongVersion, KillOthers,
		SessionsClosed, LoggedOut, DeviceMemory, DeviceError, HungCall,
		TokenRemoved, TokenReplaced, ObjectDeleted, TokenDiskFull, CatalogDiskFull,
		Drain, Standby, RemoveAdd, Reload, KillDaemon, ReloadRemove, FreezeDaemon, LoseAll,
	}
	if d == Luna {
		kinds = append(kinds, Deactivated, PowerCycled, Tampered, SlowKeys, AnswerLost)
	}
	return kinds
}

// Permanent says whether an operator has to mend it: the member is failed meanwhile.
func (k Kind) Permanent() bool { return k == TokenReplaced || k == Tampered }

// Step is one fault of a plan. What a kind does not need is zero.
type Step struct {
	Kind     Kind
	Member   int           // from 0; for KillOthers the one that is left alone
	Hold     time.Duration // until it is healed
	Pause    time.Duration // until the next step
	Function string        // of the PKCS#11 library; "*" is any
	After    int
	Times    int
}

// Hurts returns the members that a step may keep from serving, of so many.
func (s Step) Hurts(members int) []int {
	switch s.Kind {
	case KillDaemon, FreezeDaemon, CatalogDiskFull:
		return nil // they hurt nobody's token, and all drivers alike
	case LoseAll:
		all := make([]int, members)
		for m := range all {
			all[m] = m
		}
		return all
	case KillOthers:
		var others []int
		for m := range members {
			if m != s.Member {
				others = append(others, m)
			}
		}
		return others
	default:
		return []int{s.Member}
	}
}

// String is the step as a line of a plan.
func (s Step) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-17s member %d  hold %-6v pause %-6v", s.Kind, s.Member, s.Hold, s.Pause)
	if s.Function != "" {
		fmt.Fprintf(&b, " %s after %d, %d times", s.Function, s.After, s.Times)
	} else if s.After != 0 {
		fmt.Fprintf(&b, " choice %d", s.After)
	}
	return strings.TrimRight(b.String(), " ")
}

// Plan is the faults of one run, in the order in which they begin. Those of different
// members overlap.
type Plan struct {
	Driver  Driver
	Seed    uint64
	Members int
	Steps   []Step
}

// New makes the plan of a seed: the same one for the same arguments. Kinds come in
// rounds, each in another order, so that a plan as long as there are kinds has all of
// them. No kinds means all that the driver has. At least two members are needed, as one is
// left whole by every kind but LoseAll.
func New(d Driver, seed uint64, faults, members int, kinds ...Kind) (Plan, error) {
	if d != SoftHSM && d != Luna {
		return Plan{}, fmt.Errorf("the members can be %s or %s, not %q", SoftHSM, Luna, d)
	}
	if len(kinds) == 0 {
		kinds = Kinds(d)
	}
	for _, k := range kinds {
		if !slices.Contains(Kinds(d), k) {
			return Plan{}, fmt.Errorf("no fault of %s is named %q; there are %q", d, k, Kinds(d))
		}
	}
	if members < 2 || faults < 0 {
		return Plan{}, fmt.Errorf("%d faults on %d members: one member is left whole, so at least 2 are needed", faults, members)
	}
	r := rand.New(rand.NewPCG(seed, uint64(members)))
	p := Plan{Driver: d, Seed: seed, Members: members}
	var deck []Kind
	for len(p.Steps) < faults {
		if len(deck) == 0 {
			deck = slices.Clone(kinds)
			r.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		s := step(r, deck[0], members)
		// Not the member that is hurt already, so that faults overlap.
		if n := len(p.Steps); n > 0 && p.Steps[n-1].Member == s.Member {
			s.Member = (s.Member + 1) % members
		}
		p.Steps = append(p.Steps, s)
		deck = deck[1:]
	}
	return p, nil
}

// hotCalls are the functions that a driver calls while it serves.
var hotCalls = [...]string{"*", "C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt", "C_GenerateRandom"} // never written to

// keyCalls are the functions by which keys are made, destroyed and cloned.
var keyCalls = [...]string{"C_GenerateKey", "C_DestroyObject", "CA_Extract", "CA_Insert", "CA_MigrationContinueSessionNegotiation"} // never written to

// step draws the parameters of a fault. It draws all of them for every kind, so that a
// kind that is changed does not change the steps behind it.
func step(r *rand.Rand, kind Kind, members int) Step {
	s := Step{Kind: kind, Member: r.IntN(members), Pause: milliseconds(r, 0, 300)}
	short, long := milliseconds(r, 50, 1000), milliseconds(r, 200, 3500)
	function, after, burst, choice := hotCalls[r.IntN(len(hotCalls))], r.IntN(20), 10+r.IntN(30), 1+r.IntN(1<<20)
	switch kind {
	case KillDriver, KillOthers, KillDaemon, PowerCycled:
	case FreezeDriver, FreezeDaemon, HungCall:
		s.Hold = long
	case SlowStart:
		s.Hold = 2*time.Second + short
	case SlowKeys:
		s.Hold = long + 2*time.Second
	case ObjectDeleted, TokenRemoved, Deactivated:
		s.Hold, s.After = short, choice
	default:
		s.Hold = short
	}
	switch kind {
	case SessionsClosed, LoggedOut, DeviceError:
		s.Hold, s.Function, s.After, s.Times = 0, function, after, 1+burst%5
	case DeviceMemory:
		s.Hold, s.Function, s.After, s.Times = 0, function, after, burst
	case HungCall:
		s.Function, s.After, s.Times = function, after, 1
	case SlowKeys:
		s.Function, s.Times = keyCalls[0], 1
	case AnswerLost:
		s.Function, s.After, s.Times = keyCalls[choice%len(keyCalls)], after%4, 1+burst%3
	}
	return s
}

func milliseconds(r *rand.Rand, least, most int) time.Duration {
	return time.Duration(least+r.IntN(most-least)) * time.Millisecond
}

// String is the plan as one reads it, a step a line.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d faults on %d members of %s\n", p.Seed, len(p.Steps), p.Members, p.Driver)
	for i, s := range p.Steps {
		fmt.Fprintf(&b, "%4d  %v\n", i+1, s)
	}
	return b.String()
}
