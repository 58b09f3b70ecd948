package pluginproto

import (
	"context"
	"io"
	"sync"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/proto"

	driverv1 "kmsd/pluginproto/v1"
)

// pipe is one end of a command stream whose other end is the test: Send gives each
// message to the test, in a copy, and waits until it is taken, as a slow connection
// does.
type pipe[Out proto.Message, In any] struct {
	ctx  context.Context
	sent chan Out
	in   chan In
}

func newPipe[Out proto.Message, In any](ctx context.Context) *pipe[Out, In] {
	return &pipe[Out, In]{ctx: ctx, sent: make(chan Out), in: make(chan In)}
}

func (p *pipe[Out, In]) Context() context.Context { return p.ctx }

func (p *pipe[Out, In]) Send(m Out) error {
	select {
	case p.sent <- proto.CloneOf(m):
		return nil
	case <-p.ctx.Done():
		return io.EOF
	}
}

func (p *pipe[Out, In]) Recv() (In, error) {
	select {
	case m := <-p.in:
		return m, nil
	case <-p.ctx.Done():
		var none In
		return none, io.EOF
	}
}

// probes is a driver that only answers probes.
type probes struct{ Driver }

func (probes) Do(context.Context, Command) (Result, error) { return Result{}, nil }

func TestCommandsGatherWhileAMessageIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stream := newPipe[*driverv1.CommandBatch, *driverv1.ResultBatch](ctx)
		c := startCommandClient(stream, ClientOptions{}.withDefaults())
		var callers sync.WaitGroup
		call := func() {
			callers.Go(func() {
				if _, err := c.do(t.Context(), Command{Op: OpProbe}); err != nil {
					t.Error(err)
				}
			})
		}
		call()
		synctest.Wait() // the first command is being sent
		for range 99 {
			call()
		}
		synctest.Wait()
		for _, want := range []int{1, 99} {
			answers := new(driverv1.ResultBatch)
			for _, m := range (<-stream.sent).GetCommands() {
				answers.Results = append(answers.Results, &driverv1.Result{Id: m.GetId()})
			}
			if got := len(answers.Results); got != want {
				t.Errorf("a message with %d commands, want %d", got, want)
			}
			stream.in <- answers
		}
		callers.Wait()
		cancel()
		c.wait()
	})
}

func TestResultsGatherWhileAMessageIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stream := newPipe[*driverv1.ResultBatch, *driverv1.CommandBatch](ctx)
		served := make(chan error)
		go func() { served <- serveCommands(probes{}, 4, stream) }()
		next := uint64(0)
		send := func(n int) {
			batch := new(driverv1.CommandBatch)
			for range n {
				next++
				batch.Commands = append(batch.Commands, &driverv1.Command{Id: next, Op: driverv1.Op_OP_RANDOM, Length: 1})
			}
			stream.in <- batch
			synctest.Wait()
		}
		send(1)
		send(50)
		send(49)
		for _, want := range []int{1, 99} {
			if got := len((<-stream.sent).GetResults()); got != want {
				t.Errorf("a message with %d results, want %d", got, want)
			}
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

func TestMessagesStayUnderTheirLimit(t *testing.T) {
	o := newOutbox[int]()
	for i := range 10 {
		o.put(i, maxBatch/4)
	}
	o.put(10, maxBatch*2) // alone is larger than a batch, and goes alone
	o.put(11, 1)
	var sizes []int
	next := 0
	for len(o.ready) > 0 {
		<-o.ready
		batch := o.take(nil)
		for _, item := range batch {
			if item != next {
				t.Errorf("item %d came after %d", item, next-1)
			}
			next = item + 1
		}
		if len(batch) > 0 {
			sizes = append(sizes, len(batch))
		}
	}
	if want := []int{4, 4, 2, 1, 1}; len(sizes) != len(want) || next != 12 {
		t.Errorf("batches of %v, want %v", sizes, want)
	}
	if o.bytes != 0 || len(o.sizes) != 0 {
		t.Errorf("%d bytes in %d items are left in the account", o.bytes, len(o.sizes))
	}
}

func TestBreachesOfTheProtocolEndTheStream(t *testing.T) {
	for name, commands := range map[string][]*driverv1.Command{
		"a command without id":     {{Op: driverv1.Op_OP_PROBE}},
		"two commands with one id": {{Id: 1, Op: driverv1.Op_OP_RANDOM, Length: 1}, {Id: 1, Op: driverv1.Op_OP_RANDOM, Length: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				stream := newPipe[*driverv1.ResultBatch, *driverv1.CommandBatch](ctx)
				served := make(chan error)
				go func() { served <- serveCommands(probes{}, 0, stream) }()
				stream.in <- &driverv1.CommandBatch{Commands: commands}
				synctest.Wait()
				cancel() // the pipe knows no end but this; gRPC ends the stream with the error
				if err := <-served; err == nil {
					t.Error("it was accepted")
				}
			})
		})
	}
}

func TestFullQueuesAnswerBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &commandServer{out: newOutbox[answer](), held: make(map[uint64]*job), ctx: t.Context()}
		input := make([]byte, MaxInput)
		n := uint64(0)
		for len(s.out.ready) == 0 { // no workers: nothing leaves the queue
			n++
			if err := s.enqueue(&job{id: n, cmd: Command{Op: OpMAC, Mech: HMAC, Input: input}}); err != nil {
				t.Fatal(err)
			}
		}
		if want := uint64(maxQueuedBytes/MaxInput + 1); n != want {
			t.Errorf("command %d was refused, want %d", n, want)
		}
		refused := s.out.take(nil)[0].result
		if err := errorOf(refused.GetFailure()); refused.GetId() != n || ClassOf(err) != ClassBusy {
			t.Errorf("the answer to %d is %v, want one of class busy", refused.GetId(), err)
		}
	})
}

// parked is a driver whose probes wait until one is let go.
type parked struct {
	Driver
	next chan struct{}
}

func (p parked) Do(ctx context.Context, _ Command) (Result, error) {
	select {
	case <-p.next:
		return Result{}, nil
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
}

// Who has the answer to a probe may send another one, however many others wait.
func TestAnAnsweredProbeMakesRoomForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stream := newPipe[*driverv1.ResultBatch, *driverv1.CommandBatch](ctx)
		served := make(chan error)
		driver := parked{next: make(chan struct{})}
		go func() { served <- serveCommands(driver, 1, stream) }()
		probe := func(id int) {
			stream.in <- &driverv1.CommandBatch{Commands: []*driverv1.Command{{Id: uint64(id), Op: driverv1.Op_OP_PROBE}}}
		}
		for i := range maxProbes {
			probe(1 + i)
		}
		for i := range 500 {
			driver.next <- struct{}{}
			if r := (<-stream.sent).GetResults(); len(r) != 1 || r[0].GetFailure() != nil {
				t.Errorf("probe %d: %v", i, r)
				break
			}
			probe(1 + maxProbes + i)
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}
