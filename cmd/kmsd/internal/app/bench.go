package app

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// benchKey is the key that a benchmark makes for itself when it is given none.
const benchKey = "kmsd-bench"

// bench is what is measured.
type bench struct {
	op          string
	key         string
	concurrency int
	duration    time.Duration
	batch       int
	size        int // bytes of each plaintext
}

// benchReport is what was measured. Times are of whole requests, in microseconds.
type benchReport struct {
	Op          string  `json:"op"`
	Concurrency int     `json:"concurrency"`
	Batch       int     `json:"batch"`
	Seconds     float64 `json:"seconds"`
	Items       int     `json:"items"`
	Failed      int     `json:"failed"` // requests
	PerSecond   float64 `json:"items_per_second"`
	P50         int64   `json:"p50_us"`
	P90         int64   `json:"p90_us"`
	P99         int64   `json:"p99_us"`
	Max         int64   `json:"max_us"`
	FirstError  string  `json:"first_error,omitempty"`
}

func newBench(s *session) *cobra.Command {
	var b bench
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure operations per second and how long they take",
		Long:  "Measure operations per second and how long they take, with requests that follow each other on\nevery connection. Without --name it makes and uses the key " + benchKey + ".",
		Args:  usageArgs(cobra.NoArgs),
	}
	f := cmd.Flags()
	f.StringVar(&b.op, "op", "wrap", "wrap, unwrap, rewrap or datakey")
	f.StringVar(&b.key, "name", "", "key to use")
	f.IntVar(&b.concurrency, "concurrency", 64, "requests at once, 1 to 1024")
	f.DurationVar(&b.duration, "duration", 5*time.Second, "how long")
	f.IntVar(&b.batch, "batch", 1, "items in each request, 1 to 1000")
	f.IntVar(&b.size, "size", 32, "bytes of each plaintext")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		if err := b.check(); err != nil {
			return err
		}
		rep, err := b.run(cmd.Context(), svc)
		if err != nil {
			return err
		}
		if err := s.print(rep, rep.write); err != nil {
			return err
		}
		if rep.Failed > 0 {
			return fmt.Errorf("%d requests failed; the first: %s", rep.Failed, rep.FirstError)
		}
		return nil
	})
}

func (b bench) check() error {
	switch {
	case !slices.Contains([]string{"wrap", "unwrap", "rewrap", "datakey"}, b.op):
		return &usageError{msg: fmt.Sprintf("--op %s is none of wrap, unwrap, rewrap, datakey", b.op)}
	case b.concurrency < 1 || b.concurrency > 1024:
		return &usageError{msg: "--concurrency is 1 to 1024"}
	case b.batch < 1 || b.batch > api.MaxItems:
		return &usageError{msg: fmt.Sprintf("--batch is 1 to %d", api.MaxItems)}
	case b.duration <= 0:
		return &usageError{msg: "--duration is not positive"}
	case b.size < 1 || b.size > api.MaxPlaintext:
		return &usageError{msg: fmt.Sprintf("--size is 1 to %d", api.MaxPlaintext)}
	}
	return nil
}

func (b bench) run(ctx context.Context, svc service) (benchReport, error) {
	if b.key == "" {
		b.key = benchKey
		if _, err := svc.CreateMasterKey(ctx, b.key, api.KeyOptions{}); err != nil && !errors.Is(err, api.ErrExists) {
			return benchReport{}, err
		}
	}
	items, err := b.items(ctx, svc)
	if err != nil {
		return benchReport{}, err
	}
	start := time.Now()
	tallies := b.load(ctx, svc, items, start.Add(b.duration))
	return b.report(tallies, time.Since(start)), nil
}

// tally is what one worker has seen.
type tally struct {
	times []time.Duration // of requests that succeeded
	fails int
	err   error // the first
}

// load asks until end. Each worker has its own tally, so that measuring takes no
// lock.
func (b bench) load(ctx context.Context, svc service, items []api.Item, end time.Time) []tally {
	const hopeless = 10 // failures of one worker
	tallies := make([]tally, b.concurrency)
	var workers sync.WaitGroup
	for i := range tallies {
		workers.Go(func() {
			t := &tallies[i]
			for time.Now().Before(end) && ctx.Err() == nil && t.fails < hopeless {
				began := time.Now()
				if err := b.ask(ctx, svc, items); err != nil {
					t.fails++
					t.err = cmp.Or(t.err, err)
					continue
				}
				t.times = append(t.times, time.Since(began))
			}
		})
	}
	workers.Wait()
	return tallies
}

func (b bench) report(tallies []tally, took time.Duration) benchReport {
	rep := benchReport{Op: b.op, Concurrency: b.concurrency, Batch: b.batch, Seconds: took.Seconds()}
	var times []time.Duration
	for _, t := range tallies {
		times = append(times, t.times...)
		rep.Failed += t.fails
		if t.err != nil && rep.FirstError == "" {
			rep.FirstError = t.err.Error()
		}
	}
	rep.Items = len(times) * b.batch
	rep.PerSecond = float64(rep.Items) / took.Seconds()
	rep.quantiles(times)
	return rep
}

// items makes what every request asks about.
func (b bench) items(ctx context.Context, svc service) ([]api.Item, error) {
	items := make([]api.Item, b.batch)
	for i := range items {
		if b.op == "datakey" {
			items[i].Bytes = 32
			continue
		}
		items[i].Plaintext = make([]byte, b.size)
		rand.Read(items[i].Plaintext) // never fails, see crypto/rand
	}
	if b.op == "wrap" || b.op == "datakey" {
		return items, nil
	}
	results, err := svc.Batch(ctx, api.OpWrap, b.key, items)
	if err != nil {
		return nil, err
	}
	for i, r := range results {
		if r.Error != nil {
			return nil, r.Error
		}
		items[i] = api.Item{Wrapped: r.Wrapped}
	}
	return items, nil
}

func (b bench) ask(ctx context.Context, svc service, items []api.Item) error {
	results, err := svc.Batch(ctx, api.Op(b.op), b.key, items)
	if err != nil {
		return err
	}
	for _, r := range results {
		if r.Error != nil {
			return r.Error
		}
	}
	return nil
}

func (r *benchReport) quantiles(times []time.Duration) {
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	at := func(share float64) int64 { return times[int(share*float64(len(times)-1))].Microseconds() }
	r.P50, r.P90, r.P99, r.Max = at(0.50), at(0.90), at(0.99), at(1)
}

func (r benchReport) write(w io.Writer) error {
	us := func(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
	_, err := fmt.Fprintf(w, "%s, %d at once, %d in each request: %.0f per second (%d in %.1f s, %d requests failed)\np50 %v, p90 %v, p99 %v, max %v\n",
		r.Op, r.Concurrency, r.Batch, r.PerSecond, r.Items, r.Seconds, r.Failed, us(r.P50), us(r.P90), us(r.P99), us(r.Max))
	return err
}
