package p11_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// faulty opens a driver on a library that misbehaves when it is told to.
func faulty(t *testing.T) (*p11.Driver, *faultlib.Library) {
	t.Helper()
	b, lib := faultyBench(t)
	return b.open(t), lib
}

func faultyBench(t *testing.T) (*bench, *faultlib.Library) {
	t.Helper()
	lib := faultlib.Build(t, "faulty")[0]
	b := newBench(t)
	b.settings["module"] = lib.Path
	return b, lib
}

// waitFired waits until the fault of a slot has happened to a call. The limit of all tests
// ends it when none comes.
func waitFired(t testing.TB, lib *faultlib.Library, slot int) {
	t.Helper()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for lib.Fired(t, slot) == 0 {
		<-look.C
	}
}

// lives are what is done to keys, from their making on. They return the failure of
// the first call that failed.
var lives = []struct {
	name   string
	stride uint32 // between two moments that are tried; the first is random
	live   func(context.Context, *p11.Driver) error
}{
	{"a secret key", 5, liveSecret},
	{"a pair", 11, livePair},
}

func liveSecret(ctx context.Context, d *p11.Driver) error {
	id := newID()
	if _, err := d.Generate(ctx, pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
		return fmt.Errorf("generating: %w", err)
	}
	if err := roundTrip(ctx, d, id); err != nil {
		return err
	}
	if err := d.Destroy(ctx, id); err != nil {
		return fmt.Errorf("destroying: %w", err)
	}
	return nil
}

func livePair(ctx context.Context, d *p11.Driver) error {
	id := newID()
	if _, err := d.Generate(ctx, pluginproto.KeySpec{ID: id, Type: pluginproto.ECP256}); err != nil {
		return fmt.Errorf("generating: %w", err)
	}
	_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.ECDSA, Hash: pluginproto.SHA256, Key: id, Input: make([]byte, 32)})
	if err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	reply, err := d.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}})
	if err != nil {
		return fmt.Errorf("cloning out: %w", err)
	}
	if err := d.Destroy(ctx, id); err != nil {
		return fmt.Errorf("destroying: %w", err)
	}
	// The token it came from does as well as another.
	if _, err := d.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}, Blob: reply.Blob}); err != nil {
		return fmt.Errorf("cloning in: %w", err)
	}
	if err := d.Destroy(ctx, id); err != nil {
		return fmt.Errorf("destroying the clone: %w", err)
	}
	return nil
}

// A fault may come between any two calls into the library, and an operation on the
// token makes many. What is lost is made good; what fails is put down to the token
// and never to the caller or to the key.
func TestAFaultAtEveryMomentOfAKeysLife(t *testing.T) {
	b, lib := faultyBench(t)
	for _, fault := range []struct {
		name  string
		what  faultlib.What
		ckr   uint32
		class pluginproto.Class // of the failure that may come of it; ClassUnknown: none may
	}{
		{"sessions are closed", faultlib.CloseSessions, 0, pluginproto.ClassUnknown},
		{"the login is gone", faultlib.Logout, 0, pluginproto.ClassUnknown},
		{"the device fails", faultlib.Answer, pkcs11.CKR_DEVICE_ERROR, pluginproto.ClassMember},
		{"the device is short of memory", faultlib.Answer, pkcs11.CKR_DEVICE_MEMORY, pluginproto.ClassBusy},
	} {
		for _, life := range lives {
			t.Run(life.name+" when "+fault.name, func(t *testing.T) {
				d := b.open(t)
				moments := 0
				for after := rand.Uint32N(life.stride); after < 500; after += life.stride {
					lib.Arm(t, 0, faultlib.Fault{What: fault.what, Function: "*", After: after, Arg: fault.ckr})
					err := life.live(t.Context(), d)
					if err != nil && (fault.class == pluginproto.ClassUnknown || pluginproto.ClassOf(err) != fault.class) {
						t.Errorf("before call %d: %v, a failure of class %v", after, err, pluginproto.ClassOf(err))
					}
					if err == nil && lib.Fired(t, 0) == 0 {
						break // there are not so many calls
					}
					if moments++; fault.what == faultlib.Answer {
						if err := d.Close(); err != nil { // which is what becomes of a driver that fails so
							t.Fatal(err)
						}
						d = b.open(t)
					}
				}
				lib.Disarm(t, 0)
				t.Logf("%d moments", moments)
				if moments < 8 {
					t.Error("it proves nothing below 8")
				}
			})
		}
	}
}

func TestAnAbsenceIsSeenTwice(t *testing.T) {
	d, lib := faulty(t)
	id := generate(t, d, pluginproto.AES256).ID
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Empty, Function: "C_FindObjects"})
	if _, err := d.Inspect(t.Context(), id); err != nil {
		t.Errorf("a key that the token hid once: %v", err)
	}
	if n := lib.Fired(t, 0); n != 1 {
		t.Errorf("it was hidden %d times", n)
	}
}

// A library may leave an operation active that it has answered with a failure.
func TestAnOperationThatWasLeftActive(t *testing.T) {
	d, lib := faulty(t)
	id := generate(t, d, pluginproto.AES256).ID
	for _, function := range []string{"C_Encrypt", "C_Decrypt"} {
		lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: function, Arg: pkcs11.CKR_DEVICE_MEMORY})
		if err := roundTrip(t.Context(), d, id); pluginproto.ClassOf(err) != pluginproto.ClassBusy {
			t.Errorf("a token short of memory: %v", err)
		}
		if err := roundTrip(t.Context(), d, id); err != nil {
			t.Errorf("after that: %v", err)
		}
	}
}

// To say that data does not authenticate is to say that it is lost.
func TestATroubledTokenDoesNotCondemnData(t *testing.T) {
	d, lib := faulty(t)
	id := generate(t, d, pluginproto.AES256).ID
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_Decrypt", Arg: pkcs11.CKR_GENERAL_ERROR})
	if err := roundTrip(t.Context(), d, id); err != nil {
		t.Errorf("trouble once: %v", err)
	}
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_Decrypt", Times: faultlib.Forever, Arg: pkcs11.CKR_GENERAL_ERROR})
	if err := roundTrip(t.Context(), d, id); pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("trouble that lasts: %v", err)
	}
	lib.Disarm(t, 0)
}

// A library that hangs in one session must not pass for a sound one because it
// answers in another.
func TestAProbeIsSilentWhileACallHangs(t *testing.T) {
	d, lib := faulty(t)
	id := generate(t, d, pluginproto.AES256).ID
	probe := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		return probe(ctx, d)
	}
	for _, call := range []struct {
		name     string
		function string // not called by a probe
		do       func() error
	}{
		{"a command", "C_CopyObject", func() error { return roundTrip(t.Context(), d, id) }}, // its first with this key
		{"a lookup", "C_FindObjectsInit", func() error {
			_, err := d.Inspect(t.Context(), id)
			return err
		}},
	} {
		t.Run(call.name, func(t *testing.T) {
			lib.Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: call.function})
			hung := make(chan error, 1)
			go func() { hung <- call.do() }()
			waitFired(t, lib, 0)
			// A driver whose probes go on being answered is one that this waits for in vain.
			var silent error
			for silent == nil {
				silent = probe(100 * time.Millisecond)
			}
			if !errors.Is(silent, context.DeadlineExceeded) {
				t.Errorf("a probe meanwhile: %v", silent)
			}
			released := make(chan error, 1)
			go func() { released <- probe(time.Minute) }()
			lib.Disarm(t, 0)
			if err := errors.Join(<-hung, <-released); err != nil {
				t.Errorf("when the hang has ended: %v", err)
			}
		})
	}
}
