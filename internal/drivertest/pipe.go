package drivertest

import (
	"context"
	"errors"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"kmsd/pluginproto"
)

// Wall is both adapters around a driver with a real gRPC connection between them, in
// memory: all of the process wall but the process.
type Wall struct {
	*pluginproto.Client
	server *grpc.Server
	conn   *grpc.ClientConn
}

// NewWall puts a wall before a driver, until the test ends.
func NewWall(t testing.TB, d pluginproto.Driver, server pluginproto.ServerOptions, client pluginproto.ClientOptions) *Wall {
	t.Helper()
	w := &Wall{server: pluginproto.NewServer(nil)}
	pluginproto.RegisterServer(w.server, d, server)
	listener := bufconn.Listen(256 << 10)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(listener) }()

	conn, err := grpc.NewClient("passthrough:///driver",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
	)
	if err != nil {
		t.Fatalf("connecting to the driver: %v", err)
	}
	w.conn = conn
	w.Client = pluginproto.NewClient(conn, client)
	t.Cleanup(func() {
		w.Cut()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("serving the driver: %v", err)
		}
	})
	return w
}

// Cut breaks the connection, as the death of the process does.
func (w *Wall) Cut() {
	w.server.Stop()
	_ = w.conn.Close() // a second time when the test has cut it before
}
