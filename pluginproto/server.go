package pluginproto

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	driverv1 "kmsd/pluginproto/v1"
)

// ServerOptions are what a driver may choose about its adapter.
type ServerOptions struct {
	// Workers is how many commands run at once; the others wait in order. Zero
	// means 64. A driver whose library runs one call at a time is fastest with few.
	Workers int
}

// RegisterServer offers driver on s. It is [Serve] without the process.
func RegisterServer(s grpc.ServiceRegistrar, driver Driver, opts ServerOptions) {
	if opts.Workers <= 0 {
		opts.Workers = 64
	}
	driverv1.RegisterDriverServer(s, &server{driver: driver, workers: opts.Workers})
}

// server offers a Driver as the gRPC service. Every request is read with the limits
// of the contract before the driver sees it.
type server struct {
	driverv1.UnimplementedDriverServer
	driver  Driver
	workers int
	busy    atomic.Bool // a command stream is open
}

func (s *server) Open(ctx context.Context, m *driverv1.OpenRequest) (*driverv1.OpenReply, error) {
	defer clear(m.GetPin())
	defer clear(m.GetDomain())
	req := OpenRequest{Settings: m.GetSettings(), PIN: m.GetPin(), Domain: m.GetDomain()}
	if err := req.check(); err != nil {
		return nil, statusOf(err)
	}
	info, err := s.driver.Open(ctx, req)
	if err != nil {
		return nil, statusOf(err)
	}
	return &driverv1.OpenReply{
		Label:        text(info.Label),
		Serial:       text(info.Serial),
		Manufacturer: text(info.Manufacturer),
		Model:        text(info.Model),
		Firmware:     text(info.Firmware),
		DomainCheck:  info.DomainCheck,
		Driver:       text(info.Driver),
		Mechanisms:   wireMechanisms(info.Mechanisms),
		Cloning:      wireProtocols(info.Cloning),
		Facts:        wireFacts(info.Facts),
	}, nil
}

func (s *server) List(_ *driverv1.ListRequest, stream grpc.ServerStreamingServer[driverv1.ListReply]) error {
	objects, err := s.driver.List(stream.Context())
	if err != nil {
		return statusOf(err)
	}
	const chunk = 256 // with the longest labels and public halves 1.4 MiB
	for len(objects) > 0 {
		n := min(len(objects), chunk)
		reply := &driverv1.ListReply{Objects: make([]*driverv1.Object, n)}
		for i, o := range objects[:n] {
			reply.Objects[i] = wireObject(o)
		}
		if err := stream.Send(reply); err != nil {
			return err
		}
		objects = objects[n:]
	}
	return nil
}

func (s *server) Inspect(ctx context.Context, m *driverv1.InspectRequest) (*driverv1.Object, error) {
	id, err := keyID(m.GetId())
	if err != nil {
		return nil, statusOf(err)
	}
	o, err := s.driver.Inspect(ctx, id)
	if err != nil {
		return nil, statusOf(err)
	}
	return wireObject(o), nil
}

func (s *server) Generate(ctx context.Context, m *driverv1.GenerateRequest) (*driverv1.Object, error) {
	id, err := keyID(m.GetId())
	if err != nil {
		return nil, statusOf(err)
	}
	spec := KeySpec{ID: id, Type: KeyType(m.GetType()), Label: m.GetLabel()}
	if err := spec.check(); err != nil {
		return nil, statusOf(err)
	}
	o, err := s.driver.Generate(ctx, spec)
	if err != nil {
		return nil, statusOf(err)
	}
	return wireObject(o), nil
}

func (s *server) SetAttributes(ctx context.Context, m *driverv1.SetAttributesRequest) (*driverv1.SetAttributesReply, error) {
	id, err := keyID(m.GetId())
	if err != nil {
		return nil, statusOf(err)
	}
	attrs := Attributes{Label: m.Label}
	if err := attrs.check(); err != nil {
		return nil, statusOf(err)
	}
	if err := s.driver.SetAttributes(ctx, id, attrs); err != nil {
		return nil, statusOf(err)
	}
	return &driverv1.SetAttributesReply{}, nil
}

func (s *server) Destroy(ctx context.Context, m *driverv1.DestroyRequest) (*driverv1.DestroyReply, error) {
	id, err := keyID(m.GetId())
	if err != nil {
		return nil, statusOf(err)
	}
	if err := s.driver.Destroy(ctx, id); err != nil {
		return nil, statusOf(err)
	}
	return &driverv1.DestroyReply{}, nil
}

func (s *server) CloneStep(ctx context.Context, m *driverv1.CloneStepRequest) (*driverv1.CloneStepReply, error) {
	req, err := cloneRequestOf(m)
	if err != nil {
		return nil, statusOf(err)
	}
	reply, err := s.driver.CloneStep(ctx, req)
	if err != nil {
		return nil, statusOf(err)
	}
	return wireCloneReply(reply), nil
}

func (s *server) Facts(ctx context.Context, _ *driverv1.FactsRequest) (*driverv1.FactsReply, error) {
	facts, err := s.driver.Facts(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	return &driverv1.FactsReply{Facts: wireFacts(facts)}, nil
}

func (s *server) Close(context.Context, *driverv1.CloseRequest) (*driverv1.CloseReply, error) {
	if err := s.driver.Close(); err != nil {
		return nil, statusOf(err)
	}
	return &driverv1.CloseReply{}, nil
}

// Commands serves the one command stream. A second one is refused: two cores that
// drive one driver would each believe that the token is theirs.
func (s *server) Commands(stream grpc.BidiStreamingServer[driverv1.CommandBatch, driverv1.ResultBatch]) error {
	if !s.busy.CompareAndSwap(false, true) {
		return status.Error(codes.FailedPrecondition, "this driver has a command stream already")
	}
	defer s.busy.Store(false)
	return serveCommands(s.driver, s.workers, stream)
}
