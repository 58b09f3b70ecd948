package httpapi_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/client"
)

// instant answers a batch at once, so that what is measured is HTTP alone.
type instant struct{ *apitest.Memory }

func (instant) Batch(_ context.Context, _ api.Op, _ string, items []api.Item) ([]api.Result, error) {
	results := make([]api.Result, len(items))
	for i, item := range items {
		results[i] = api.Result{Wrapped: item.Plaintext, Version: 1}
	}
	return results, nil
}

// quiet forgets records at once.
type quiet struct{}

func (quiet) Record(context.Context, httpapi.Record) error { return nil }

func instantly(c *httpapi.Config) { c.Service, c.Audit = instant{new(apitest.Memory)}, quiet{} }

// BenchmarkDoor is the server's share of one wrap: no network, no TLS.
func BenchmarkDoor(b *testing.B) {
	cfg := httpapi.Config{Auth: tokens{}}
	instantly(&cfg)
	h, err := httpapi.New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	const body = `{"plaintext":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=","aad":"dGFibGUgb3JkZXJz"}`
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequest("POST", "/v1/keys/shop/wrap", strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer "+adminToken)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != 200 {
			b.Fatal(w.Body)
		}
	}
}

// BenchmarkWrap is client, TLS on keep-alive connections and server, in one process.
func BenchmarkWrap(b *testing.B) {
	for _, callers := range []int{1, 64, 500} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			k := start(b, new(apitest.Memory), instantly)
			c := k.client(b, func(o *client.Options) { o.Attempts = 1 })
			hammer(b, callers, func(ctx context.Context) error {
				_, err := c.Wrap(ctx, "shop", make([]byte, 32), []byte("table orders"))
				return err
			})
		})
	}
}

// BenchmarkProtocols compares many HTTP/1.1 connections with one of HTTP/2, below
// the same requests.
func BenchmarkProtocols(b *testing.B) {
	for _, version := range []string{"1.1", "2"} {
		for _, callers := range []int{1, 64, 500} {
			b.Run(fmt.Sprintf("http=%s/callers=%d", version, callers), func(b *testing.B) {
				k := start(b, new(apitest.Memory), instantly)
				var p http.Protocols
				p.SetHTTP1(version == "1.1")
				p.SetHTTP2(version == "2")
				k.http.Transport = &http.Transport{
					TLSClientConfig: &tls.Config{RootCAs: k.ca.pool}, Protocols: &p, MaxIdleConns: 1024, MaxIdleConnsPerHost: 1024,
				}
				hammer(b, callers, func(context.Context) error {
					a := k.ask(b, "POST", "/v1/keys/shop/wrap", adminToken, `{"plaintext":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="}`)
					if a.status != 200 {
						return fmt.Errorf("%d %s", a.status, a.body)
					}
					return nil
				})
			})
		}
	}
}

// hammer lets callers share the iterations of b.
func hammer(b *testing.B, callers int, call func(context.Context) error) {
	b.Helper()
	b.ReportAllocs()
	b.SetParallelism((callers + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	var warm sync.WaitGroup
	for range callers { // opens the connections
		warm.Go(func() {
			if err := call(b.Context()); err != nil {
				b.Error(err)
			}
		})
	}
	warm.Wait()
	b.ResetTimer()
	before := cpuTime(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := call(b.Context()); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

// cpuTime is what this process has used. On a machine that others use too it says
// more than the time on the wall.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
