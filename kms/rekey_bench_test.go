package kms_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/catalog/boltcat"
)

// BenchmarkRekey is a rekey without what HSMs and their drivers take: tokens are in
// memory, the catalog is on disk.
func BenchmarkRekey(b *testing.B) {
	const n = 20_000
	r := newRig(b, 3)
	store, err := boltcat.Open(b.TempDir() + "/catalog.db")
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	if err := r.start(store); err != nil {
		b.Fatal(err)
	}
	defer r.stop()
	if _, err := r.CreateDatabase(b.Context(), "shop", api.DatabaseOptions{}); err != nil {
		b.Fatal(err)
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 128 {
		wg.Go(func() {
			for i := next.Add(1); i <= n; i = next.Add(1) {
				if _, err := r.PutNamedKey(b.Context(), "shop", fmt.Sprint(i), api.NamedKeyPut{Plaintext: make([]byte, 32)}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportAllocs()
	for b.Loop() {
		job := r.rekey(api.RekeyOptions{})
		r.wantJob(job.ID, api.JobDone)
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "keys/s")
}
