package supervisor_test

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/supervisor"
	"kmsd/pluginproto"
)

// commandTimeout is what a group gives its members for an answer unless it is told
// otherwise: who waited for one of them waited as long, on a machine of any speed.
const commandTimeout = 20 * time.Second

// startTimeout is how long a driver has until the handshake.
const startTimeout = 25 * time.Second

// patience is for what has to happen at some time, on a machine of any speed.
const patience = time.Minute

// moves is what a group tells of its members.
type moves chan api.Event

// await waits until a member, or the group where there is none, has gone to a state, and
// returns why it did.
func (m moves) await(t *testing.T, member, state string) (cause string) {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case e := <-m:
			if (e.Type == api.EventMember || e.Type == api.EventGroup) && e.Member == member && e.To == state {
				return e.Cause
			}
		case <-late:
			t.Fatalf("%s is not %s after %v", cmp.Or(member, "the group"), state, patience)
		}
	}
}

// startGroup starts a group of three driver processes.
func startGroup(t *testing.T) (*group.Group, moves) {
	t.Helper()
	path := program(t, "driver")
	told := make(moves, 1000)
	cfg := group.Config{Name: "g", Hedge: true, OnEvent: func(e api.Event) { told <- e }}
	var mu sync.Mutex // guards started
	var started []*supervisor.Process
	t.Cleanup(func() { // a group does not wait for long for the end of a process
		mu.Lock()
		defer mu.Unlock()
		for _, p := range started {
			p.Kill()
			<-p.Done()
		}
	})
	for _, name := range []string{"a", "b", "c"} {
		cfg.Members = append(cfg.Members, group.MemberConfig{Name: name, Driver: "mem", Connect: func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
			p, err := supervisor.Start(ctx, supervisor.Spec{Name: name, Path: path, Insecure: true})
			if err != nil {
				return nil, pluginproto.TokenInfo{}, err
			}
			mu.Lock()
			started = append(started, p)
			mu.Unlock()
			info, err := p.Open(ctx, pluginproto.OpenRequest{PIN: []byte("1234"), Domain: make([]byte, 32)})
			if err != nil {
				p.Kill()
				return nil, pluginproto.TokenInfo{}, err
			}
			info.Serial = name // each process has a token of its own
			return p, info, nil
		}})
	}
	g, err := group.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	told.await(t, "", string(api.GroupNormal)) // Start waits for nobody who is much slower than the first
	return g, told
}

// load runs commands until stop is called, which returns how many there were and
// the slowest of them.
func load(t *testing.T, g *group.Group, callers int) (stop func() (int64, time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var done, slowest atomic.Int64
	for range callers {
		wg.Go(func() {
			next := time.NewTicker(5 * time.Millisecond) // to leave the drivers some of the machine
			defer next.Stop()
			for ; ctx.Err() == nil; <-next.C {
				began := time.Now()
				_, err := g.Do(context.WithoutCancel(ctx), pluginproto.Command{Op: pluginproto.OpRandom, Length: 32})
				if err != nil {
					t.Errorf("a command failed: %v", err)
				}
				took := int64(time.Since(began))
				for was := slowest.Load(); took > was && !slowest.CompareAndSwap(was, took); was = slowest.Load() {
				}
				done.Add(1)
			}
		})
	}
	stop = sync.OnceValues(func() (int64, time.Duration) {
		cancel()
		wg.Wait()
		return done.Load(), time.Duration(slowest.Load())
	})
	t.Cleanup(func() { stop() })
	return stop
}

func pidOf(t *testing.T, g *group.Group, member string) int {
	t.Helper()
	for _, m := range g.Status().Members {
		if m.Name == member && m.DriverPID != 0 {
			return m.DriverPID
		}
	}
	t.Fatalf("member %s has no process", member)
	return 0
}

func signal(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

func TestAGroupOfProcessesLosesNoCommandWhenOneIsKilled(t *testing.T) {
	g, told := startGroup(t)
	stop := load(t, g, 8)
	for _, member := range []string{"a", "b", "c"} {
		killed := time.Now()
		signal(t, pidOf(t, g, member), syscall.SIGKILL)
		if cause := told.await(t, member, string(api.MemberDown)); strings.Contains(cause, "answer") {
			t.Errorf("the end of member %s was found out by waiting for it: %s", member, cause)
		}
		told.await(t, member, string(api.MemberActive))
		t.Logf("member %s was back after %v", member, time.Since(killed).Round(time.Millisecond))
	}
	wantServed(t, stop)
}

func TestAGroupOfProcessesLosesNoCommandWhenOneIsStopped(t *testing.T) {
	g, told := startGroup(t)
	stop := load(t, g, 8)
	pid := pidOf(t, g, "a")
	signal(t, pid, syscall.SIGSTOP)
	told.await(t, "a", string(api.MemberProbing))
	signal(t, pid, syscall.SIGCONT)
	told.await(t, "a", string(api.MemberActive))
	wantServed(t, stop)
	if got := pidOf(t, g, "a"); got != pid {
		t.Errorf("the process is another one: %d, was %d", got, pid)
	}
}

// wantServed ends a load of which no command may have waited for a member to be given up.
func wantServed(t *testing.T, stop func() (int64, time.Duration)) {
	t.Helper()
	n, slowest := stop()
	t.Logf("%d commands, the slowest took %v", n, slowest)
	if n == 0 || slowest >= commandTimeout {
		t.Errorf("the slowest of %d commands took %v, want less than the command timeout, %v", n, slowest, commandTimeout)
	}
}

func ExampleStart() {
	_, err := supervisor.Start(context.Background(), supervisor.Spec{Name: "hsm-a", Path: "/usr/lib/kmsd/drivers/kmsd-driver-none", Insecure: true})
	fmt.Println(err)
	// Output: starting driver kmsd-driver-none of member hsm-a: fork/exec /usr/lib/kmsd/drivers/kmsd-driver-none: no such file or directory
}
