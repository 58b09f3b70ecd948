package pluginproto_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/drivertest"
	"kmsd/internal/leaktest"
	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) {
	if serveWhenAsked() {
		return
	}
	leaktest.Main(m)
}

var (
	probe  = pluginproto.Command{Op: pluginproto.OpProbe}
	random = pluginproto.Command{Op: pluginproto.OpRandom, Length: 16}
)

// behindWall runs a test in a bubble of its own time, with a memory driver behind a
// real gRPC connection.
func behindWall(t *testing.T, server pluginproto.ServerOptions, test func(*testing.T, *memdriver.Driver, *drivertest.Wall)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := memdriver.New(memdriver.Options{})
		wall := drivertest.NewWall(t, d, server, pluginproto.ClientOptions{})
		if _, err := wall.Open(t.Context(), openRequest()); err != nil {
			t.Fatalf("opening the token: %v", err)
		}
		test(t, d, wall)
	})
}

// hang makes the calls that f fits hang until the test ends.
func hang(t *testing.T, d *memdriver.Driver, f memdriver.Fault) {
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	f.Hang = release
	d.Script(f)
}

// timed runs fn and says how long it took.
func timed(fn func() error) (time.Duration, error) {
	start := time.Now()
	err := fn()
	return time.Since(start), err
}

func do(ctx context.Context, d pluginproto.Driver, cmd pluginproto.Command) error {
	_, err := d.Do(ctx, cmd)
	return err
}

func wantMember(t *testing.T, err error, text string) {
	t.Helper()
	if pluginproto.ClassOf(err) != pluginproto.ClassMember || pluginproto.CKROf(err) != pluginproto.CKRDeviceError {
		t.Errorf("error %v, want one of class member with CKR_DEVICE_ERROR", err)
	}
	if err != nil && !strings.Contains(err.Error(), text) {
		t.Errorf("error %q does not say %q", err, text)
	}
}

func between(t *testing.T, took, least, most time.Duration) {
	t.Helper()
	if took < least || took > most {
		t.Errorf("it took %v, want %v to %v", took, least, most)
	}
}

