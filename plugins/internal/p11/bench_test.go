package p11_test

import (
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// BenchmarkEncrypt is what the numbers in the quirks of SoftHSM come from: workers
// and session copies, under a few and many callers.
func BenchmarkEncrypt(b *testing.B) {
	for _, copies := range []bool{false, true} {
		for _, workers := range []int{1, 2, 4, 8} {
			for _, callers := range []int{1, 128} {
				b.Run(fmt.Sprintf("copies=%v/workers=%d/callers=%d", copies, workers, callers), func(b *testing.B) {
					q := quirks()
					q.SessionCopies, q.FastWorkers = copies, workers
					benchmark(b, q, callers, pluginproto.AES256, pluginproto.Command{
						Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Input: make([]byte, 32), IV: make([]byte, 12),
					})
				})
			}
		}
	}
}

func BenchmarkSign(b *testing.B) {
	digest := sha256.Sum256(nil)
	for _, typ := range []pluginproto.KeyType{pluginproto.ECP256, pluginproto.RSA2048} {
		for _, workers := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("%s/workers=%d", typ, workers), func(b *testing.B) {
				q := quirks()
				q.SlowWorkers = workers
				cmd := pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.ECDSA, Hash: pluginproto.SHA256, Input: digest[:]}
				if typ == pluginproto.RSA2048 {
					cmd.Mech = pluginproto.RSAPSS
				}
				benchmark(b, q, 16, typ, cmd)
			})
		}
	}
}

func BenchmarkProbe(b *testing.B) {
	benchmark(b, quirks(), 1, pluginproto.AES256, pluginproto.Command{Op: pluginproto.OpProbe})
}

func benchmark(b *testing.B, q p11.Quirks, callers int, typ pluginproto.KeyType, cmd pluginproto.Command) {
	bench := newBench(b)
	d := p11.New(q, p11.Options{})
	if _, err := d.Open(b.Context(), bench.request()); err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	cmd.Key = generate(b, d, typ).ID
	b.SetParallelism(callers) // times GOMAXPROCS
	var failed atomic.Value
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := d.Do(b.Context(), cmd); err != nil {
				failed.Store(err)
				return
			}
		}
	})
	if err := failed.Load(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
}

// BenchmarkClone is the copying of one key to a token that has many, as when a
// member of a group is filled.
func BenchmarkClone(b *testing.B) {
	for _, keys := range []int{200, 1000, 5000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			bench := newBench(b, "token-a", "token-b")
			source := bench.open(b)
			bench.settings["token_label"] = "token-b"
			target := bench.open(b)
			fill(b, source, keys)
			fill(b, target, keys)
			ids, err := source.List(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			for i := range b.N {
				clone(b, source, target, ids[i%len(ids)].ID)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "clones/s")
		})
	}
}

// fill puts keys on a token, past the driver.
func fill(t testing.TB, d *p11.Driver, keys int) {
	t.Helper()
	for range keys {
		importKey(t, d, newID(), pkcs11.CKK_AES, counting(32))
	}
}
