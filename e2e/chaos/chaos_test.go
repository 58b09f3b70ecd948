package chaos_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

var (
	driver   = flag.String("driver", "", "what the members are: softhsm or luna; \"\": a run with each")
	seed     = flag.Uint64("seed", fixedSeed, "the seed of the faults")
	faults   = flag.Int("faults", 0, "how many faults a run has; 0: as many as there are kinds")
	members  = flag.Int("members", 3, "how many members the group has")
	kinds    = flag.String("kinds", "", "only faults of these kinds, separated by commas; \"\" means all")
	planOnly = flag.Bool("plan", false, "print the plan of the seed and do nothing")
)

// fixedSeed is run by everybody: nobody's change is refused for another seed's faults. Who
// looks for faults draws seeds, see "make chaos".
const fixedSeed = 1

// bin is the folder with the programs; set by build, before anything is started.
var bin string

func TestMain(m *testing.M) {
	code := m.Run()
	if bin != "" {
		os.RemoveAll(bin)
	}
	os.Exit(code)
}

// build makes the programs once, without the race detector, as they are used.
func build(t *testing.T) {
	t.Helper()
	if bin != "" {
		return
	}
	// Not t.TempDir: the sockets of drivers are below it, and their paths have to be short.
	dir, err := os.MkdirTemp("", "kmsd-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	if err := devserver.Build(t.Context(), dir, map[string]string{
		"chaos-driver": "kmsd/e2e/chaos/driver", "kmsd-driver-luna": "kmsd/plugins/luna",
	}); err != nil {
		os.RemoveAll(dir)
		t.Fatal(err)
	}
	bin = dir
}

// plans are those that the flags ask for.
func plans(t *testing.T) (all []chaos.Plan) {
	t.Helper()
	var only []chaos.Kind
	for k := range strings.SplitSeq(*kinds, ",") {
		if k != "" {
			only = append(only, chaos.Kind(k))
		}
	}
	drivers := []chaos.Driver{chaos.Driver(*driver)}
	if *driver == "" {
		drivers = []chaos.Driver{chaos.SoftHSM, chaos.Luna}
	}
	for _, d := range drivers {
		n := *faults
		if n == 0 {
			n = len(chaos.Kinds(d))
		}
		plan, err := chaos.New(d, *seed, n, *members, only...)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, plan)
	}
	return all
}

// TestChaos carries out the faults of a seed while programs wrap, unwrap and sign and
// operators make, rotate and destroy keys, and then checks every promise.
func TestChaos(t *testing.T) {
	all := plans(t)
	if !*planOnly {
		build(t)
	}
	for _, plan := range all {
		if *planOnly {
			t.Log(plan)
			continue
		}
		t.Run(fmt.Sprintf("%s seed %d", plan.Driver, plan.Seed), func(t *testing.T) { carryOut(t, plan) })
	}
}

// carryOut is one run.
func carryOut(t *testing.T, plan chaos.Plan) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to try it again: make chaos DRIVER=%s SEED=%d FAULTS=%d MEMBERS=%d\n%v", plan.Driver, plan.Seed, len(plan.Steps), plan.Members, plan)
		}
	})
	s := newSite(t, plan.Driver, plan.Members, plan.Seed)
	history := new(chaos.History)
	load := startLoad(t, s, history)
	begin := time.Now()
	done := s.suffer(t, plan)
	took := time.Since(begin)
	load.end()
	t.Logf("seed %d:\n%v", plan.Seed, &s.report)

	final := s.inspect(t, load)
	final.Stalls = load.stalls
	for what, n := range failures(t, s.server.Log) {
		t.Logf("kmsd said %d times: %s", n, what)
	}
	noneIsLeft(t, stepTime)
	requests := history.Requests()
	t.Logf("seed %d: %d faults in %v, %v; the test itself stood still %d times, at most %v", plan.Seed, done, took.Round(time.Second),
		summary(requests), len(final.Stalls), worst(final.Stalls))
	for i, v := range chaos.Check(requests, final) {
		if i == 40 {
			t.Errorf("and more")
			break
		}
		t.Error(v)
	}
}

