package pluginproto

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	driverv1 "kmsd/pluginproto/v1"
)

const (
	// heartbeatInterval is how long a command or call may run before the device is
	// asked whether it lives, and how often from then on.
	heartbeatInterval = 2 * time.Second

	// maxProbes run at once in a driver, beside the workers: a probe must not wait
	// behind what it is to find out about.
	maxProbes = 64
)

// batchStream is the driver's end of the command stream.
type batchStream interface {
	Context() context.Context
	Recv() (*driverv1.CommandBatch, error)
	Send(*driverv1.ResultBatch) error
}

// commandServer runs the commands of one stream on a driver.
type commandServer struct {
	driver  Driver
	workers int
	ctx     context.Context // ends with the stream
	out     *outbox[answer]
	group   sync.WaitGroup // everything started for the stream

	mu      sync.Mutex      // guards what follows
	held    map[uint64]*job // :: id → command taken in and not answered
	queue   []*job          // those of held that wait for a worker, oldest first
	queued  int             // bytes of input in queue
	running int             // workers
	probes  int             // probes running
}

// job is one command from its arrival to its answer.
type job struct {
	id       uint64
	cmd      Command
	since    time.Time
	deadline time.Time // zero: none

	// cancel ends the running call; nil while the job waits. Guarded by
	// commandServer.mu, as is dropped: nobody wants the answer.
	cancel  context.CancelFunc
	dropped bool
}

// size is how many bytes of input the job has.
func (j *job) size() int {
	n := len(j.cmd.Input)
	for _, it := range j.cmd.Items {
		n += len(it.Input)
	}
	return n
}

// answer is what waits to be sent: a result, or else a heartbeat.
type answer struct {
	result *driverv1.Result
	beat   uint64
}

// serveCommands returns when the stream has ended and everything that ran for it
// has, too.
func serveCommands(driver Driver, workers int, stream batchStream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	s := &commandServer{
		driver:  driver,
		workers: workers,
		ctx:     ctx,
		out:     newOutbox[answer](),
		held:    make(map[uint64]*job),
	}
	defer s.group.Wait()
	defer cancel()
	s.group.Go(func() { defer cancel(); s.send(stream) })
	s.group.Go(s.heartbeats)
	for {
		batch, err := stream.Recv()
		if err != nil {
			return nil // the core has gone, and there is nobody to tell
		}
		if err := s.accept(batch); err != nil {
			return err
		}
	}
}

// accept takes in one message. Its error is a breach of the protocol that ends the
// stream.
func (s *commandServer) accept(batch *driverv1.CommandBatch) error {
	now := time.Now()
	for _, m := range batch.GetCommands() {
		if m.GetId() == 0 {
			return status.Error(codes.InvalidArgument, "a command without id")
		}
		cmd, err := commandOf(m)
		if err != nil {
			s.out.put(answer{result: &driverv1.Result{Id: m.GetId(), Failure: failureOf(err)}}, maxText)
			continue
		}
		j := &job{id: m.GetId(), cmd: cmd, since: now}
		if left, ok := timeoutOf(m); ok {
			j.deadline = now.Add(left)
		}
		if err := s.enqueue(j); err != nil {
			return err
		}
	}
	for _, id := range batch.GetCancelled() {
		s.drop(id)
	}
	return nil
}

// enqueue starts a probe at once; another command waits for a worker, and one more
// of them is started while there are too few.
func (s *commandServer) enqueue(j *job) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[j.id] != nil {
		return status.Error(codes.InvalidArgument, "two commands with one id")
	}
	probe := j.cmd.Op == OpProbe
	if probe && s.probes >= maxProbes ||
		len(s.queue) >= maxQueued || s.queued+j.size() > maxQueuedBytes {
		s.out.put(answer{result: &driverv1.Result{Id: j.id, Failure: failureOf(
			Errorf(ClassBusy, j.cmd.Op.gerund(), "too many commands wait for the token"))}}, maxText)
		return nil
	}
	s.held[j.id] = j
	if probe {
		s.probes++
		s.group.Go(func() { s.run(j) })
		return nil
	}
	s.queue = append(s.queue, j)
	s.queued += j.size()
	if s.running < s.workers {
		s.running++
		s.group.Go(s.work)
	}
	return nil
}