func TestSilence(t *testing.T) {
	none := pluginproto.ServerOptions{}
	t.Run("a command on a dead device ends after the command timeout", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{})
			took, err := timed(func() error { return do(t.Context(), wall, random) })
			wantMember(t, err, "no sign of life from the token for 20s")
			between(t, took, 20*time.Second, 20*time.Second)
		})
	})
	t.Run("heartbeats keep a long command going", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			d.Script(memdriver.Fault{Op: pluginproto.OpRandom, Delay: 3 * time.Minute})
			took, err := timed(func() error { return do(t.Context(), wall, random) })
			if err != nil {
				t.Error(err)
			}
			between(t, took, 3*time.Minute, 3*time.Minute)
		})
	})
	t.Run("heartbeats tell when the driver was last heard", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			if heard := wall.LastHeard(); !heard.IsZero() {
				t.Errorf("heard at %v, before anything was asked", heard)
			}
			d.Script(memdriver.Fault{Op: pluginproto.OpRandom, Delay: time.Minute})
			go do(t.Context(), wall, random)
			<-time.After(30 * time.Second)
			synctest.Wait()
			between(t, time.Since(wall.LastHeard()), 0, 2*time.Second)
			hang(t, d, memdriver.Fault{Op: pluginproto.OpProbe})
			<-time.After(20 * time.Second)
			between(t, time.Since(wall.LastHeard()), 18*time.Second, 22*time.Second)
			<-time.After(20 * time.Second)
		})
	})
	t.Run("the last heartbeat counts, not the first", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Op: pluginproto.OpRandom})
			time.AfterFunc(time.Minute, func() { hang(t, d, memdriver.Fault{Op: pluginproto.OpProbe}) })
			took, err := timed(func() error { return do(t.Context(), wall, random) })
			wantMember(t, err, "no sign of life")
			between(t, took, 78*time.Second, 82*time.Second)
		})
	})
	t.Run("a failed probe is no heartbeat", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Op: pluginproto.OpRandom})
			d.Script(memdriver.Fault{Op: pluginproto.OpProbe, Err: &pluginproto.Error{Class: pluginproto.ClassMember}})
			took, err := timed(func() error { return do(t.Context(), wall, random) })
			wantMember(t, err, "no sign of life")
			between(t, took, 20*time.Second, 20*time.Second)
		})
	})
	t.Run("the cap ends a command that beats for ever", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Op: pluginproto.OpRandom})
			took, err := timed(func() error { return do(t.Context(), wall, random) })
			wantMember(t, err, "not done after 10m0s")
			between(t, took, 10*time.Minute, 10*time.Minute)
		})
	})
	t.Run("a rare call is kept going by probes", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			d.Script(memdriver.Fault{Call: memdriver.CallList, Delay: 3 * time.Minute})
			took, err := timed(func() error { _, err := wall.List(t.Context()); return err })
			if err != nil {
				t.Error(err)
			}
			between(t, took, 3*time.Minute, 3*time.Minute)
		})
	})
	t.Run("a rare call on a dead device ends after the command timeout", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{})
			took, err := timed(func() error { _, err := wall.List(t.Context()); return err })
			wantMember(t, err, "listing the keys: CKR_DEVICE_ERROR: no answer and no sign of life")
			between(t, took, 20*time.Second, 24*time.Second)
		})
	})
	t.Run("the cap ends a rare call", func(t *testing.T) {
		behindWall(t, none, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Call: memdriver.CallGenerate})
			spec := pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256}
			took, err := timed(func() error { _, err := wall.Generate(t.Context(), spec); return err })
			wantMember(t, err, "not done after 10m0s")
			between(t, took, 10*time.Minute, 10*time.Minute+4*time.Second)
		})
	})
	t.Run("opening a dead device ends after three times the command timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			d := memdriver.New(memdriver.Options{})
			hang(t, d, memdriver.Fault{})
			wall := drivertest.NewWall(t, d, none, pluginproto.ClientOptions{})
			took, err := timed(func() error { _, err := wall.Open(t.Context(), openRequest()); return err })
			wantMember(t, err, "opening the token: CKR_DEVICE_ERROR: no answer")
			between(t, took, time.Minute, time.Minute)
		})
	})
}

func TestContexts(t *testing.T) {
	one := pluginproto.ServerOptions{Workers: 1}
	t.Run("a command that waits for a worker past its deadline is not run", func(t *testing.T) {
		behindWall(t, one, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			d.Script(memdriver.Fault{Op: pluginproto.OpRandom, Times: 1, Delay: 5 * time.Second})
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := do(t.Context(), wall, random); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait() // it has the only worker
			before := d.Calls(memdriver.CallDo)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			took, err := timed(func() error { return do(ctx, wall, random) })
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want a deadline", err)
			}
			between(t, took, time.Second, time.Second)
			d.Clear()
			wg.Wait()
			// Only the heartbeats' probes have come since.
			if err := do(t.Context(), wall, random); err != nil {
				t.Error(err)
			}
			if n := d.Calls(memdriver.CallDo) - before; n > 3 {
				t.Errorf("%d commands were run, want one and up to two probes", n)
			}
		})
	})
	t.Run("a caller that leaves ends its command in the driver", func(t *testing.T) {
		behindWall(t, one, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Op: pluginproto.OpRandom, Times: 1})
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			took, err := timed(func() error { return do(ctx, wall, random) })
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want a cancellation", err)
			}
			between(t, took, time.Second, time.Second)
			took, err = timed(func() error { return do(t.Context(), wall, random) })
			if err != nil {
				t.Errorf("the only worker is not free: %v", err)
			}
			between(t, took, 0, 0)
		})
	})
	t.Run("a probe does not wait for a worker", func(t *testing.T) {
		behindWall(t, one, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{Op: pluginproto.OpRandom})
			go do(t.Context(), wall, random)
			synctest.Wait()
			took, err := timed(func() error { return do(t.Context(), wall, probe) })
			if err != nil {
				t.Error(err)
			}
			between(t, took, 0, 0)
		})
	})
}

