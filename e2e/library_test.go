package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
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
func faulty(t *testing.T, members, pairsPerSecond int) (*client.Client, []*faultlib.Library, *openLoad) {
	t.Helper()
	s, libs := prepareFaulty(t, members)
	c := dial(t, serve(t, s))
	awaitWhole(t, c, recoveredIn)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", pairsPerSecond)
	settle(t, load)
	return c, libs, load
}

// hotCalls are what the driver calls while it wraps and unwraps.
var hotCalls = []string{"*", "C_EncryptInit", "C_Encrypt", "C_DecryptInit", "C_Decrypt"}

// shoot has a fault happen so many times, each at a random call.
func shoot(t *testing.T, lib *faultlib.Library, what faultlib.What, times int) {
	t.Helper()
	for range times {
		lib.Arm(t, 0, faultlib.Fault{What: what, Function: hotCalls[rand.N(len(hotCalls))], After: rand.Uint32N(20)})
		awaitFired(t, lib, 0, 1)
		wait(t, time.Duration(rand.N(40))*time.Millisecond)
	}
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
	c, libs, load := faulty(t, 1, 200)
	lib := libs[0]
	for _, loss := range []struct {
		name string
		what faultlib.What
	}{{"sessions", faultlib.CloseSessions}, {"login", faultlib.Logout}} {
		t.Run(loss.name, func(t *testing.T) {
			before := group(t, c).Members[0].DriverPID
			load.take()
			shoot(t, lib, loss.what, 40)
			load.take().noneFailed(t, 200)
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
		}
	})
	o := load.end()
	for _, err := range o.failures {
		if errors.Is(err, api.ErrNotFound) {
			t.Errorf("a key that is there was reported as absent: %v", err)
		}
	}
	o.noneFailed(t, 20)
}

// trial is a group of three under load whose libraries misbehave.
type trial struct {
	c    *client.Client
	libs []*faultlib.Library
	load *openLoad
	name string // of the second member, whose library is libs[1]
}

func TestALibraryMisbehavesUnderLoad(t *testing.T) {
	c, libs, load := faulty(t, 3, 200)
	tr := &trial{c, libs, load, group(t, c).Members[1].Name}
	t.Run("sessions and logins are lost on all members", tr.losses)
	t.Run("keys are made while sessions are lost", tr.lossesBesideNewKeys)
	t.Run("the device fails", tr.deviceErrors)
	t.Run("the device is short of memory", tr.deviceMemory)
	t.Run("one call hangs", tr.oneHang)
	t.Run("every encryption hangs", tr.lastingHang)
	t.Run("a key is long in the making", tr.slowKey)
	t.Run("a copy of a new key hangs", tr.hangBesideNewKey)
	awaitWhole(t, c, recoveredIn)
	load.end()
	allVerify(t, c)
}

func (tr *trial) losses(t *testing.T) {
	for _, lib := range tr.libs {
		shoot(t, lib, faultlib.CloseSessions, 8)
		shoot(t, lib, faultlib.Logout, 8)
	}
	tr.load.take().noneFailed(t, 200)
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
	}
	for _, lib := range tr.libs {
		lib.Disarm(t, 0)
	}
	tr.load.take().noneFailed(t, 10)
	awaitWhole(t, tr.c, recoveredIn)
	allVerify(t, tr.c)
}

func (tr *trial) deviceErrors(t *testing.T) {
	const functionFailed = 0x06
	for _, ckr := range []uint{pluginproto.CKRDeviceError, functionFailed} {
		tr.load.take()
		before := awaitMember(t, tr.c, tr.name, recoveredIn, isActive)
		tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_Encrypt", Times: 3, Arg: uint32(ckr)})
		awaitFired(t, tr.libs[1], 0, 3)
		awaitReplaced(t, tr.c, before)
		tr.load.take().noneFailed(t, 50)
	}
}

func (tr *trial) deviceMemory(t *testing.T) {
	const deviceMemory = 0x31
	for _, function := range []string{"C_EncryptInit", "C_Encrypt", "C_DecryptInit"} {
		tr.load.take()
		before := awaitMember(t, tr.c, tr.name, recoveredIn, isActive)
		tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: function, Times: 30, Arg: deviceMemory})
		awaitFired(t, tr.libs[1], 0, 30)
		tr.load.take().noneFailed(t, 50)
		if after := awaitMember(t, tr.c, tr.name, recoveredIn, isActive); after.DriverPID != before.DriverPID || !after.Since.Equal(before.Since) {
			t.Errorf("%s: the member was %+v and is %+v", function, before, after)
		}
	}
}

