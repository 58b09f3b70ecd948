package group_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
)

func hedged(c *group.Config) { c.Hedge = true }

// load is what callers do to a group and how long they had to wait.
type load struct {
	r  *rig
	wg sync.WaitGroup

	mu      sync.Mutex // guards what follows
	sent    int
	longest time.Duration
}

// one sends one command.
func (l *load) one() {
	began := time.Now()
	if _, err := l.r.do(); err != nil {
		l.r.t.Errorf("a command failed: %v", err)
	}
	took := time.Since(began)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent++
	l.longest = max(l.longest, took)
}

// callers sends commands, each when the one before is answered, until stop is closed.
func (l *load) callers(n int, stop <-chan struct{}) {
	for range n {
		l.wg.Go(func() {
			for !closed(stop) {
				l.one()
			}
		})
	}
}

// arrivals sends a command in each interval, whatever became of the others.
func (l *load) arrivals(every time.Duration, stop <-chan struct{}) {
	l.wg.Go(func() {
		for !closed(stop) {
			l.wg.Go(l.one)
			elapse(every)
		}
	})
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestW1_AMemberThatFreezesDelaysNoCommandBy50Milliseconds: with a Luna client it is 20 s.
func TestW1_AMemberThatFreezesDelaysNoCommandBy50Milliseconds(t *testing.T) {
	for _, c := range []struct {
		name    string
		callers int
		every   time.Duration // between arrivals
		service time.Duration // of an HSM that does one command at a time
		both    bool          // two of the three freeze at once
	}{
		{"64 callers and a thousand commands a second", 64, time.Millisecond, 300 * time.Microsecond, false},
		{"200 callers, a third of whose commands are on it", 200, time.Second, 150 * time.Microsecond, false},
		{"one caller", 1, time.Second, time.Millisecond, false},
		{"a thousand commands a second on HSMs that are nearly idle", 0, time.Millisecond, 20 * time.Microsecond, false},
		{"commands that take a while", 16, 10 * time.Millisecond, time.Millisecond, false},
		{"two of three members freeze at once", 32, 10 * time.Millisecond, 300 * time.Microsecond, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, hedged).start()
				for _, h := range r.hsms {
					h.set(func(h *hsm) { h.turn, h.delay = make(chan struct{}, 1), c.service })
				}
				stop := make(chan struct{})
				l := &load{r: r}
				l.callers(c.callers, stop)
				l.arrivals(c.every, stop)
				dice := rand.New(rand.NewPCG(1, 1))
				for i := range 6 { // at any moment, and longer each time, until it is found silent
					elapse(time.Duration(100_000+dice.IntN(100_000)) * time.Microsecond)
					first := dice.IntN(3)
					frozen := []*hsm{r.hsms[three[first]], r.hsms[three[(first+1)%3]]}
					if !c.both {
						frozen = frozen[:1]
					}
					for _, h := range frozen {
						h.freeze()
					}
					elapse(50 * time.Millisecond << i)
					for _, h := range frozen {
						h.thaw()
					}
				}
				close(stop)
				l.wg.Wait()
				if l.longest >= 50*time.Millisecond {
					t.Errorf("the longest of %d commands took %v", l.sent, l.longest)
				}
				t.Logf("%d commands, longest %v", l.sent, l.longest)
				elapse(10 * time.Second)
				r.wantGroup(api.GroupNormal)
			})
		})
	}
}

func TestHedgingAddsAtMostFivePercentWhenAllMembersAreSlow(t *testing.T) {
	const reserve = 10
	// A member that does one thing at a time and answers nobody for twice the p99 of such
	// silences is mistaken, about once in ten runs of 1,100 commands, for one that hangs:
	// its probe waits in the queue too. Its queue moves at once, and is paid for by the
	// hedges of the next 1,000 commands, some of which come after the end. So many may be
	// taken in advance.
	const mistaken = 50
	ms := func(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }
	for _, c := range []struct {
		name    string
		members int
		callers int
		alone   bool // one command at a time
		work    func(dice *rand.Rand) time.Duration
	}{
		{"always the same", 3, 8, false, func(*rand.Rand) time.Duration { return ms(30) }},
		{"always the same, one at a time", 3, 40, true, func(*rand.Rand) time.Duration { return ms(4) }},
		{"one caller", 3, 1, false, func(dice *rand.Rand) time.Duration { return ms(5 + dice.Float64()*60) }},
		{"spread evenly", 3, 8, false, func(dice *rand.Rand) time.Duration { return ms(1 + dice.Float64()*40) }},
		{"exponential", 3, 3, false, func(dice *rand.Rand) time.Duration { return ms(dice.ExpFloat64() * 20) }},
		{"exponential, many callers", 3, 64, false, func(dice *rand.Rand) time.Duration { return ms(dice.ExpFloat64() * 20) }},
		{"exponential, one at a time, a long queue", 3, 30, true, func(dice *rand.Rand) time.Duration { return ms(dice.ExpFloat64() * 10) }},
		{"now and then a hundred times longer", 3, 16, false, func(dice *rand.Rand) time.Duration {
			if dice.IntN(20) == 0 {
				return ms(100)
			}
			return ms(1)
		}},
		{"now and then a hundred times longer, in a large group", 32, 32, false, func(dice *rand.Rand) time.Duration {
			if dice.IntN(20) == 0 {
				return ms(100)
			}
			return ms(1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var names []string
				for i := range c.members {
					names = append(names, fmt.Sprint("m", i))
				}
				r := newRig(t, names, hedged).start()
				dice := rand.New(rand.NewPCG(7, 7))
				var mu sync.Mutex // guards dice
				for _, h := range r.hsms {
					h.set(func(h *hsm) {
						if c.alone {
							h.turn = make(chan struct{}, 1)
						}
						h.work = func() time.Duration {
							mu.Lock()
							defer mu.Unlock()
							return c.work(dice)
						}
					})
				}
				stop := make(chan struct{})
				l := &load{r: r}
				l.callers(c.callers, stop)
				elapse(4 * time.Second)
				close(stop)
				l.wg.Wait()
				elapse(time.Second)
				served := 0
				for _, h := range r.hsms {
					n, _, _ := h.count()
					served += n
				}
				most := l.sent/20 + reserve
				if c.alone {
					most += mistaken
				}
				if extra := served - l.sent; extra > most {
					t.Errorf("%d extra commands for %d, want at most %d", extra, l.sent, most)
				}
				t.Logf("%d commands, %d extra", l.sent, served-l.sent)
			})
		})
	}
}
