package luna_test

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// Keys of every kind come to every member by the best protocol that the partitions share.
func TestKeysAreReplicatedByEachProtocol(t *testing.T) {
	tests := []struct {
		protocol string
		members  []lunasim.Options
	}{
		{"cpv4", []lunasim.Options{{}, {}, {}}},
		{"cpv3", []lunasim.Options{{Firmware: "7.7.1"}, {}, {Firmware: "7.7.0"}}},
		{"cpv1", []lunasim.Options{{Firmware: "7.4.0"}, {Firmware: "7.0.3"}}},
		{"cpv1-7.7", []lunasim.Options{{Policies: map[int]int{42: 1}}, {Policies: map[int]int{42: 1}}}},
		{"sim", []lunasim.Options{{Kind: "sim"}, {Kind: "sim"}}},
	}
	for _, tt := range tests {
		t.Run(tt.protocol, func(t *testing.T) {
			s := start(t, tt.members...)
			s.create("shop", "")
			s.create("small", "aes-128")
			s.create("signer", "ec-p256")
			s.works("shop")
			if _, err := s.c.Rotate(t.Context(), "shop"); err != nil {
				t.Fatal(err)
			}
			s.awaitWhole()
			s.sameKeys(4)
			for _, m := range s.members {
				if facts := s.now(m.name).Token.Facts; !said(facts, "cloning", tt.protocol) {
					t.Errorf("%s says %+v, want that it clones by %s", m.name, facts, tt.protocol)
				}
			}
			if out, _, code := s.cli("group", "check"); code != 0 {
				t.Errorf("group check ends with %d:\n%s", code, out)
			}
		})
	}
}

// said looks for a fact whose value has that text.
func said(facts []api.Fact, name, text string) bool {
	for _, f := range facts {
		if f.Name == name && strings.Contains(f.Value, text) {
			return true
		}
	}
	return false
}

// Nobody notices that drivers are killed; what was made and destroyed meanwhile is made good
// before the member serves again, also when kmsd was killed in between.
func TestAMemberThatReturnsIsBroughtInStep(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{}, lunasim.Options{})
	s.create("shop", "")
	s.create("doomed", "")
	away := s.members[1]

	end := s.load("shop")
	for _, m := range s.members {
		pid := s.now(m.name).DriverPID
		kill(t, pid)
		s.create("made-without-"+m.name, "")
		s.await(m.name, "back", func(now api.Member) bool { return whole(now) && now.DriverPID != pid })
	}
	end()

	away.partition.Set("activated", "no")
	s.await(away.name, "down", down)
	s.create("made-meanwhile", "ec-p256")
	if _, err := s.c.Destroy(t.Context(), "doomed", 0); err != nil {
		t.Fatal(err)
	}
	s.server.Kill()
	s.serve()
	away.partition.Set("activated", "yes")
	s.awaitWhole()
	s.sameKeys(5)
	if v, err := s.c.Verify(t.Context(), "made-meanwhile"); err != nil || !v.OK || len(v.Copies) != 3 {
		t.Errorf("verifying the key that was made meanwhile: %+v, %v", v, err)
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("killing process %d: %v", pid, err)
	}
}

// load wraps and unwraps all the time, with a few programs, until end is called, which
// checks that nothing failed.
func (s *site) load(key string) (end func()) {
	var (
		wg       sync.WaitGroup
		stop     atomic.Bool
		requests atomic.Int64
		failure  atomic.Pointer[error]
	)
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				wrapped, err := s.c.Wrap(s.t.Context(), key, random(32), nil)
				if err == nil {
					_, err = s.c.Unwrap(s.t.Context(), key, wrapped, nil)
				}
				requests.Add(2)
				if err != nil {
					failure.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	return func() {
		s.t.Helper()
		stop.Store(true)
		wg.Wait()
		s.t.Logf("%d requests", requests.Load())
		if err := failure.Load(); err != nil {
			s.t.Errorf("a request failed: %v", *err)
		}
	}
}

var many = flag.Int("keys", 200, "how many keys a member that was away has missed")

// Many keys reach a member that was away in transfers of many keys.
func TestManyKeysReachAMemberThatWasAway(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{})
	away := s.members[1]
	away.partition.Set("activated", "no")
	kill(t, s.now(away.name).DriverPID)
	s.await(away.name, "down", down)
	const programs = 8
	keys := *many
	begin := time.Now()
	var wg sync.WaitGroup
	for p := range programs {
		wg.Go(func() {
			for i := range keys / programs {
				name := fmt.Sprintf("key-%d-%d", p, i)
				if _, err := s.c.CreateMasterKey(t.Context(), name, api.KeyOptions{MinCopies: 1}); err != nil {
					t.Errorf("creating key %s: %v", name, err)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d keys made in %v", keys, time.Since(begin))

	// A fault that does nothing counts the calls.
	counted := map[string]*lunasim.Armed{}
	for _, call := range []string{"CA_MigrationStartSessionNegotiation", "CA_Insert"} {
		counted[call] = away.partition.Arm(lunasim.Fault{What: lunasim.Sleep, Function: call, Times: lunasim.Forever})
	}
	begin = time.Now()
	away.partition.Set("activated", "yes")
	ctx, cancel := context.WithTimeout(t.Context(), soon+time.Duration(keys)*time.Second/10)
	defer cancel()
	if _, err := devserver.AwaitWhole(ctx, s.c); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	tunnels, inserts := counted["CA_MigrationStartSessionNegotiation"].Fired(), counted["CA_Insert"].Fired()
	t.Logf("%d keys came in %v, with %d tunnels and %d calls of CA_Insert", keys, took, tunnels, inserts)
	// The double looks at all its objects for each that comes, and answers nobody else
	// meanwhile, so transfers become smaller the more there are and the slower the machine
	// is, down to two keys. One by one they would be twice as many.
	if most := keys / 2; inserts == 0 || inserts > most || tunnels > most {
		t.Errorf("%d keys took %d tunnels and %d calls of CA_Insert, want at most %d transfers", keys, tunnels, inserts, most)
	}
	s.sameKeys(keys)
}
