package group

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

func connectNever(context.Context) (Conn, pluginproto.TokenInfo, error) {
	return nil, pluginproto.TokenInfo{}, errors.New("never")
}

func TestLatencyQuantiles(t *testing.T) {
	var h latency
	if q := h.quantile(0.99); q != 0 {
		t.Errorf("nothing measured gives %v", q)
	}
	for i := range 1000 {
		h.add(time.Duration(i+1) * time.Microsecond)
	}
	for _, c := range []struct {
		q    float64
		want time.Duration
	}{{0.5, 500 * time.Microsecond}, {0.99, 990 * time.Microsecond}} {
		if got := h.quantile(c.q); got < c.want || got > c.want*9/8 {
			t.Errorf("quantile %v is %v, want %v and at most an eighth more", c.q, got, c.want)
		}
	}
	for range 2 * memory {
		h.add(time.Second)
	}
	if got := h.quantile(0.5); got < time.Second {
		t.Errorf("after many slow answers the median is %v; old ones should be forgotten", got)
	}
	h.add(time.Hour)
	h.add(-time.Second)
}

func TestEveryBucketHoldsItsUpperEnd(t *testing.T) {
	for i := range (latency{}).counts {
		if got := bucket(upperEnd(i)); got != i {
			t.Errorf("the upper end of bucket %d, %v, is in bucket %d", i, upperEnd(i), got)
		}
		if i > 0 && bucket(upperEnd(i-1)+time.Microsecond) != i {
			t.Errorf("there is a gap before bucket %d", i)
		}
	}
}

func TestCostsRankWhatKeepsATokenBusy(t *testing.T) {
	cost := func(op pluginproto.Op, m pluginproto.Mechanism) int {
		return commandCosts[effortOf(pluginproto.Command{Op: op, Mech: m})]
	}
	aes, hmac := cost(pluginproto.OpDecrypt, pluginproto.AESGCM), cost(pluginproto.OpMAC, pluginproto.HMAC)
	ecdsa, rsa := cost(pluginproto.OpSign, pluginproto.ECDSA), cost(pluginproto.OpSign, pluginproto.RSAPSS)
	if !(aes == hmac && aes < ecdsa && ecdsa < rsa) {
		t.Errorf("costs are %d %d %d %d", aes, hmac, ecdsa, rsa)
	}
	if verify := cost(pluginproto.OpVerify, pluginproto.RSAPSS); verify != aes {
		t.Errorf("a verification costs %d, want as little as a symmetric command", verify)
	}
	// A pair is not made on a member that signs, nor the other way round, unless
	// hundreds of signatures wait everywhere else.
	for _, typ := range pluginproto.KeyTypes() {
		pair := typ == pluginproto.RSA2048 || typ == pluginproto.RSA3072 || typ == pluginproto.RSA4096
		if made := costOfKey(typ); made < costGenerate || pair != (made > 100*rsa) {
			t.Errorf("making a key of type %s costs %d, a signature with RSA %d", typ, made, rsa)
		}
	}
}

// linked is a group of one member that is connected, which no goroutine moves.
func linked(t *testing.T) (*Group, *member, *link) {
	g, m := grid(t)
	g.ctx = t.Context()
	m.ctx = g.ctx
	return g, m, g.newLink(m, noConn{}, pluginproto.TokenInfo{})
}

func TestAWriteWhoseTurnComesAfterTheStintIsNotBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _, l := linked(t)
		h := &handle{g: g, l: l, st: l.stint}
		l.writes <- struct{}{} // an earlier call, given up by its caller
		entered := make(chan error)
		go func() { entered <- h.enter(t.Context(), &turn{writes: true, cost: 1}, nil) }()
		synctest.Wait()
		g.mu.Lock()
		<-l.writes // it ends, so the turn is the next one's
		l.stint.cancel(errSilent)
		g.mu.Unlock()
		if err := <-entered; !errors.Is(err, errSilent) {
			t.Errorf("got %v, want the end of the stint", err)
		}
		if len(l.writes) != 0 || l.load != 0 || l.due != 0 {
			t.Errorf("the turn was not given back: %d writes, load %d, %d due", len(l.writes), l.load, l.due)
		}
	})
}

