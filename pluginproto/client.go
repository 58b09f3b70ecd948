package pluginproto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"

	driverv1 "kmsd/pluginproto/v1"
)

// ClientOptions are the times a Client goes by.
type ClientOptions struct {
	// CommandTimeout is how long a command or call may go without an answer and
	// without a sign of life from the device. Zero means 20 s, as a Luna client has.
	CommandTimeout time.Duration
	// Cap ends even a command whose device shows signs of life. Zero means 10 min.
	Cap time.Duration
}

func (o ClientOptions) withDefaults() ClientOptions {
	if o.CommandTimeout <= 0 {
		o.CommandTimeout = 20 * time.Second
	}
	if o.Cap <= 0 {
		o.Cap = 10 * time.Minute
	}
	return o
}

// closeTimeout is what a driver gets for logging out; its process is ended anyway.
const closeTimeout = 5 * time.Second

// Client is the core's end of the wall: a [Driver] whose token is in another
// process. Once its connection or its command stream is lost, every call fails with
// [ClassMember]; a new process and a new Client take its place.
type Client struct {
	rpc      driverv1.DriverClient
	opts     ClientOptions
	ctx      context.Context // ends with Close; the command stream lives by it
	cancel   context.CancelFunc
	callOpts []grpc.CallOption

	mu       sync.Mutex     // guards what follows
	commands *commandClient // nil until the token is open
	opened   bool           // Open was called
	closed   bool
}

var _ Driver = (*Client)(nil)

// NewClient makes a Client on a connection. The connection stays the caller's; when
// it is closed, the Client's goroutines end.
func NewClient(conn grpc.ClientConnInterface, opts ClientOptions) *Client {
	ctx, cancel := context.WithCancel(context.Background())
	return &Client{
		rpc:    driverv1.NewDriverClient(conn),
		opts:   opts.withDefaults(),
		ctx:    ctx,
		cancel: cancel,
		callOpts: []grpc.CallOption{
			grpc.MaxCallRecvMsgSize(maxMessage),
			grpc.MaxCallSendMsgSize(maxMessage),
		},
	}
}

// Open opens the token and then the command stream. It has three times the command
// timeout: nothing can be asked for a sign of life before it is done.
func (c *Client) Open(ctx context.Context, req OpenRequest) (TokenInfo, error) {
	const op = "opening the token"
	if err := req.check(); err != nil {
		return TokenInfo{}, err
	}
	if err := c.enterOpen(op); err != nil {
		return TokenInfo{}, err
	}
	open, cancel := context.WithTimeoutCause(ctx, 3*c.opts.CommandTimeout,
		silent(op, 3*c.opts.CommandTimeout))
	defer cancel()
	m, err := c.rpc.Open(open, &driverv1.OpenRequest{Settings: req.Settings, Pin: req.PIN, Domain: req.Domain}, c.callOpts...)
	if err != nil {
		return TokenInfo{}, c.callError(ctx, open, op, err)
	}
	if len(m.GetDomainCheck()) > maxCheckValue {
		return TokenInfo{}, badReply("a domain check value of %d bytes", len(m.GetDomainCheck()))
	}
	if err := c.startCommands(); err != nil {
		return TokenInfo{}, err
	}
	return TokenInfo{
		Label:        text(m.GetLabel()),
		Serial:       text(m.GetSerial()),
		Manufacturer: text(m.GetManufacturer()),
		Model:        text(m.GetModel()),
		Firmware:     text(m.GetFirmware()),
		DomainCheck:  m.GetDomainCheck(),
		Driver:       text(m.GetDriver()),
		Mechanisms:   mechanismsOf(m.GetMechanisms()),
		Cloning:      protocolsOf(m.GetCloning()),
		Facts:        factsOf(m.GetFacts()),
	}, nil
}

func (c *Client) enterOpen(op string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.opened || c.closed {
		return Errorf(ClassCaller, op, "a driver is opened once; start another one")
	}
	c.opened = true
	return nil
}

