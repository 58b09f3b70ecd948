package kms_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

// The data keys that the benchmarks read, and how many callers there are at once.
const (
	benchKeys    = 1000
	benchCallers = 64
)

// newBenchRig starts a service on disk with a database.
func newBenchRig(b *testing.B) *rig {
	r := newRig(b, 2)
	r.level = hclog.Info // as it is by default
	r.mustStartOn(openBolt(b))
	b.Cleanup(r.stop)
	if _, err := r.CreateDatabase(b.Context(), "shop", api.DatabaseOptions{}); err != nil {
		b.Fatal(err)
	}
	return r
}

// inParallel calls f with 0, 1, 2 and so on, each once, from many goroutines.
func inParallel(b *testing.B, f func(i int) error) {
	var next atomic.Int64
	b.SetParallelism(benchCallers / 2)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := f(int(next.Add(1))); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
}

func BenchmarkNamedKey(b *testing.B) {
	r := newBenchRig(b)
	for i := range benchKeys {
		if _, err := r.PutNamedKey(b.Context(), "shop", fmt.Sprint(i), api.NamedKeyPut{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	inParallel(b, func(i int) error {
		k, err := r.NamedKey(b.Context(), "shop", fmt.Sprint(i%benchKeys), 0)
		clear(k.Plaintext)
		return err
	})
}

func BenchmarkPutNamedKey(b *testing.B) {
	r := newBenchRig(b)
	b.ResetTimer()
	inParallel(b, func(i int) error {
		_, err := r.PutNamedKey(b.Context(), "shop", fmt.Sprint(i), api.NamedKeyPut{})
		return err
	})
}
