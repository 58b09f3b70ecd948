package supervisor_test

import (
	"context"
	"fmt"
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

// What a group gives its members unless it is told otherwise: who waited for one of them
// waited as long, on a machine of any speed.
const (
	probeInterval  = 2 * time.Second  // in which a member has to say something
	commandTimeout = 20 * time.Second // for an answer
)

// patience is for a process to start or to end; it is how long a driver has until the
// handshake.
const patience = 10 * time.Second

// moves is what a group tells of its members.
type moves chan api.Event

// await waits until a member has gone to a state.
func (m moves) await(t *testing.T, member string, state api.MemberState, within time.Duration) {
	t.Helper()
	late := time.After(within)
	for {
		select {
		case e := <-m:
			if e.Member == member && e.To == string(state) {
				return
			}
		case <-late:
			t.Fatalf("member %s is not %s after %v", member, state, within)
		}
	}
}

// startGroup starts a group of three driver processes.
func startGroup(t *testing.T, probeInterval time.Duration) (*group.Group, moves) {
	t.Helper()
	path := program(t, "driver")
	told := make(moves, 1000)
	cfg := group.Config{
		Name: "g", ProbeInterval: probeInterval, Hedge: true,
		OnEvent: func(e api.Event) { told <- e },
	}
	for _, name := range []string{"a", "b", "c"} {
		cfg.Members = append(cfg.Members, group.MemberConfig{Name: name, Driver: "mem", Connect: func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
			p, err := supervisor.Start(ctx, supervisor.Spec{Name: name, Path: path, Insecure: true})
			if err != nil {
				return nil, pluginproto.TokenInfo{}, err
			}
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
	if s := g.Status().State; s != api.GroupNormal {
		t.Fatalf("the group starts %s: %+v", s, g.Status().Members)
	}
	for n := 0; n < 3; { // what is told of the start is no news
		if e := <-told; e.Type == "member" && e.To == string(api.MemberActive) {
			n++
		}
	}
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
			for ctx.Err() == nil {
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
	return sync.OnceValues(func() (int64, time.Duration) {
		cancel()
		wg.Wait()
		return done.Load(), time.Duration(slowest.Load())
	})
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
	g, told := startGroup(t, 0)
	stop := load(t, g, 8)
	for _, member := range []string{"a", "b", "c"} {
		killed := time.Now()
		signal(t, pidOf(t, g, member), syscall.SIGKILL)
		told.await(t, member, api.MemberDown, probeInterval) // no probe has to miss it
		told.await(t, member, api.MemberActive, patience)
		t.Logf("member %s was back after %v", member, time.Since(killed).Round(time.Millisecond))
	}
	n, slowest := stop()
	t.Logf("%d commands, the slowest took %v", n, slowest)
	if n == 0 || slowest > probeInterval {
		t.Errorf("the slowest of %d commands took %v, want less than a silent member would have had, %v", n, slowest, probeInterval)
	}
}

func TestAGroupOfProcessesLosesNoCommandWhenOneIsStopped(t *testing.T) {
	const interval = 300 * time.Millisecond
	g, told := startGroup(t, interval)
	stop := load(t, g, 8)
	pid := pidOf(t, g, "a")
	signal(t, pid, syscall.SIGSTOP)
	told.await(t, "a", api.MemberProbing, 10*interval)
	signal(t, pid, syscall.SIGCONT)
	told.await(t, "a", api.MemberActive, patience)
	n, slowest := stop()
	t.Logf("%d commands, the slowest took %v", n, slowest)
	if n == 0 || slowest > commandTimeout/4 {
		t.Errorf("the slowest of %d commands took %v, want far less than the command timeout, %v", n, slowest, commandTimeout)
	}
	if got := pidOf(t, g, "a"); got != pid {
		t.Errorf("the process is another one: %d, was %d", got, pid)
	}
}

func ExampleStart() {
	_, err := supervisor.Start(context.Background(), supervisor.Spec{Name: "hsm-a", Path: "/usr/lib/kmsd/drivers/kmsd-driver-none", Insecure: true})
	fmt.Println(err)
	// Output: starting driver kmsd-driver-none of member hsm-a: fork/exec /usr/lib/kmsd/drivers/kmsd-driver-none: no such file or directory
}
