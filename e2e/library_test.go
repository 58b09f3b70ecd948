package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/internal/faultlib"
	"kmsd/kms/api"
	"kmsd/kms/client"
	"kmsd/pluginproto"
)

// shortTimeout is the command timeout where a library misbehaves, so that a member
// that hangs is soon given up.
const shortTimeout = 3 * time.Second

// prepareFaulty makes tokens and a configuration in which every member's driver
// loads a library that misbehaves when told to. The server has been stopped.
func prepareFaulty(t *testing.T, members int) (*devserver.Server, []*faultlib.Library) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	s, err := devserver.Start(ctx, devserver.Config{Bin: bin, Dir: filepath.Join(t.TempDir(), "kmsd"), Members: members, Env: environment()})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, s)
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	names := make([]string, members)
	for i := range names {
		names[i] = fmt.Sprintf("member-%d", i)
	}
	libs := faultlib.Build(t, names...)
	changeConfig(t, s, func(group map[string]any) {
		group["command_timeout"] = shortTimeout.String()
		for i, m := range group["members"].([]any) {
			m.(map[string]any)["settings"].(map[string]any)["module"] = libs[i].Path
		}
	})
	return s, libs
}

// faulty runs kmsd on libraries that misbehave, with one key and a load on it.
func faulty(t *testing.T, members, pairsPerSecond int) *trial {
	t.Helper()
	s, libs := prepareFaulty(t, members)
	c := dial(t, serve(t, s))
	g, _ := awaitWhole(t, c, recoveredIn)
	createKey(t, c, "shop")
	tr := &trial{c: c, libs: libs, load: startLoad(t, c, "shop", pairsPerSecond), control: startControl(t, c, "shop")}
	if members > 1 {
		tr.name = g.Members[1].Name
	}
	settle(t, tr.load)
	return tr
}

// trial is a group under load whose libraries misbehave.
type trial struct {
	c             *client.Client
	libs          []*faultlib.Library
	load, control *openLoad
	name          string // of the second member, whose library is libs[1]
}

// begin waits until the group is whole, forgets how requests ended so far, and returns the
// group.
func (tr *trial) begin(t *testing.T) api.Group {
	t.Helper()
	g, _ := awaitWhole(t, tr.c, recoveredIn)
	tr.load.begin().noFailure(t)
	tr.control.begin()
	return g
}

// hotCalls are what the driver calls while it wraps and unwraps.
var hotCalls = []string{"*", "C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt"}

// shoot has a fault happen so many times, each at a random call.
func (tr *trial) shoot(t *testing.T, lib *faultlib.Library, what faultlib.What, times int) {
	t.Helper()
	for range times {
		lib.Arm(t, 0, faultlib.Fault{What: what, Function: hotCalls[rand.N(len(hotCalls))], After: rand.Uint32N(20)})
		awaitFired(t, lib, 0, 1)
		tr.overcome(t)
		wait(t, time.Duration(rand.N(40))*time.Millisecond)
	}
}

// overcome waits until nothing is left of a fault that has happened: a driver is to survive one
// loss after the other, but not one in the middle of another.
func (tr *trial) overcome(t *testing.T) {
	t.Helper()
	tr.load.answered(t)
	wrap(t, tr.c, "shop", random(32), nil)
}

func awaitFired(t *testing.T, lib *faultlib.Library, slot, times int) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			if n := lib.Fired(t, slot); n < times {
				return fmt.Errorf("the fault has happened %d times of %d", n, times)
			}
			return nil
		})
	})
}

// A group of one has nobody to fail over to: what is asked has to succeed on the
// member whose sessions are lost.
func TestOneMemberLosesItsSessionsAgainAndAgain(t *testing.T) {
	tr := faulty(t, 1, 200)
	c, lib, load := tr.c, tr.libs[0], tr.load
	for _, loss := range []struct {
		name string
		what faultlib.What
	}{{"sessions", faultlib.CloseSessions}, {"login", faultlib.Logout}} {
		t.Run(loss.name, func(t *testing.T) {
			before := group(t, c).Members[0].DriverPID
			load.take()
			tr.shoot(t, lib, loss.what, 40)
			load.take().noneFailed(t, 40)
			if m := group(t, c).Members[0]; m.DriverPID != before {
				t.Errorf("the driver did not recover by itself; %d is there for %d", m.DriverPID, before)
			}
		})
	}
	t.Run("a lookup finds nothing", func(t *testing.T) {
		for range 10 {
			// A new connection has to look the key up again.
			lib.Arm(t, 1, faultlib.Fault{What: faultlib.Empty, Function: "C_FindObjects"})
			lib.Arm(t, 0, faultlib.Fault{What: faultlib.CloseSessions, Function: "C_EncryptInit"})
			awaitFired(t, lib, 1, 1)
			tr.overcome(t)
		}
	})
	o := load.end()
	for _, err := range o.failures {
		if errors.Is(err, api.ErrNotFound) {
			t.Errorf("a key that is there was reported as absent: %v", err)
		}
	}
	o.noneFailed(t, 5)
}

