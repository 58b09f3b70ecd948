package pluginproto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	driverv1 "kmsd/pluginproto/v1"
)

// resultStream is the core's end of the command stream. Its end is the end of the
// driver.
type resultStream interface {
	Context() context.Context
	Send(*driverv1.CommandBatch) error
	Recv() (*driverv1.ResultBatch, error)
}

// commandClient sends the commands of all callers over one stream and gives each
// its answer.
type commandClient struct {
	stream resultStream
	opts   ClientOptions
	out    *outbox[request]
	ended  chan struct{}  // closed when nothing more will be answered
	group  sync.WaitGroup // the reader and the writer

	calls    sync.Pool // of *call
	messages sync.Pool // of *message

	mu      sync.Mutex // guards what follows
	lastID  uint64
	pending map[uint64]*call // :: id → caller that waits
	failure *Error           // why nothing more is answered; nil while all is well
	heard   time.Time        // when the driver last sent answers or heartbeats; zero: never
}

// call is one caller that waits.
type call struct {
	done  chan outcome // holds one; written under commandClient.mu by whoever takes the call out of pending
	timer *time.Timer  // reset under commandClient.mu while the call is pending
	due   time.Time    // when the timer fires, unless this process is stopped
	since time.Time
	asked question
}

type outcome struct {
	result Result
	err    error
}

// request is what waits to be sent: a command, or else the id of one that nobody
// waits for any more.
type request struct {
	message   *message
	cancelled uint64
}

// message is one command on its way out, in a buffer of its own: a caller that
// stops waiting may wipe its input at once.
type message struct {
	wire     driverv1.Command
	buf      []byte
	items    []*driverv1.Item // kept for the next command that has some
	deadline time.Time        // zero: none
}

// keepBuffer is the largest buffer kept for the next command, in bytes.
const keepBuffer = 16 << 10

func startCommandClient(stream resultStream, opts ClientOptions) *commandClient {
	c := &commandClient{
		stream:  stream,
		opts:    opts,
		out:     newOutbox[request](),
		ended:   make(chan struct{}),
		pending: make(map[uint64]*call),
	}
	c.calls.New = func() any {
		timer := time.NewTimer(time.Hour)
		timer.Stop()
		return &call{done: make(chan outcome, 1), timer: timer}
	}
	c.messages.New = func() any { return new(message) }
	c.group.Go(c.send)
	c.group.Go(c.receive)
	return c
}

// wait returns when the reader and the writer have ended, after the stream has.
func (c *commandClient) wait() { c.group.Wait() }

// do runs one command: it puts it out, and waits for the answer, the caller's
// context or the timer, whichever is first.
func (c *commandClient) do(ctx context.Context, cmd Command) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("%s: %w", cmd.Op.gerund(), err)
	}
	if err := cmd.Check(); err != nil {
		return Result{}, err
	}
	w := c.calls.Get().(*call)
	defer c.calls.Put(w)
	w.asked = questionOf(&cmd)
	id, err := c.enter(w)
	if err != nil {
		return Result{}, err
	}
	defer w.timer.Stop()
	m := c.encode(ctx, id, &cmd)
	if !c.out.put(request{message: m}, len(m.buf)+commandOverhead*(1+len(cmd.Items))) {
		c.recycle(m) // the driver is lost, and the reader is about to say why
	}

	var late error
	for late == nil {
		select {
		case o := <-w.done:
			return o.result, o.err
		case <-ctx.Done():
			late = fmt.Errorf("%s: %w", cmd.Op.gerund(), ctx.Err())
		case <-w.timer.C:
			late = c.lateness(w)
		}
	}
	if !c.leave(id) {
		o := <-w.done // the answer came in this moment
		return o.result, o.err
	}
	c.out.put(request{cancelled: id}, resultOverhead)
	return Result{}, late
}

// overslept is how late a timer has to fire to show that this process was stopped, or
// starved of time.
const overslept = 500 * time.Millisecond

// arm sets the timer of a call. Called with commandClient.mu held.
func (w *call) arm(d time.Duration) {
	w.due = time.Now().Add(d)
	w.timer.Reset(d)
}

// lateness is the failure of a call whose timer has fired; nil when it has more time.
// If it is this process that was stopped, the answer may be waiting to be read, so the
// driver gets its time again.
func (c *commandClient) lateness(w *call) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	switch late := now.Sub(w.due); {
	case late < 0: // a heartbeat has come in this moment
		return nil
	case late >= overslept:
		w.since = w.since.Add(late)
		w.arm(min(c.opts.CommandTimeout, max(c.opts.Cap-now.Sub(w.since), overslept)))
		return nil
	case now.Sub(w.since) >= c.opts.Cap:
		return endless(w.asked.op.gerund(), c.opts.Cap)
	default:
		return silent(w.asked.op.gerund(), c.opts.CommandTimeout)
	}
}

// enter counts the caller in and starts its timer.
func (c *commandClient) enter(w *call) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil {
		return 0, c.failureOf(w)
	}
	c.lastID++
	w.since = time.Now()
	w.arm(min(c.opts.CommandTimeout, c.opts.Cap))
	c.pending[c.lastID] = w
	return c.lastID, nil
}

func (c *commandClient) lastHeard() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard
}