func (c *Client) startCommands() error {
	stream, err := c.rpc.Commands(c.ctx, c.callOpts...)
	if err != nil {
		return errorOfCall(context.Background(), "opening the command stream", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.commands = startCommandClient(stream, c.opts)
	return nil
}

// List implements [Driver].
func (c *Client) List(ctx context.Context) ([]Object, error) {
	var objects []Object
	err := c.call(ctx, "listing the keys", func(ctx context.Context) error {
		objects = nil
		stream, err := c.rpc.List(ctx, &driverv1.ListRequest{}, c.callOpts...)
		if err != nil {
			return err
		}
		seen := make(map[KeyID]bool)
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			for _, mo := range m.GetObjects() {
				o, err := objectOf(mo)
				if err != nil {
					return err
				}
				if seen[o.ID] {
					return badReply("key %s is listed twice", o.ID)
				}
				if len(objects) >= maxObjects {
					return badReply("more than %d keys", maxObjects)
				}
				seen[o.ID] = true
				objects = append(objects, o)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return objects, nil
}

// Inspect implements [Driver].
func (c *Client) Inspect(ctx context.Context, id KeyID) (o Object, err error) {
	err = c.call(ctx, "inspecting a key", func(ctx context.Context) error {
		m, err := c.rpc.Inspect(ctx, &driverv1.InspectRequest{Id: id[:]}, c.callOpts...)
		if err != nil {
			return err
		}
		o, err = answered(id, m)
		return err
	})
	return o, err
}

// Generate implements [Driver].
func (c *Client) Generate(ctx context.Context, spec KeySpec) (o Object, err error) {
	if err := spec.check(); err != nil {
		return Object{}, err
	}
	err = c.call(ctx, "generating a key", func(ctx context.Context) error {
		m, err := c.rpc.Generate(ctx, &driverv1.GenerateRequest{Id: spec.ID[:], Type: string(spec.Type), Label: spec.Label}, c.callOpts...)
		if err != nil {
			return err
		}
		o, err = answered(spec.ID, m)
		if err == nil && o.Type != spec.Type {
			err = badReply("asked for a key of type %s, got %s", spec.Type, o.Type)
		}
		return err
	})
	return o, err
}

// SetAttributes implements [Driver].
func (c *Client) SetAttributes(ctx context.Context, id KeyID, attrs Attributes) error {
	if err := attrs.check(); err != nil {
		return err
	}
	return c.call(ctx, "setting attributes", func(ctx context.Context) error {
		_, err := c.rpc.SetAttributes(ctx, &driverv1.SetAttributesRequest{Id: id[:], Label: attrs.Label}, c.callOpts...)
		return err
	})
}

// Destroy implements [Driver].
func (c *Client) Destroy(ctx context.Context, id KeyID) error {
	return c.call(ctx, "destroying a key", func(ctx context.Context) error {
		_, err := c.rpc.Destroy(ctx, &driverv1.DestroyRequest{Id: id[:]}, c.callOpts...)
		return err
	})
}

// CloneStep implements [Driver].
func (c *Client) CloneStep(ctx context.Context, req CloneRequest) (reply CloneReply, err error) {
	if err := req.check(); err != nil {
		return CloneReply{}, err
	}
	err = c.call(ctx, cloneOp, func(ctx context.Context) error {
		m, err := c.rpc.CloneStep(ctx, wireCloneRequest(req), c.callOpts...)
		if err != nil {
			return err
		}
		reply, err = cloneReplyOf(req, m)
		return err
	})
	return reply, err
}

// Facts implements [Driver].
func (c *Client) Facts(ctx context.Context) (facts []Fact, err error) {
	err = c.call(ctx, "asking for facts", func(ctx context.Context) error {
		m, err := c.rpc.Facts(ctx, &driverv1.FactsRequest{}, c.callOpts...)
		facts = factsOf(m.GetFacts())
		return err
	})
	return facts, err
}

// Do implements [Driver].
func (c *Client) Do(ctx context.Context, cmd Command) (Result, error) {
	c.mu.Lock()
	commands, closed := c.commands, c.closed
	c.mu.Unlock()
	switch {
	case closed:
		return Result{}, Errorf(ClassMember, cmd.Op.gerund(), "the driver is closed")
	case commands == nil:
		return Result{}, Errorf(ClassMember, cmd.Op.gerund(), "the token is not open")
	}
	return commands.do(ctx, cmd)
}

// LastHeard is when the driver last sent an answer or a heartbeat on the command
// stream; zero when it never did.
func (c *Client) LastHeard() time.Time {
	c.mu.Lock()
	commands := c.commands
	c.mu.Unlock()
	if commands == nil {
		return time.Time{}
	}
	return commands.lastHeard()
}

// Close asks the driver to log out and ends the command stream. It does not end the
// process: that is the supervisor's.
func (c *Client) Close() error {
	c.mu.Lock()
	commands, closed := c.commands, c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, closeTimeout)
	defer cancel()
	_, err := c.rpc.Close(ctx, &driverv1.CloseRequest{}, c.callOpts...)
	if err != nil {
		err = errorOfCall(c.ctx, "closing the driver", err)
	}
	c.cancel()
	if commands != nil {
		commands.wait()
	}
	return err
}

// call makes one rare call. While it runs for longer than a heartbeat interval, the
// device is probed over the command stream, and each answer re-arms the timer, as
// the driver's heartbeats do for commands.
func (c *Client) call(ctx context.Context, op string, fn func(context.Context) error) error {
	running, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if err := c.watch(running, op); err != nil {
			cancel(err)
		}
	}()
	err := fn(running)
	defer func() { <-watched }()
	defer cancel(nil)
	if err == nil {
		return nil
	}
	return c.callError(ctx, running, op, err)
}

// callError says why a call failed: because ctx ended, because running, which is made
// from it, was ended by its own timer, or as the driver or the connection says.
func (c *Client) callError(ctx, running context.Context, op string, err error) error {
	if d, ok := running.Deadline(); ok && !time.Now().Before(d) {
		<-running.Done() // it is due: the driver was told the same time, and may be first to break off
	}
	var e *Error
	switch {
	case errors.As(err, &e): // a reply that was refused
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", op, ctx.Err())
	case errors.As(context.Cause(running), &e):
		return e
	default:
		return errorOfCall(ctx, op, err)
	}
}

// watch returns nil when ctx ends, and an error when the call under it has gone
// without a sign of life for too long.
func (c *Client) watch(ctx context.Context, op string) error {
	tick := time.NewTicker(min(heartbeatInterval, c.opts.CommandTimeout))
	defer tick.Stop()
	start := time.Now()
	alive, looked := start, start
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if c.probe(ctx) {
			alive = time.Now()
		}
		now := time.Now()
		if now.Sub(looked) >= 3*heartbeatInterval { // this process was stopped, not the driver
			alive = now
		}
		looked = now
		switch {
		case ctx.Err() != nil:
			return nil
		case now.Sub(alive) >= c.opts.CommandTimeout:
			return silent(op, c.opts.CommandTimeout)
		case now.Sub(start) >= c.opts.Cap:
			return endless(op, c.opts.Cap)
		}
	}
}

func (c *Client) probe(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, heartbeatInterval)
	defer cancel()
	_, err := c.Do(ctx, Command{Op: OpProbe})
	return err == nil
}

// silent is the failure of what had no answer and no sign of life for d.
func silent(op string, d time.Duration) *Error {
	e := Errorf(ClassMember, op, "no answer and no sign of life from the token for %v", d)
	e.CKR = CKRDeviceError
	return e
}

// endless is the failure of what is not done after d although the token lives.
func endless(op string, d time.Duration) *Error {
	e := Errorf(ClassMember, op, "not done after %v, although the token shows signs of life", d)
	e.CKR = CKRDeviceError
	return e
}
