package group

import (
	"context"
	"time"

	"kmsd/pluginproto"
)

// handle is a Member: a link for the length of one stint.
type handle struct {
	g  *Group
	l  *link
	st stint
}

func (h *handle) Name() string                 { return h.l.m.cfg.Name }
func (h *handle) Token() pluginproto.TokenInfo { return h.l.token }

func (h *handle) List(ctx context.Context) ([]pluginproto.Object, error) {
	return call(ctx, h, errand[[]pluginproto.Object]{cost: costTransfer, run: h.l.conn.List})
}

func (h *handle) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	return call(ctx, h, errand[pluginproto.Object]{cost: costTransfer, run: func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Inspect(ctx, id)
	}})
}

func (h *handle) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	return call(ctx, h, errand[pluginproto.Object]{writes: true, cost: costGenerate, run: func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Generate(ctx, spec)
	}})
}

func (h *handle) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	_, err := call(ctx, h, errand[struct{}]{writes: true, cost: costTransfer, run: func(ctx context.Context) (struct{}, error) {
		return struct{}{}, h.l.conn.SetAttributes(ctx, id, attrs)
	}})
	return err
}

func (h *handle) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	_, err := call(ctx, h, errand[struct{}]{writes: true, cost: costTransfer, run: func(ctx context.Context) (struct{}, error) {
		return struct{}{}, h.l.conn.Destroy(ctx, id)
	}})
	return err
}

func (h *handle) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	return call(ctx, h, errand[pluginproto.CloneReply]{
		writes: req.Role == pluginproto.CloneTarget, cost: costTransfer,
		run: func(ctx context.Context) (pluginproto.CloneReply, error) { return h.l.conn.CloneStep(ctx, req) },
	})
}

func (h *handle) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	shared := copyCommand(cmd)
	return call(ctx, h, errand[pluginproto.Result]{
		cost:   costOf(cmd),
		run:    func(ctx context.Context) (pluginproto.Result, error) { return h.l.conn.Do(ctx, shared.Command) },
		finish: shared.release,
	})
}

// errand is one call of a driver.
type errand[T any] struct {
	writes bool // it changes keys on the token
	cost   int
	run    func(context.Context) (T, error)
	finish func() // called once, when run has returned or never will be; may be nil
}

type outcome[T any] struct {
	value T
	err   error
}

// call runs an errand for as long as its caller and the stint last. One that only
// reads ends with its caller. One that writes goes on to its end even when nobody
// waits for it, because the token does too; the next one waits for it.
func call[T any](ctx context.Context, h *handle, e errand[T]) (value T, err error) {
	defer func() {
		if err != nil {
			err = &MemberError{Member: h.Name(), Err: err}
		}
	}()
	done := make(chan outcome[T], 1)
	stop, err := start(ctx, h, e, done)
	if err != nil {
		if e.finish != nil {
			e.finish()
		}
		return value, err
	}
	if !e.writes {
		defer stop()
	}
	select {
	case o := <-done:
		if o.err != nil && !fromDriver(o.err) && h.l.ctx.Err() != nil {
			return value, h.ended()
		}
		return o.value, o.err
	case <-ctx.Done():
		return value, ctx.Err()
	case <-h.st.ctx.Done():
		return value, h.ended()
	}
}

// start runs an errand in a goroutine, when its turn has come. stop ends it.
func start[T any](ctx context.Context, h *handle, e errand[T], done chan<- outcome[T]) (stop context.CancelFunc, err error) {
	if err := h.enter(ctx, e.writes, e.cost); err != nil {
		return nil, err
	}
	runCtx, stop := h.context(ctx, e.writes)
	go func() {
		defer h.g.tasks.Done()
		defer stop()
		value, err := e.run(runCtx)
		h.leave(e.writes, e.cost, err)
		if e.finish != nil {
			e.finish()
		}
		done <- outcome[T]{value, err}
	}()
	return stop, nil
}

// enter waits for the turn of a call and counts it in; leave undoes it. The member
// owes its answer, as that of a command, so it is probed soon: commands go around a
// member that is busy with keys, and would not find out that it hangs.
func (h *handle) enter(ctx context.Context, writes bool, cost int) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case h.st.ctx.Err() != nil:
		return h.ended()
	}
	if writes {
		select {
		case h.l.writes <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		case <-h.st.ctx.Done():
			return h.ended()
		}
	}
	h.g.mu.Lock()
	defer h.g.mu.Unlock()
	var err error
	switch {
	case h.g.closed:
		err = ErrClosed
	case h.st.ctx.Err() != nil: // meanwhile; what the member holds is being looked at
		err = h.ended()
	default:
		h.l.load += cost
		h.g.oweLocked(h.l, time.Now())
		h.g.tasks.Add(1)
		return nil
	}
	if writes {
		<-h.l.writes
	}
	return err
}

// leave counts a call out and drops the member when it failed.
func (h *handle) leave(writes bool, cost int, err error) {
	h.g.mu.Lock()
	h.l.load -= cost
	h.l.due--
	if fromDriver(err) {
		h.l.heardLocked(time.Now())
	}
	if err != nil && pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		h.l.m.errors++
	}
	h.g.mu.Unlock()
	if err != nil && pluginproto.ClassOf(err) == pluginproto.ClassMember {
		h.g.drop(h.l, err)
	}
	if writes {
		<-h.l.writes
	}
}

// context is what a call runs under: the link's, and for one that only reads the
// caller's deadline.
func (h *handle) context(ctx context.Context, writes bool) (context.Context, context.CancelFunc) {
	if t, ok := ctx.Deadline(); ok && !writes {
		return context.WithDeadline(h.l.ctx, t)
	}
	return context.WithCancel(h.l.ctx)
}

// ended is why the stint is over, as a failure of the member's.
func (h *handle) ended() error {
	cause := context.Cause(h.st.ctx)
	if pluginproto.ClassOf(cause) == pluginproto.ClassMember {
		return cause
	}
	return &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
		Op: "calling a member that was lost", Msg: cause.Error(),
	}
}