// A link's context is over a moment before its stint's. Who looks in between is told why, too.
func TestACallThatEndsWithItsLinkIsToldWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _, l := linked(t)
		ctx, end := context.WithCancelCause(t.Context()) // still runs when the link's is over
		defer end(nil)
		h := &handle{g: g, l: l, st: stint{ctx, end}}
		_, err := call(t.Context(), h, errand[struct{}]{run: func(ctx context.Context) (struct{}, error) {
			l.cancel(errSilent)
			return struct{}{}, ctx.Err()
		}})
		if !errors.Is(err, errSilent) {
			t.Errorf("got %v, want the end of the link", err)
		}
		g.tasks.Wait()
	})
}

func TestAWatcherThatWasStoppedItselfBlamesNobody(t *testing.T) {
	for _, c := range []struct {
		name   string
		looked time.Duration // since the last look
		want   api.MemberState
	}{
		{"it looked a moment ago", 100 * time.Millisecond, api.MemberDown},
		{"it was stopped for longer than a command may take", 30 * time.Second, api.MemberActive},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, m, l := linked(t)
				m.link, m.state, l.entered = l, api.MemberActive, true
				l.probing, l.due = true, 1
				l.looked, l.owes = time.Now().Add(-c.looked), time.Now().Add(-25*time.Second)
				g.look(l)
				if m.state != c.want {
					t.Errorf("the member is %s (%s), want %s", m.state, m.reason, c.want)
				}
			})
		})
	}
}

// With a key operation under way, three members were dropped at once.
func TestACallIsNotBlamedForAStopOfThisProcess(t *testing.T) {
	const limit = 20 * time.Second
	for _, c := range []struct {
		name string
		look func(g *Group, l *link) // just before the time of the call is over
		want api.MemberState
	}{
		{"its watcher has looked all the time", func(g *Group, l *link) { g.mu.Lock(); defer g.mu.Unlock(); l.looked = time.Now() }, api.MemberDown},
		{"its watcher has not looked for long", func(*Group, *link) {}, api.MemberActive},
		{"its watcher was the first to find out", func(g *Group, l *link) { g.look(l) }, api.MemberActive},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, m, l := linked(t)
				m.link, m.state, l.entered, l.probing, l.due = l, api.MemberActive, true, true, 1
				h, call := &handle{g: g, l: l, st: l.stint}, &turn{}
				g.mu.Lock()
				h.timeLocked(call, limit)
				g.mu.Unlock()
				time.Sleep(limit - time.Millisecond)
				c.look(g, l)
				time.Sleep(2 * time.Millisecond)
				synctest.Wait()
				g.mu.Lock()
				defer g.mu.Unlock()
				if m.state != c.want {
					t.Errorf("the member is %s (%s), want %s", m.state, m.reason, c.want)
				}
				call.over = true
				call.late.Stop()
			})
		})
	}
}

// noConn is a connection that nobody calls.
type noConn struct{ Conn }

// The watcher may wake the owner once more before the owner has come to look.
func TestAMemberIsTakenToAnswerAgainOnceForEachAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, m, l := linked(t)
		m.link, m.state, l.entered, l.stale = l, api.MemberProbing, true, false
		l.stint.cancel(errSilent)
		l.heard, l.silentAt = time.Now().Add(-time.Second), time.Now()
		if _, due := g.renew(l); due || m.state != api.MemberProbing {
			t.Errorf("it has given no answer, and is %s", m.state)
		}
		l.heard = time.Now().Add(time.Second)
		l.writes <- struct{}{}
		if _, due := g.renew(l); due || m.state != api.MemberProbing {
			t.Errorf("its keys may be about to change, and it is %s", m.state)
		}
		<-l.writes
		if _, due := g.renew(l); !due || m.state != api.MemberSyncing {
			t.Errorf("it has answered, and is %s", m.state)
		}
	})
}
