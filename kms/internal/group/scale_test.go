package group_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// memory is a group of memory drivers, each with a service time of 1 ms, one command
// at a time, that all hold the same key.
func memory(t testing.TB, members int) (*group.Group, pluginproto.Command) {
	t.Helper()
	cfg := group.Config{Name: "g", Hedge: true}
	for i := range members {
		name := fmt.Sprintf("m%02d", i)
		d := memdriver.New(memdriver.Options{
			Token: memdriver.NewToken(name), ServiceTime: time.Millisecond, OneAtATime: true,
		})
		cfg.Members = append(cfg.Members, group.MemberConfig{
			Name: name,
			Connect: func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				info, err := d.Open(ctx, pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, sha256.Size)})
				return d, info, err
			},
		})
	}
	g, err := group.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g, pluginproto.Command{Op: pluginproto.OpRandom, Length: 32}
}

// throughput is how many commands a group answers per second when it has as many
// callers as keep all its members busy.
func throughput(t testing.TB, members int, d time.Duration) float64 {
	g, cmd := memory(t, members)
	var (
		done atomic.Int64
		wg   sync.WaitGroup
		stop = make(chan struct{})
	)
	began := time.Now()
	time.AfterFunc(d, func() { close(stop) })
	for range 4 * members {
		wg.Go(func() {
			for !closed(stop) {
				if _, err := g.Do(context.Background(), cmd); err != nil {
					t.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(began).Seconds()
}

// TestW54_ThroughputGrowsWithTheMembers: Luna's own figures lose 8 % from 2 to 16.
func TestW54_ThroughputGrowsWithTheMembers(t *testing.T) {
	var one float64
	for _, members := range []int{1, 2, 4, 8, 16, 32} {
		var got float64
		synctest.Test(t, func(t *testing.T) { got = throughput(t, members, time.Second) })
		if members == 1 {
			one = got
		}
		ratio, want := got/one, 15.5/16*float64(members)
		t.Logf("%d members answer %.0f commands/s, %.2f times as many as one", members, got, ratio)
		if ratio < want {
			t.Errorf("%d members answer %.2f times as many commands as one; want at least %.2f", members, ratio, want)
		}
	}
}

// BenchmarkMembers is the same by the real clock, where the group has to do its own work
// for each command on this machine.
func BenchmarkMembers(b *testing.B) {
	for _, members := range []int{1, 2, 4, 8, 16, 32} {
		b.Run(fmt.Sprint(members), func(b *testing.B) {
			var sum float64
			for b.Loop() {
				sum += throughput(b, members, time.Second)
			}
			b.ReportMetric(sum/float64(b.N), "commands/s")
		})
	}
}
