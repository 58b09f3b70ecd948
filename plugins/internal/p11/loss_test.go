package p11_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// What is taken from a driver behind its back, and what it does about it.
var losses = []struct {
	name string
	take func(*p11.Driver) error
}{
	{"all sessions are closed", (*p11.Driver).CloseAllSessions},
	{"the login is gone", (*p11.Driver).Logout},
}

// A call meets the token three times before it fails, so that two losses cost nobody anything,
// however the calls fall between them.
func TestNothingFailsWhileSessionsAreLost(t *testing.T) {
	const workers, each, times = 16, 150, 2
	for _, loss := range losses {
		t.Run(loss.name, func(t *testing.T) {
			d := newBench(t).open(t)
			aes, ec := generate(t, d, pluginproto.AES256).ID, generate(t, d, pluginproto.ECP256).ID
			var done atomic.Int64
			parts := make(chan struct{}, times+1)
			var wg sync.WaitGroup
			for w := range workers {
				wg.Go(func() {
					for range each {
						if err := oneOf(t.Context(), d, w, aes, ec); err != nil {
							t.Errorf("after %d operations: %v", done.Load(), err)
						}
						if done.Add(1)%(workers*each/(times+1)) == 0 {
							parts <- struct{}{}
						}
					}
				})
			}
			for range times {
				<-parts
				if err := loss.take(d); err != nil {
					t.Error(err)
				}
				// What is lost is there again before it is taken once more.
				if err := roundTrip(t.Context(), d, aes); err != nil {
					t.Errorf("after %d operations: %v", done.Load(), err)
				}
			}
			wg.Wait()
			if n := done.Load(); n != workers*each {
				t.Errorf("%d operations of %d", n, workers*each)
			}
		})
	}
}

// oneOf does an operation that depends on the caller's number.
func oneOf(ctx context.Context, d *p11.Driver, n int, aes, ec pluginproto.KeyID) error {
	switch n % 8 {
	case 0:
		digest := sha256.Sum256(nil)
		_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.ECDSA, Hash: pluginproto.SHA256, Key: ec, Input: digest[:]})
		return err
	case 1:
		_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
		return err
	case 2:
		_, err := d.Inspect(ctx, aes)
		return err
	default:
		return roundTrip(ctx, d, aes)
	}
}

