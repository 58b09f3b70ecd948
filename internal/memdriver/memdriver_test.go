package memdriver_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/drivertest"
	"kmsd/internal/leaktest"
	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// types are enough to touch every kind of key without a long RSA generation.
var types = []pluginproto.KeyType{
	pluginproto.AES256, pluginproto.AES128, pluginproto.HMACSHA256,
	pluginproto.ECP256, pluginproto.ECP384, pluginproto.ECP521, pluginproto.RSA2048,
}

func TestContract(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Types: types,
		NewToken: func(t *testing.T) drivertest.Token {
			token := memdriver.NewToken(t.Name())
			return drivertest.Token{
				PIN:      []byte(memdriver.PIN),
				Settings: map[string]string{"token_label": token.Label()},
				Start: func(*testing.T) pluginproto.Driver {
					return memdriver.New(memdriver.Options{Token: token})
				},
			}
		},
	})
}

func TestContractWithOneStepClonesThroughTheWall(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Types: types,
		NewToken: func(t *testing.T) drivertest.Token {
			token := memdriver.NewToken(t.Name())
			return drivertest.Token{
				PIN: []byte(memdriver.PIN),
				Start: func(t *testing.T) pluginproto.Driver {
					d := memdriver.New(memdriver.Options{Token: token, OneStepClones: true})
					return drivertest.NewWall(t, d, pluginproto.ServerOptions{}, pluginproto.ClientOptions{})
				},
			}
		},
	})
}

func TestContractThroughTheWall(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Types: types,
		NewToken: func(t *testing.T) drivertest.Token {
			token := memdriver.NewToken(t.Name())
			return drivertest.Token{
				PIN: []byte(memdriver.PIN),
				Start: func(t *testing.T) pluginproto.Driver {
					d := memdriver.New(memdriver.Options{Token: token, CloneKeys: 8})
					return drivertest.NewWall(t, d, pluginproto.ServerOptions{}, pluginproto.ClientOptions{})
				},
			}
		},
	})
}

func open(t *testing.T, opts memdriver.Options) *memdriver.Driver {
	t.Helper()
	d := memdriver.New(opts)
	if _, err := d.Open(t.Context(), openRequest()); err != nil {
		t.Fatalf("opening: %v", err)
	}
	return d
}

func openRequest() pluginproto.OpenRequest {
	return pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, 32)}
}

func probe(ctx context.Context, d *memdriver.Driver) error {
	_, err := d.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
	return err
}

var errScripted = &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "as the script says"}

func TestScript(t *testing.T) {
	random := pluginproto.Command{Op: pluginproto.OpRandom, Length: 1}
	t.Run("fails so many calls and no more", func(t *testing.T) {
		d := open(t, memdriver.Options{})
		d.Script(memdriver.Fault{Times: 2, Err: errScripted})
		for _, want := range []error{errScripted, errScripted, nil} {
			if err := probe(t.Context(), d); !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
		}
	})
	t.Run("fails one operation and lets the others be", func(t *testing.T) {
		d := open(t, memdriver.Options{})
		d.Script(memdriver.Fault{Op: pluginproto.OpRandom, Err: errScripted})
		if err := probe(t.Context(), d); err != nil {
			t.Errorf("a probe: %v", err)
		}
		if _, err := d.List(t.Context()); err != nil {
			t.Errorf("a list: %v", err)
		}
		if _, err := d.Do(t.Context(), random); !errors.Is(err, errScripted) {
			t.Errorf("error %v, want the scripted one", err)
		}
		d.Clear()
		if _, err := d.Do(t.Context(), random); err != nil {
			t.Errorf("after Clear: %v", err)
		}
	})
	t.Run("hangs until released", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := open(t, memdriver.Options{})
			release := make(chan struct{})
			d.Script(memdriver.Fault{Call: memdriver.CallList, Hang: release})
			done := make(chan error, 1)
			go func() { _, err := d.List(t.Context()); done <- err }()
			synctest.Wait()
			select {
			case err := <-done:
				t.Fatalf("it did not hang: %v", err)
			default:
			}
			close(release)
			if err := <-done; err != nil {
				t.Errorf("released: %v", err)
			}
		})
	})
	t.Run("a hanging call ends with its context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := open(t, memdriver.Options{})
			d.Script(memdriver.Fault{Hang: make(chan struct{})})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			start := time.Now()
			if err := probe(ctx, d); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want a deadline", err)
			}
			if took := time.Since(start); took != time.Minute {
				t.Errorf("it took %v", took)
			}
		})
	})
	t.Run("a call that is to fail after a while fails with the driver", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := open(t, memdriver.Options{})
			d.Script(memdriver.Fault{Delay: time.Hour, Err: errScripted})
			time.AfterFunc(time.Minute, d.Crash)
			if err := probe(t.Context(), d); pluginproto.ClassOf(err) != pluginproto.ClassMember {
				t.Errorf("error %v, want that the driver is gone", err)
			}
		})
	})
	t.Run("delays", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := open(t, memdriver.Options{})
			d.Script(memdriver.Fault{Call: memdriver.CallCloneStep, Delay: time.Hour})
			start := time.Now()
			_, err := d.CloneStep(t.Context(), pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{{1}}})
			if pluginproto.ClassOf(err) != pluginproto.ClassNotFound || time.Since(start) != time.Hour {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		})
	})
}