func TestLoss(t *testing.T) {
	t.Run("a lost connection fails everything that waits, at once", func(t *testing.T) {
		behindWall(t, pluginproto.ServerOptions{Workers: 2}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			hang(t, d, memdriver.Fault{})
			errs := make(chan error)
			calls := 10
			for range calls {
				go func() { errs <- do(t.Context(), wall, random) }()
			}
			go func() { _, err := wall.List(t.Context()); errs <- err }()
			synctest.Wait()
			start := time.Now()
			go wall.Cut()
			for range calls + 1 {
				wantMember(t, <-errs, "the driver process is gone")
			}
			between(t, time.Since(start), 0, 0)
			wantMember(t, do(t.Context(), wall, probe), "probing the token: CKR_DEVICE_ERROR: the driver process is gone")
			_, err := wall.Inspect(t.Context(), pluginproto.KeyID{1})
			wantMember(t, err, "the driver process is gone")
		})
	})
	t.Run("nothing is answered after Close", func(t *testing.T) {
		behindWall(t, pluginproto.ServerOptions{}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			for range 2 {
				if err := wall.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if err := do(t.Context(), wall, probe); pluginproto.ClassOf(err) != pluginproto.ClassMember {
				t.Errorf("error %v, want one of class member", err)
			}
		})
	})
	t.Run("nothing is answered before Open", func(t *testing.T) {
		wall := drivertest.NewWall(t, memdriver.New(memdriver.Options{}), pluginproto.ServerOptions{}, pluginproto.ClientOptions{})
		if err := do(t.Context(), wall, probe); pluginproto.ClassOf(err) != pluginproto.ClassMember {
			t.Errorf("error %v, want one of class member", err)
		}
	})
	t.Run("a driver is opened once", func(t *testing.T) {
		behindWall(t, pluginproto.ServerOptions{}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			if _, err := wall.Open(t.Context(), openRequest()); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("error %v, want one of class caller", err)
			}
		})
	})
}

func TestErrorsCrossTheWall(t *testing.T) {
	for _, want := range []*pluginproto.Error{
		{Class: pluginproto.ClassUnknown, CKR: 0x80000001, Op: "guessing"},
		{Class: pluginproto.ClassCaller, CKR: 0x7, Op: "asking", Msg: "ask for something else"},
		{Class: pluginproto.ClassNotFound, Op: "looking"},
		{Class: pluginproto.ClassBusy, CKR: 0xB1, Op: "waiting"},
		{Class: pluginproto.ClassMember, CKR: 0xA0, Op: "logging in", Msg: "set the right PIN", Permanent: true},
	} {
		t.Run(want.Class.String(), func(t *testing.T) {
			behindWall(t, pluginproto.ServerOptions{}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
				d.Script(memdriver.Fault{Err: want})
				_, rare := wall.Inspect(t.Context(), pluginproto.KeyID{1})
				for _, err := range []error{rare, do(t.Context(), wall, random)} {
					var got *pluginproto.Error
					if !errors.As(err, &got) || *got != *want {
						t.Errorf("got %#v, want %#v", got, want)
					}
				}
			})
		})
	}
	t.Run("what is wrapped around an error stays in front of it", func(t *testing.T) {
		behindWall(t, pluginproto.ServerOptions{}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			d.Script(memdriver.Fault{Err: errors.Join(
				errors.New("after the first try"),
				&pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "trying"},
			)})
			err := do(t.Context(), wall, random)
			if want := "after the first try\ntrying: CKR_DEVICE_MEMORY"; err == nil || err.Error() != want || pluginproto.ClassOf(err) != pluginproto.ClassBusy {
				t.Errorf("error %v, want %q", err, want)
			}
		})
	})
	t.Run("an error without class is unknown, never absence", func(t *testing.T) {
		behindWall(t, pluginproto.ServerOptions{}, func(t *testing.T, d *memdriver.Driver, wall *drivertest.Wall) {
			d.Script(memdriver.Fault{Err: errors.New("something \xff odd")})
			_, err := wall.Inspect(t.Context(), pluginproto.KeyID{1})
			if pluginproto.ClassOf(err) != pluginproto.ClassUnknown || !strings.Contains(err.Error(), "something \uFFFD odd") {
				t.Errorf("error %v, want the text and class unknown", err)
			}
		})
	})
}