func TestALibraryMisbehavesUnderLoad(t *testing.T) {
	tr := faulty(t, 3, 200)
	t.Run("sessions and logins are lost on all members", tr.losses)
	t.Run("keys are made while sessions are lost", tr.lossesBesideNewKeys)
	t.Run("the device fails", tr.deviceErrors)
	t.Run("the device is short of memory", tr.deviceMemory)
	t.Run("one call hangs", tr.oneHang)
	t.Run("every encryption hangs", tr.lastingHang)
	t.Run("a key is long in the making", tr.slowKey)
	t.Run("a copy of a new key hangs", tr.hangBesideNewKey)
	awaitWhole(t, tr.c, recoveredIn)
	tr.load.end().noFailure(t)
	allVerify(t, tr.c)
}

func (tr *trial) losses(t *testing.T) {
	for _, lib := range tr.libs {
		tr.shoot(t, lib, faultlib.CloseSessions, 8)
		tr.shoot(t, lib, faultlib.Logout, 8)
	}
	tr.load.take().noneFailed(t, 40)
	awaitWhole(t, tr.c, recoveredIn)
}

func (tr *trial) lossesBesideNewKeys(t *testing.T) {
	for i, function := range []string{
		"C_GenerateKey", "C_CopyObject", "C_WrapKey", "C_UnwrapKey", "C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal",
		"C_DestroyObject", "C_GetSessionInfo",
	} {
		for j, lib := range tr.libs {
			what := []faultlib.What{faultlib.CloseSessions, faultlib.Logout}[(i+j)%2]
			lib.Arm(t, 0, faultlib.Fault{What: what, Function: function, After: rand.Uint32N(2)})
		}
		createKey(t, tr.c, fmt.Sprintf("made-%d", i))
		for _, lib := range tr.libs {
			lib.Disarm(t, 0)
		}
		tr.overcome(t)
		awaitWhole(t, tr.c, recoveredIn) // a loss beside the making of the connection ends a driver
	}
	tr.load.take().noneFailed(t, 5)
	allVerify(t, tr.c)
}

func (tr *trial) deviceErrors(t *testing.T) {
	const functionFailed = 0x06
	for _, ckr := range []uint{pluginproto.CKRDeviceError, functionFailed} {
		before := tr.begin(t).Members[1]
		tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_Encrypt", Times: 3, Arg: uint32(ckr)})
		awaitFired(t, tr.libs[1], 0, 3)
		awaitReplaced(t, tr.c, before)
		tr.load.take().noneFailed(t, 10)
	}
}

func (tr *trial) deviceMemory(t *testing.T) {
	const deviceMemory = 0x31
	for _, function := range []string{"C_EncryptInit", "C_Encrypt", "C_DecryptInit"} {
		before, since := tr.begin(t).Members[1], time.Now()
		tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: function, Times: 30, Arg: deviceMemory})
		awaitFired(t, tr.libs[1], 0, 30)
		tr.load.take().noneFailed(t, 10)
		after := awaitMember(t, tr.c, tr.name, recoveredIn, isActive)
		if after.DriverPID != before.DriverPID {
			t.Errorf("%s: the member was %+v and is %+v", function, before, after)
		}
		if e, left := tr.leftFor(t, since, "CKR_DEVICE_MEMORY"); left {
			t.Errorf("%s: the member was taken out of choice: %+v", function, e)
		}
	}
}