func TestServiceTime(t *testing.T) {
	for _, tc := range []struct {
		name       string
		oneAtATime bool
		want       time.Duration
	}{
		{"commands run side by side", false, time.Second},
		{"commands take turns", true, 10 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := open(t, memdriver.Options{ServiceTime: time.Second, OneAtATime: tc.oneAtATime})
				start := time.Now()
				done := make(chan error)
				for range 10 {
					go func() { done <- probe(t.Context(), d) }()
				}
				for range 10 {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
				if took := time.Since(start); took != tc.want {
					t.Errorf("ten commands took %v, want %v", took, tc.want)
				}
			})
		})
	}
}

func TestFaultsOfTheDriver(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault func(*memdriver.Driver)
		ckr   string
		ended bool
	}{
		{"a crash", (*memdriver.Driver).Crash, "CKR_DEVICE_ERROR", true},
		{"a kill", (*memdriver.Driver).Kill, "CKR_DEVICE_ERROR", true},
		{"lost sessions", (*memdriver.Driver).LoseSessions, "CKR_SESSION_HANDLE_INVALID", false},
		{"an unplugged token", func(d *memdriver.Driver) { d.Token().Unplug() }, "CKR_DEVICE_ERROR", false},
		{"a token unplugged and plugged in again", func(d *memdriver.Driver) {
			d.Token().Unplug()
			_ = probe(context.Background(), d) // it notices
			d.Token().Plug()
		}, "CKR_DEVICE_ERROR", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := open(t, memdriver.Options{})
			id := pluginproto.KeyID{1}
			if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
				t.Fatal(err)
			}
			tc.fault(d)
			for range 2 {
				_, err := d.Inspect(t.Context(), id)
				if pluginproto.ClassOf(err) != pluginproto.ClassMember || pluginproto.CKRName(pluginproto.CKROf(err)) != tc.ckr {
					t.Errorf("error %v, want one of class member with %s", err, tc.ckr)
				}
			}
			select {
			case <-d.Done():
				if !tc.ended {
					t.Error("the driver has ended")
				}
			default:
				if tc.ended {
					t.Error("the driver has not ended")
				}
			}
			d.Token().Plug()
			again := open(t, memdriver.Options{Token: d.Token()})
			if _, err := again.Inspect(t.Context(), id); err != nil {
				t.Errorf("inspecting through a new driver: %v", err)
			}
			if again.PID() == d.PID() {
				t.Error("two drivers with one process id")
			}
		})
	}
}

func TestUnpluggedTokenIsNotPresent(t *testing.T) {
	d := memdriver.New(memdriver.Options{})
	d.Token().Unplug()
	if _, err := d.Open(t.Context(), openRequest()); pluginproto.CKROf(err) != pluginproto.CKRTokenNotPresent {
		t.Errorf("error %v, want CKR_TOKEN_NOT_PRESENT", err)
	}
}

func TestFaultsOfTheToken(t *testing.T) {
	d := open(t, memdriver.Options{})
	id := pluginproto.KeyID{1}
	made, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256})
	if err != nil {
		t.Fatal(err)
	}
	if !d.Token().Corrupt(id) {
		t.Fatal("there is no key to corrupt")
	}
	o, err := d.Inspect(t.Context(), id)
	if err != nil || string(o.CheckValue) == string(made.CheckValue) {
		t.Errorf("a corrupted key has check value %x (%v), as before", o.CheckValue, err)
	}
	if !d.Token().Lose(id) || len(d.Token().Keys()) != 0 {
		t.Error("the key is still there")
	}
	if d.Token().Lose(id) || d.Token().Corrupt(id) {
		t.Error("a key that is not there was lost or corrupted")
	}
}

// Who destroys a key and who corrupts it may be there at the same moment.
func TestAKeyThatIsCorruptedWhileItIsDestroyedStaysDestroyed(t *testing.T) {
	token := memdriver.NewToken("hsm-a")
	d := open(t, memdriver.Options{Token: token})
	for i := range 200 {
		id := pluginproto.KeyID{1, byte(i)}
		if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() { token.Corrupt(id) })
		both.Go(func() { token.Lose(id) })
		both.Wait()
		if keys := token.Keys(); len(keys) != 0 {
			t.Fatalf("on the token is %v", keys)
		}
	}
}

func TestWrongPINsAreCounted(t *testing.T) {
	token := memdriver.NewToken("hsm-a")
	token.SetPIN("9999")
	for range 2 {
		_, err := memdriver.New(memdriver.Options{Token: token}).Open(t.Context(), openRequest())
		if pluginproto.CKROf(err) != pluginproto.CKRPINIncorrect {
			t.Errorf("error %v, want CKR_PIN_INCORRECT", err)
		}
	}
	if n := token.PINTries(); n != 2 {
		t.Errorf("%d tries counted, want 2", n)
	}
}