// leave reports whether the caller was still waited for.
func (c *commandClient) leave(id uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, waiting := c.pending[id]
	delete(c.pending, id)
	return waiting
}

// failureOf is the stream's failure as the failure of one command. Called with mu
// held.
func (c *commandClient) failureOf(w *call) error {
	e := *c.failure
	e.Op = w.asked.op.gerund()
	return &e
}

func (c *commandClient) encode(ctx context.Context, id uint64, cmd *Command) *message {
	m := c.messages.Get().(*message)
	m.deadline, _ = ctx.Deadline()
	m.buf = m.buf[:0]
	hold := func(b []byte) []byte {
		m.buf = append(m.buf, b...)
		return m.buf[len(m.buf)-len(b):]
	}
	need := len(cmd.Key) + len(cmd.Input) + len(cmd.IV) + len(cmd.AAD) + len(cmd.Signature)
	for _, it := range cmd.Items {
		need += len(it.Input) + len(it.IV) + len(it.AAD)
	}
	if cap(m.buf) < need {
		m.buf = make([]byte, 0, need)
	}
	w := &m.wire
	w.Id = id
	w.Op = driverv1.Op(cmd.Op)
	w.Mechanism = driverv1.Mechanism(cmd.Mech)
	w.Hash = driverv1.Hash(cmd.Hash)
	w.Key = nil
	if cmd.Op != OpRandom && cmd.Op != OpProbe {
		w.Key = hold(cmd.Key[:])
	}
	w.Input = hold(cmd.Input)
	w.Iv = hold(cmd.IV)
	w.Aad = hold(cmd.AAD)
	w.Signature = hold(cmd.Signature)
	w.Length = uint32(cmd.Length)
	for len(m.items) < len(cmd.Items) {
		m.items = append(m.items, new(driverv1.Item))
	}
	w.Items = m.items[:len(cmd.Items)]
	for i, it := range cmd.Items {
		w.Items[i].Input, w.Items[i].Iv, w.Items[i].Aad = hold(it.Input), hold(it.IV), hold(it.AAD)
	}
	return m
}

// send writes what gathers until the stream ends. What is left then is wiped.
func (c *commandClient) send() {
	defer func() { c.recycleAll(c.out.close()) }()
	var batch driverv1.CommandBatch
	var requests []request
	for {
		select {
		case <-c.ended:
			return
		case <-c.out.ready:
		}
		requests = c.out.take(requests[:0])
		if len(requests) == 0 {
			continue
		}
		c.fill(&batch, requests)
		err := c.stream.Send(&batch)
		clear(batch.Commands)
		c.recycleAll(requests)
		if err != nil {
			return // the reader learns why
		}
	}
}

// fill makes a batch of requests, without the commands whose time is over: their
// callers have left.
func (c *commandClient) fill(batch *driverv1.CommandBatch, requests []request) {
	batch.Commands, batch.Cancelled = batch.Commands[:0], batch.Cancelled[:0]
	now := time.Now()
	for _, r := range requests {
		if r.message == nil {
			batch.Cancelled = append(batch.Cancelled, r.cancelled)
			continue
		}
		r.message.wire.TimeoutUs = 0
		if !r.message.deadline.IsZero() {
			left := r.message.deadline.Sub(now).Microseconds()
			if left <= 0 {
				continue
			}
			r.message.wire.TimeoutUs = left
		}
		batch.Commands = append(batch.Commands, &r.message.wire)
	}
}

func (c *commandClient) recycleAll(requests []request) {
	for _, r := range requests {
		if r.message != nil {
			c.recycle(r.message)
		}
	}
	clear(requests)
}

// recycle wipes a message that has been sent and keeps it for another command.
func (c *commandClient) recycle(m *message) {
	clear(m.buf)
	if cap(m.buf) > keepBuffer {
		m.buf = nil
	}
	c.messages.Put(m)
}

// receive hands out answers until the stream ends, and then the end itself.
func (c *commandClient) receive() {
	for {
		batch, err := c.stream.Recv()
		if err != nil {
			c.fail(err)
			return
		}
		c.deliver(batch)
	}
}

// deliver gives each answer to its caller and re-arms the timers of the commands
// that a heartbeat names. An id that nobody waits for belonged to a caller that has
// left.
func (c *commandClient) deliver(batch *driverv1.ResultBatch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = time.Now()
	for _, m := range batch.GetResults() {
		w := c.pending[m.GetId()]
		if w == nil {
			wipeResult(m)
			continue
		}
		delete(c.pending, m.GetId())
		result, err := resultOf(&w.asked, m)
		w.done <- outcome{result, err}
	}
	for _, id := range batch.GetHeartbeats() {
		if w := c.pending[id]; w != nil {
			if left := c.opts.Cap - time.Since(w.since); left > 0 {
				w.arm(min(c.opts.CommandTimeout, left))
			}
		}
	}
}

// fail ends every command that waits, and every one to come.
func (c *commandClient) fail(err error) {
	failure := gone("")
	if !errors.Is(err, io.EOF) {
		// Never a context error: the stream's own context is not a caller's.
		errors.As(errorOfCall(context.Background(), "", err), &failure)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failure = failure
	for id, w := range c.pending {
		delete(c.pending, id)
		w.done <- outcome{err: c.failureOf(w)}
	}
	close(c.ended)
}