// leftFor looks for a change of the second member's state since a moment, for a cause with
// a text in it. It may have been silent for reasons of the machine's.
func (tr *trial) leftFor(t *testing.T, since time.Time, cause string) (_ api.Event, left bool) {
	t.Helper()
	past, err := tr.c.Log(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(past, func(e api.Event) bool {
		return e.Type == api.EventMember && e.Member == tr.name && e.Time.After(since) && strings.Contains(e.Cause, cause)
	})
	if i < 0 {
		return api.Event{}, false
	}
	return past[i], true
}

func (tr *trial) oneHang(t *testing.T) {
	before := tr.begin(t).Members[1]
	armed := time.Now()
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Encrypt", After: 7})
	awaitFired(t, tr.libs[1], 0, 1)
	hung := time.Now()
	out := awaitEvent(t, tr.c, "the member to be out of choice", func(e api.Event) bool {
		return e.Type == api.EventMember && e.Member == tr.name && e.From == string(api.MemberActive) && e.Time.After(armed)
	})
	t.Logf("out of choice after %v", out.Sub(hung))
	if out.Sub(hung) > commandTimeout/2 {
		t.Errorf("out of choice after %v, want it to be soon after %v", out.Sub(hung), shortTimeout)
	}
	awaitReplaced(t, tr.c, before)
	t.Logf("a new driver after %v", time.Since(hung))
	tr.libs[1].Disarm(t, 0)
	o := stall{wraps: tr.load.sinceBegin(t), control: tr.control.sinceBegin(t)}
	o.wraps.noneFailed(t, 20)
	o.noneWaited(t, shortTimeout/3) // nowhere near the command timeout
}

func (tr *trial) lastingHang(t *testing.T) {
	before := tr.begin(t).Members[1]
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Encrypt", Times: faultlib.Forever})
	hung := time.Now()
	awaitMember(t, tr.c, tr.name, recoveredIn, func(m api.Member) bool { return m.DriverPID != before.DriverPID })
	took := time.Since(hung)
	t.Logf("dropped after %v", took)
	if took > commandTimeout/2 {
		t.Errorf("dropped after %v, want it to be soon after %v", took, shortTimeout)
	}
	tr.libs[1].Disarm(t, 0)
	awaitReplaced(t, tr.c, before)
	tr.load.take().noneFailed(t, 20)
}

// slowKey has the primary take longer to make a key than a member may be silent, but not
// as long as it has for it. On another session it answers meanwhile.
func (tr *trial) slowKey(t *testing.T) {
	before := tr.begin(t).Members[0]
	tr.libs[0].Arm(t, 0, faultlib.Fault{What: faultlib.Sleep, Function: "C_GenerateKey", Arg: 2500})
	createKey(t, tr.c, "slow")
	if n := tr.libs[0].Fired(t, 0); n != 1 {
		t.Errorf("the slow call was made %d times", n)
	}
	if after := awaitMember(t, tr.c, before.Name, recoveredIn, isActive); after.DriverPID != before.DriverPID {
		t.Errorf("the member was %+v and is %+v", before, after)
	}
	tr.load.take().noneFailed(t, 20)
}

func (tr *trial) hangBesideNewKey(t *testing.T) {
	tr.begin(t)
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_UnwrapKey"})
	begin := time.Now()
	createKey(t, tr.c, "made-beside-a-hang")
	took, other := time.Since(begin), tr.control.take().quantile(1)
	t.Logf("created after %v; what needs no HSM took at most %v", took, other)
	if limit := 2*shortTimeout + share*other; took > limit {
		t.Errorf("created after %v, want at most %v", took, limit)
	}
	if n := tr.libs[1].Fired(t, 0); n != 1 {
		t.Errorf("%d calls hung", n)
	}
	createKey(t, tr.c, "made-after-it")
	tr.libs[1].Disarm(t, 0)
	tr.load.take().noneFailed(t, 20)
}

func TestALibraryHangsAtTheStart(t *testing.T) {
	s, libs := prepareFaulty(t, 3)
	libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Initialize", Times: faultlib.Forever})
	begin := time.Now()
	c := dial(t, serve(t, s))
	t.Logf("kmsd answers after %v", time.Since(begin))
	m := group(t, c).Members[1]
	t.Logf("member %s: %s (%s)", m.Name, m.State, m.Reason)
	if m.State != api.MemberProbing || m.RecoveryAttempts != 1 { // its first attempt goes on
		t.Errorf("kmsd has waited for the member that hangs: %+v", m)
	}
	awaitOthers(t, c, m.Name)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 100)
	settle(t, load)
	if m := group(t, c).Members[1]; isActive(m) {
		t.Errorf("the member that hangs serves: %+v", m)
	}
	libs[1].Disarm(t, 0)
	_, took := awaitWhole(t, c, recoveredIn)
	t.Logf("whole %v after the hang has ended", took)
	load.end().noneFailed(t, 1)
	allVerify(t, c)
}
