package pluginproto

import (
	"context"
	"errors"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

// PluginName is the name under which a driver process offers its Driver, and a
// supervisor dispenses it.
const PluginName = "driver"

// ParentPIDEnv names the environment variable in which a supervisor gives its own
// process id to a driver; see [Serve].
const ParentPIDEnv = "KMSD_PARENT_PID"

// Handshake is what a supervisor and a driver process agree on before anything
// else. The protocol version counts up whenever one of them must not take the other for
// one of its own: a driver before version 2 would keep a key that it is asked to prove.
func Handshake() plugin.HandshakeConfig {
	return plugin.HandshakeConfig{
		ProtocolVersion:  2,
		MagicCookieKey:   "KMSD_DRIVER",
		MagicCookieValue: "b1cc0d5e9a7b4a6fa4a1f4ed2c4f0e6b",
	}
}

// NewPlugin is the supervisor's side of go-plugin: dispensing [PluginName] gives a
// [*Client].
func NewPlugin(opts ClientOptions) plugin.Plugin {
	return &grpcPlugin{connect: func(conn *grpc.ClientConn) any { return NewClient(conn, opts) }}
}

// grpcPlugin joins one of the two ends to go-plugin.
type grpcPlugin struct {
	plugin.NetRPCUnsupportedPlugin
	register func(*grpc.Server)
	connect  func(*grpc.ClientConn) any
}

var errOtherEnd = errors.New("this is the other end of the driver contract")

// GRPCServer implements plugin.GRPCPlugin.
func (p *grpcPlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if p.register == nil {
		return errOtherEnd
	}
	p.register(s)
	return nil
}

// GRPCClient implements plugin.GRPCPlugin.
func (p *grpcPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	if p.connect == nil {
		return nil, errOtherEnd
	}
	return p.connect(conn), nil
}