// drop forgets a command that nobody waits for any more.
func (s *commandServer) drop(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.held[id]
	if j == nil {
		return
	}
	delete(s.held, id)
	j.dropped = true
	if j.cancel != nil {
		j.cancel()
	}
}

// work runs commands until none waits.
func (s *commandServer) work() {
	for j := s.next(); j != nil; j = s.next() {
		s.run(j)
	}
}

func (s *commandServer) next() *job {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 || s.ctx.Err() != nil {
		s.queue = nil
		s.running--
		return nil
	}
	j := s.queue[0]
	s.queue[0] = nil
	s.queue = s.queue[1:]
	s.queued -= j.size()
	return j
}

// run runs one command, unless nobody waits for it or its time is over, and puts
// the answer out.
func (s *commandServer) run(j *job) {
	ctx, cancel := s.begin(j)
	defer cancel()
	if ctx.Err() != nil {
		j.cmd.Wipe()
		s.finish(j, Result{}, ctx.Err())
		return
	}
	result, err := s.driver.Do(ctx, j.cmd)
	if ctx.Err() == nil {
		// Otherwise the C call may still be reading its input.
		j.cmd.Wipe()
	}
	s.finish(j, result, err)
}

func (s *commandServer) begin(j *job) (context.Context, context.CancelFunc) {
	ctx, cancel := s.ctx, context.CancelFunc(nil)
	if j.deadline.IsZero() {
		ctx, cancel = context.WithCancel(ctx)
	} else {
		ctx, cancel = context.WithDeadline(ctx, j.deadline)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	j.cancel = cancel
	if j.dropped {
		cancel()
	}
	return ctx, cancel
}

func (s *commandServer) finish(j *job, result Result, err error) {
	s.mu.Lock()
	if j.cmd.Op == OpProbe {
		s.probes-- // before anybody learns of it and sends another
	}
	dropped := j.dropped
	if !dropped {
		delete(s.held, j.id)
	}
	s.mu.Unlock()
	if dropped {
		result.Wipe()
		return
	}
	m := &driverv1.Result{Id: j.id}
	if err != nil {
		m.Failure = failureOf(err)
		s.out.put(answer{result: m}, maxText)
		return
	}
	m.Output, m.Iv, m.Items = result.Output, result.IV, wireItems(result.Items)
	size := len(result.Output) + resultOverhead
	for _, it := range result.Items {
		size += len(it.Output) + resultOverhead
	}
	s.out.put(answer{result: m}, size)
}

// resultOverhead and commandOverhead bound what a message takes beside its bytes.
const (
	resultOverhead  = 64
	commandOverhead = 96
)

// send writes what gathers until the stream ends. Outputs are wiped once they are
// sent: gRPC has made its own copy by then.
func (s *commandServer) send(stream batchStream) {
	var batch driverv1.ResultBatch
	var answers []answer
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.out.ready:
		}
		answers = s.out.take(answers[:0])
		if len(answers) == 0 {
			continue
		}
		batch.Results, batch.Heartbeats = batch.Results[:0], batch.Heartbeats[:0]
		for _, a := range answers {
			if a.result != nil {
				batch.Results = append(batch.Results, a.result)
			} else {
				batch.Heartbeats = append(batch.Heartbeats, a.beat)
			}
		}
		err := stream.Send(&batch)
		for _, r := range batch.Results {
			wipeResult(r)
		}
		clear(batch.Results)
		clear(answers)
		if err != nil {
			return
		}
	}
}

// heartbeats speaks for commands that run long, as long as the device itself
// answers: that this process runs proves nothing about its HSM.
func (s *commandServer) heartbeats() {
	tick := time.NewTicker(heartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if len(s.heldLong()) == 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(s.ctx, heartbeatInterval)
		_, err := s.driver.Do(ctx, Command{Op: OpProbe})
		cancel()
		if err != nil {
			continue // silence is the message
		}
		for _, id := range s.heldLong() {
			s.out.put(answer{beat: id}, resultOverhead)
		}
	}
}

// heldLong returns the commands that have been here for longer than a heartbeat
// interval. Probes are not among them: they are what a heartbeat stands on.
func (s *commandServer) heldLong() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []uint64
	for id, j := range s.held {
		if j.cmd.Op != OpProbe && time.Since(j.since) >= heartbeatInterval {
			ids = append(ids, id)
		}
	}
	return ids
}