// stepTime is how long a fault may take with everything until the group is whole
// again.
const stepTime = time.Minute

// suffer carries out the steps of a plan in their order, each as soon as the member
// it hurts is whole and another one stays so, and returns how many there were when
// the last has been healed.
func (s *site) suffer(t *testing.T, plan chaos.Plan) (begun int) {
	hurt := newTriage(plan.Members)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, step := range plan.Steps {
		turn, done := timeout(t, stepTime)
		err := hurt.take(turn, step.Hurts(plan.Members))
		done()
		if err != nil {
			t.Errorf("fault %d, %v, never had its turn: %v", i+1, step, err)
			return begun
		}
		ctx, cancel := timeout(t, stepTime)
		s.report.begin()
		suffered := func() {
			defer cancel()
			defer hurt.giveBack(step.Hurts(plan.Members))
			begin := time.Now()
			err := carry[step.Kind](ctx, s, step)
			failed := s.hadFailed(step.Hurts(plan.Members))
			s.report.healed(step.Kind, time.Since(begin), failed)
			if failed && !step.Kind.Permanent() {
				t.Errorf("fault %d at %s, %v: the member was failed, as if somebody had to mend it", i+1, begin.Format(clock), step)
			}
			s.report.weigh(s.pid())
			if err != nil {
				t.Errorf("fault %d at %s, %v: after %v: %v", i+1, begin.Format(clock), step, time.Since(begin).Round(time.Millisecond), err)
			}
			if testing.Verbose() {
				t.Logf("%s fault %3d %v: whole after %v", begin.Format(clock), i+1, step, time.Since(begin).Round(time.Millisecond))
			}
		}
		if step.Kind == chaos.KillDaemon || step.Kind == chaos.FreezeDaemon {
			suffered() // there is one kmsd, and it has to serve before the next
		} else {
			wg.Go(suffered)
		}
		begun++
		pause(ctx, step.Pause)
	}
	return begun
}

// triage sees to it that nobody is hurt twice at a time and one member stays whole, unless
// all are to be hurt.
type triage struct {
	members int

	mu      sync.Mutex // guards the rest
	hurt    map[int]bool
	changed chan struct{} // closed and made anew when somebody is whole again
}

func newTriage(members int) *triage {
	return &triage{members: members, hurt: map[int]bool{}, changed: make(chan struct{})}
}

// take waits until all of these may be hurt, and counts them as such.
func (q *triage) take(ctx context.Context, them []int) error {
	for {
		changed, ok := q.tryTake(them)
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (q *triage) tryTake(them []int) (changed chan struct{}, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if all := len(them) == q.members; len(q.hurt)+len(them) >= q.members && !(all && len(q.hurt) == 0) {
		return q.changed, false
	}
	for _, m := range them {
		if q.hurt[m] {
			return q.changed, false
		}
	}
	for _, m := range them {
		q.hurt[m] = true
	}
	return nil, true
}

func (q *triage) giveBack(them []int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, m := range them {
		delete(q.hurt, m)
	}
	close(q.changed)
	q.changed = make(chan struct{})
}

// timeout is a context that ends after that time, or with the test.
func timeout(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// summary counts requests and says how they ended and how long they took.
func summary(requests []chaos.Request) string {
	ends, longest := map[api.Code]int{}, chaos.Request{}
	for _, r := range requests {
		if r.Code != "" {
			ends[r.Code]++
		}
		if r.End.Sub(r.Start) > longest.End.Sub(longest.Start) {
			longest = r
		}
	}
	return fmt.Sprintf("%d requests, refused %v, the longest a %s of %v at %s", len(requests), ends, longest.Op,
		longest.End.Sub(longest.Start).Round(time.Millisecond), longest.Start.Format(clock))
}

func worst(stalls []chaos.Stall) (d time.Duration) {
	for _, s := range stalls {
		d = max(d, s.To.Sub(s.From))
	}
	return d
}

// clock is how moments are shown.
const clock = "15:04:05.000"