func TestEveryCallSurvivesALoss(t *testing.T) {
	d := newBench(t).open(t)
	ctx := t.Context()
	aes, rsa := generate(t, d, pluginproto.AES256).ID, generate(t, d, pluginproto.RSA2048).ID
	doomed := map[string]pluginproto.KeyID{}
	for _, loss := range losses {
		doomed[loss.name] = generate(t, d, pluginproto.ECP256).ID
	}
	label := "renamed"
	digest := sha256.Sum256(nil)
	for _, loss := range losses {
		for _, call := range []struct {
			name string
			do   func() error
		}{
			{"encrypting", func() error { return roundTrip(ctx, d, aes) }},
			{"signing", func() error {
				_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.RSAPSS, Hash: pluginproto.SHA256, Key: rsa, Input: digest[:]})
				return err
			}},
			{"drawing random bytes", func() error {
				_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpRandom, Length: 32})
				return err
			}},
			{"probing", func() error {
				_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
				return err
			}},
			{"reading", func() error { _, err := d.Inspect(ctx, rsa); return err }},
			{"listing", func() error {
				all, err := d.List(ctx)
				if err == nil && len(all) < 3 {
					return fmt.Errorf("%d keys are listed", len(all))
				}
				return err
			}},
			{"generating a pair", func() error {
				_, err := d.Generate(ctx, pluginproto.KeySpec{ID: newID(), Type: pluginproto.ECP384})
				return err
			}},
			{"changing", func() error { return d.SetAttributes(ctx, rsa, pluginproto.Attributes{Label: &label}) }},
			{"cloning out", func() error {
				_, err := d.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{rsa}})
				return err
			}},
			{"destroying", func() error { return d.Destroy(ctx, doomed[loss.name]) }},
		} {
			t.Run(call.name+" after "+loss.name, func(t *testing.T) {
				if err := loss.take(d); err != nil {
					t.Fatal(err)
				}
				if err := call.do(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A key that is there is never reported as absent, however the login is lost.
func TestALostLoginIsNoAbsence(t *testing.T) {
	d := newBench(t).open(t)
	id := generate(t, d, pluginproto.AES256).ID
	for range 50 {
		if err := d.Logout(); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Inspect(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Logout(); err != nil {
		t.Fatal(err)
	}
	_, err := d.Inspect(t.Context(), newID())
	if pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("a key that is not there: %v", err)
	}
}

func TestAPINThatChangedIsTriedOnce(t *testing.T) {
	b := newBench(t)
	d := b.open(t)
	id := generate(t, d, pluginproto.AES256).ID
	d.SetPIN("wrong")
	if err := d.CloseAllSessions(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		err := roundTrip(t.Context(), d, id)
		var e *pluginproto.Error
		if !errors.As(err, &e) || e.Class != pluginproto.ClassMember || !e.Permanent || e.CKR != pluginproto.CKRPINIncorrect {
			t.Fatalf("using the key: %v", err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// Had it been tried each time, the token would be locked where tokens lock.
	b.open(t)
}

func TestATokenThatIsGone(t *testing.T) {
	b := newBench(t)
	d := b.open(t)
	id := generate(t, d, pluginproto.AES256).ID
	b.store.Wipe(t)
	if err := d.CloseAllSessions(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		err := roundTrip(t.Context(), d, id)
		if pluginproto.ClassOf(err) != pluginproto.ClassMember || pluginproto.CKROf(err) != pluginproto.CKRTokenNotPresent {
			t.Errorf("using the key: %v", err)
		}
		if e := (*pluginproto.Error)(nil); errors.As(err, &e) && e.Permanent {
			t.Errorf("%v is permanent, although the token may come back", err)
		}
	}
}

func TestATokenThatWasReplaced(t *testing.T) {
	b := newBench(t)
	d := b.open(t)
	id := generate(t, d, pluginproto.AES256).ID
	b.store.Wipe(t)
	b.store.Add(t, "token-a") // the same label, another serial number
	if err := d.CloseAllSessions(); err != nil {
		t.Fatal(err)
	}
	err := roundTrip(t.Context(), d, id)
	var e *pluginproto.Error
	if !errors.As(err, &e) || e.Class != pluginproto.ClassMember || !e.Permanent {
		t.Errorf("using a key of the token that was there: %v", err)
	}
}

// Where commands run on the token's own objects, a handle is not believed for long either:
// its key may have been removed by other means, and an HSM may have given it to another one.
func TestAHandleDoesNotOutliveItsKey(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		t.Run(string(typ), func(t *testing.T) {
			q := quirks()
			q.SessionCopies, q.CopyCheck = false, 1 // ns
			d := p11.New(q, p11.Options{})
			if _, err := d.Open(t.Context(), newBench(t).request()); err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			id, other := generate(t, d, typ).ID, newID()
			use := func() error {
				if typ == pluginproto.AES256 {
					return roundTrip(t.Context(), d, id)
				}
				return oneOf(t.Context(), d, 0, id, id)
			}
			if err := use(); err != nil {
				t.Fatal(err)
			}
			// SoftHSM gives no handle twice; seen from here this is the same.
			err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
				for _, h := range search(t, lib, sh, id) {
					if err := lib.SetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, other[:])}); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := use(); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
				t.Errorf("using what has its handle now: %v", err)
			}
		})
	}
}

// A key that somebody removes from the token by other means cannot be used for
// long, although commands run on a session copy.
func TestACopyDoesNotOutliveItsKey(t *testing.T) {
	b := newBench(t)
	q := quirks()
	q.CopyCheck = 1 // ns
	d := p11.New(q, p11.Options{})
	if _, err := d.Open(t.Context(), b.request()); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	id := generate(t, d, pluginproto.AES256).ID
	if err := roundTrip(t.Context(), d, id); err != nil {
		t.Fatal(err)
	}
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		for _, h := range search(t, lib, sh, id) {
			if err := lib.DestroyObject(sh, h); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := roundTrip(t.Context(), d, id); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("using a key that was removed: %v", err)
	}
}

// search finds what is on the token under an identity.
func search(t testing.TB, lib *pkcs11.Ctx, sh pkcs11.SessionHandle, id pluginproto.KeyID) []pkcs11.ObjectHandle {
	t.Helper()
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:])}
	if err := lib.FindObjectsInit(sh, template); err != nil {
		t.Fatal(err)
	}
	handles, _, err := lib.FindObjects(sh, 10)
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.FindObjectsFinal(sh); err != nil {
		t.Fatal(err)
	}
	return handles
}

func TestWrongPINNeverLocks(t *testing.T) {
	b := newBench(t)
	for range 2 {
		d := p11.New(quirks(), p11.Options{})
		req := b.request()
		req.PIN = []byte("not-the-pin")
		_, err := d.Open(t.Context(), req)
		var e *pluginproto.Error
		if !errors.As(err, &e) || e.Class != pluginproto.ClassMember || !e.Permanent || e.CKR != pluginproto.CKRPINIncorrect {
			t.Fatalf("opening: %v", err)
		}
		if bytes.Contains([]byte(err.Error()), req.PIN) {
			t.Error("the error tells the PIN")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	b.open(t)
}

// A second driver of one process must not ride on the login of the first.
func TestALoginThatSomebodyElseMadeIsNotTaken(t *testing.T) {
	b := newBench(t)
	b.open(t)
	d := p11.New(quirks(), p11.Options{})
	req := b.request()
	req.PIN = []byte("not-the-pin")
	_, err := d.Open(t.Context(), req)
	if pluginproto.ClassOf(err) != pluginproto.ClassMember || pluginproto.CKROf(err) != pkcs11.CKR_USER_ALREADY_LOGGED_IN {
		t.Errorf("opening: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestPINFlags(t *testing.T) {
	const ok = pkcs11.CKF_USER_PIN_INITIALIZED
	for _, tc := range []struct {
		name  string
		flags uint
		ckr   uint
	}{
		{"a token with a PIN", ok, 0},
		{"a PIN that was wrong before", ok | pkcs11.CKF_USER_PIN_COUNT_LOW, 0},
		{"one try left", ok | pkcs11.CKF_USER_PIN_FINAL_TRY, pkcs11.CKR_PIN_INCORRECT},
		{"a locked PIN", ok | pkcs11.CKF_USER_PIN_LOCKED, pkcs11.CKR_PIN_LOCKED},
		{"a PIN to be changed", ok | pkcs11.CKF_USER_PIN_TO_BE_CHANGED, pkcs11.CKR_PIN_EXPIRED},
		{"no PIN", 0, pkcs11.CKR_USER_PIN_NOT_INITIALIZED},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := p11.CheckPIN(tc.flags)
			if pluginproto.CKROf(err) != tc.ckr || (err != nil) != (tc.ckr != 0) {
				t.Errorf("%v", err)
			}
			if e := (*pluginproto.Error)(nil); errors.As(err, &e) && !e.Permanent {
				t.Errorf("%v is not permanent", err)
			}
		})
	}
}

func TestCloseWipesTheSecrets(t *testing.T) {
	b := newBench(t)
	d := p11.New(quirks(), p11.Options{})
	if _, err := d.Open(t.Context(), b.request()); err != nil {
		t.Fatal(err)
	}
	if d.Wiped() {
		t.Fatal("there is nothing to wipe")
	}
	for range 2 {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if !d.Wiped() {
		t.Error("secrets are left in memory")
	}
	if _, err := d.List(t.Context()); pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("calling a closed driver: %v", err)
	}
}

func TestADriverThatWasNeverOpened(t *testing.T) {
	d := p11.New(quirks(), p11.Options{})
	_, err := d.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpProbe})
	if pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("probing: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.Open(t.Context(), pluginproto.OpenRequest{Settings: map[string]string{"token_label": "x", "module": softhsmtest.Module(t)},
		PIN: []byte("1"), Domain: make([]byte, 32)}); pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("opening a closed driver: %v", err)
	}
}

