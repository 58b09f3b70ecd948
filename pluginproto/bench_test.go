package pluginproto_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
	driverv1 "kmsd/pluginproto/v1"
)

// BenchmarkDo is one 32-byte AES-GCM encryption by the memory driver behind a unix
// socket: over the command stream, and, to compare, as one unary call each.
func BenchmarkDo(b *testing.B) {
	d := memdriver.New(memdriver.Options{})
	conn := dialUnix(b, d)
	client := pluginproto.NewClient(conn, pluginproto.ClientOptions{})
	if _, err := client.Open(b.Context(), openRequest()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = client.Close() }) // the server ends with it
	id := pluginproto.KeyID{1}
	if _, err := client.Generate(b.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
		b.Fatal(err)
	}
	cmd := pluginproto.Command{
		Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id,
		Input: make([]byte, 32), IV: make([]byte, 12), AAD: []byte("context"),
	}
	inspect := &driverv1.InspectRequest{Id: id[:]}
	unary := driverv1.NewDriverClient(conn)
	for _, way := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"stream", func(ctx context.Context) error { _, err := client.Do(ctx, cmd); return err }},
		{"unary", func(ctx context.Context) error { _, err := unary.Inspect(ctx, inspect); return err }},
		{"bare", func(ctx context.Context) error { _, err := d.Do(ctx, cmd); return err }},
	} {
		for _, callers := range []int{1, 16, 128} {
			b.Run(fmt.Sprintf("%s/callers=%d", way.name, callers), func(b *testing.B) {
				b.ReportAllocs()
				share(b, callers, way.do)
			})
		}
	}
}

// share spreads b.N calls over so many callers.
func share(b *testing.B, callers int, do func(context.Context) error) {
	before := cpuTime(b)
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := do(b.Context()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

// cpuTime is what this process has used so far: unlike the clock, it does not tell
// what else the machine was doing.
func cpuTime(b *testing.B) time.Duration {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func dialUnix(b *testing.B, d pluginproto.Driver) *grpc.ClientConn {
	path := filepath.Join(b.TempDir(), "driver.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	server := pluginproto.NewServer(nil)
	pluginproto.RegisterServer(server, d, pluginproto.ServerOptions{})
	go func() { _ = server.Serve(listener) }() // ends with Stop
	b.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = conn.Close() })
	return conn
}

func openRequest() pluginproto.OpenRequest {
	return pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, 32)}
}