func (tr *trial) oneHang(t *testing.T) {
	tr.load.take()
	before := awaitMember(t, tr.c, tr.name, recoveredIn, isActive)
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Encrypt", After: 7})
	awaitFired(t, tr.libs[1], 0, 1)
	hung := time.Now()
	probing := awaitMember(t, tr.c, tr.name, 2*shortTimeout, func(m api.Member) bool { return !isActive(m) })
	t.Logf("%s after %v (%s)", probing.State, time.Since(hung), probing.Reason)
	awaitReplaced(t, tr.c, before)
	t.Logf("a new driver after %v", time.Since(hung))
	tr.libs[1].Disarm(t, 0)
	o := tr.load.take()
	o.noneFailed(t, 100)
	if longest := o.quantile(1); longest > shortTimeout/3 {
		t.Errorf("an answer took %v, want it to be nowhere near the command timeout", longest)
	}
}

func (tr *trial) lastingHang(t *testing.T) {
	tr.load.take()
	before := awaitMember(t, tr.c, tr.name, recoveredIn, isActive)
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Encrypt", Times: faultlib.Forever})
	hung := time.Now()
	awaitMember(t, tr.c, tr.name, 3*shortTimeout, func(m api.Member) bool { return m.DriverPID != before.DriverPID })
	t.Logf("dropped after %v", time.Since(hung))
	tr.libs[1].Disarm(t, 0)
	awaitReplaced(t, tr.c, before)
	tr.load.take().noneFailed(t, 100)
}

// slowKey has the primary take longer to make a key than a member may be silent, but not
// as long as it has for it. On another session it answers meanwhile.
func (tr *trial) slowKey(t *testing.T) {
	tr.load.take()
	before := group(t, tr.c).Members[0]
	tr.libs[0].Arm(t, 0, faultlib.Fault{What: faultlib.Sleep, Function: "C_GenerateKey", Arg: 2500})
	createKey(t, tr.c, "slow")
	if n := tr.libs[0].Fired(t, 0); n != 1 {
		t.Errorf("the slow call was made %d times", n)
	}
	if after := group(t, tr.c).Members[0]; after.DriverPID != before.DriverPID || !isActive(after) {
		t.Errorf("the member was %+v and is %+v", before, after)
	}
	tr.load.take().noneFailed(t, 100)
}

func (tr *trial) hangBesideNewKey(t *testing.T) {
	tr.load.take()
	tr.libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_UnwrapKey"})
	begin := time.Now()
	createKey(t, tr.c, "made-beside-a-hang")
	if took := time.Since(begin); took > 2*shortTimeout {
		t.Errorf("created after %v, want at most %v", took, 2*shortTimeout)
	} else {
		t.Logf("created after %v", took)
	}
	if n := tr.libs[1].Fired(t, 0); n != 1 {
		t.Errorf("%d calls hung", n)
	}
	createKey(t, tr.c, "made-after-it")
	tr.libs[1].Disarm(t, 0)
	tr.load.take().noneFailed(t, 100)
}

func TestALibraryHangsAtTheStart(t *testing.T) {
	s, libs := prepareFaulty(t, 3)
	libs[1].Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_Initialize", Times: faultlib.Forever})
	begin := time.Now()
	c := dial(t, serve(t, s))
	took := time.Since(begin)
	t.Logf("kmsd answers after %v", took)
	if took > startWait { // as long as if nobody served; the member hangs for longer
		t.Errorf("kmsd answers after %v, want less than %v", took, startWait)
	}
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 100)
	g := group(t, c)
	t.Logf("group %s, member %s: %s (%s)", g.State, g.Members[1].Name, g.Members[1].State, g.Members[1].Reason)
	if m := g.Members[1]; g.State != api.GroupDegraded || isActive(m) {
		t.Errorf("the group is %s with a member that is %s", g.State, m.State)
	}
	settle(t, load)
	libs[1].Disarm(t, 0)
	_, took = awaitWhole(t, c, recoveredIn)
	t.Logf("whole %v after the hang has ended", took)
	load.end().noneFailed(t, 1)
	allVerify(t, c)
}