func probe(ctx context.Context, d *p11.Driver) error {
	_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
	return err
}

// making has a driver make a key in a library that does not come to its end with it before
// the fault in slot 0 is disarmed.
func making(ctx context.Context, d *p11.Driver) <-chan error {
	made := make(chan error, 1)
	go func() {
		_, err := d.Generate(ctx, pluginproto.KeySpec{ID: newID(), Type: pluginproto.ECP256})
		made <- err
	}()
	return made
}

// A probe is answered while a long key generation runs.
func TestAProbeDoesNotWaitForAKeyGeneration(t *testing.T) {
	d, lib := faulty(t)
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_GenerateKeyPair"})
	made := making(t.Context(), d)
	waitFired(t, lib, 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for range 10 {
		if err := probe(ctx, d); err != nil {
			t.Errorf("a probe while a key is made: %v", err)
		}
	}
	lib.Disarm(t, 0)
	if err := <-made; err != nil {
		t.Error(err)
	}
}

// One who waits for a key that is being made, and one who waits for a turn.
func TestACallerThatGivesUpIsFreeAtOnce(t *testing.T) {
	d, lib := faulty(t)
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Hang, Function: "C_GenerateKeyPair"})
	ctx, cancel := context.WithCancel(t.Context())
	callers := []<-chan error{making(ctx, d)}
	waitFired(t, lib, 0)
	for range 4 {
		callers = append(callers, making(ctx, d))
	}
	cancel()
	for _, gaveUp := range callers {
		if err := <-gaveUp; !errors.Is(err, context.Canceled) {
			t.Errorf("giving up: %v", err)
		}
	}
	lib.Disarm(t, 0)
}
