package boltcat_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
)

// BenchmarkRewrap is what a rekey job asks of the catalog, without the HSMs: pages of
// data keys are read, and written again with the job.
func BenchmarkRewrap(b *testing.B) {
	const records, batch = 100_000, catalog.BatchSize - 1
	path := filepath.Join(b.TempDir(), "catalog.db")
	s := mustOpen(b, path)
	defer s.Close()
	c := catalog.New(s)
	master, job := fillDatabase(b, c, records)
	used := cpuTime(b)
	begun := time.Now()
	done := 0
	for after := ""; b.Loop(); {
		var page []catalog.DataKey
		for dk, err := range c.DataKeys(b.Context(), "shop", "", after, batch) {
			if err != nil {
				b.Fatal(err)
			}
			page = append(page, dk)
		}
		if len(page) == 0 {
			after = ""
			continue
		}
		after = page[len(page)-1].ID
		job.After, job.Done = []byte(after), job.Done+len(page)
		var err error
		if job, err = c.Advance(b.Context(), master, job, catalog.Rewrapped{Keys: page}); err != nil {
			b.Fatal(err)
		}
		done += len(page)
	}
	b.ReportMetric(float64((cpuTime(b)-used).Microseconds())/float64(done), "cpu-µs/record")
	b.ReportMetric(float64(done)/time.Since(begun).Seconds(), "records/s")
}

// BenchmarkOpen reads a catalog of a hundred thousand data keys.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "catalog.db")
	s := mustOpen(b, path)
	fillDatabase(b, catalog.New(s), 100_000)
	s.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for b.Loop() {
		s, err := boltcat.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(b.N)/1024, "KiB/open")
}

// fillDatabase writes n data keys of the database shop under version 1 of its master key.
func fillDatabase(b *testing.B, c *catalog.Catalog, n int) (catalog.Key, catalog.Job) {
	b.Helper()
	at := time.Now().UTC()
	key := catalog.Key{Name: "shop", Group: "default", Type: "aes-256", MinCopies: 1, Created: at, Databases: []string{"shop"}, Versions: []catalog.Version{
		{Number: 1, Identity: "1", State: catalog.Enabled, Created: at, CheckValue: []byte{1}, Copies: []string{"hsm-a"}},
	}}
	db, key, err := c.CreateDatabase(b.Context(), catalog.Database{Name: "shop", Key: "shop", Created: at}, key)
	if err != nil {
		b.Fatal(err)
	}
	job, _, err := c.BeginJob(b.Context(), catalog.Job{
		ID: "job", Database: "shop", Key: "shop", Version: 1, State: catalog.JobRunning, Started: at, Total: n,
	}, db)
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; i < n; {
		var batch catalog.Rewrapped
		for range min(10_000, n-i) {
			batch.Keys = append(batch.Keys, catalog.DataKey{
				Database: "shop", ID: fmt.Sprintf("table/%08d", i), First: at,
				DataVersion: catalog.DataVersion{Number: 1, Created: at, Master: 1, Envelope: make([]byte, 95)},
			})
			i++
		}
		if job, err = c.Advance(b.Context(), key, job, batch); err != nil {
			b.Fatal(err)
		}
	}
	return key, job
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
