package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kmsd/pluginproto"
)

// turnPatience is how long a call waits for an earlier one that changes keys. What
// takes longer is the generation of a pair, or hangs, and its caller may wait for it;
// nobody else should.
const turnPatience = 2 * time.Second

// handle is a Member: a link for the length of one stint.
type handle struct {
	g  *Group
	l  *link
	st stint
}

func (h *handle) Name() string                 { return h.l.m.cfg.Name }
func (h *handle) Token() pluginproto.TokenInfo { return h.l.token }

func (h *handle) List(ctx context.Context) ([]pluginproto.Object, error) {
	return call(ctx, h, errand[[]pluginproto.Object]{cost: costTransfer, limit: slowLimit, run: h.l.conn.List})
}

func (h *handle) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	return call(ctx, h, errand[pluginproto.Object]{cost: costTransfer, run: func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Inspect(ctx, id)
	}})
}

func (h *handle) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	e := errand[pluginproto.Object]{writes: true, cost: costOfKey(spec.Type), run: func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Generate(ctx, spec)
	}}
	if !spec.Type.Symmetric() {
		e.limit = slowLimit
	}
	return call(ctx, h, e)
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
	e := errand[pluginproto.CloneReply]{
		cost: costTransfer,
		run:  func(ctx context.Context) (pluginproto.CloneReply, error) { return h.l.conn.CloneStep(ctx, req) },
	}
	if len(req.Keys) > 1 {
		e.limit = slowLimit
	}
	switch {
	case req.End:
	case req.Role == pluginproto.CloneTarget:
		e.writes = true
	default:
		e.uses = req.Keys
	}
	return call(ctx, h, e)
}

func (h *handle) Facts(ctx context.Context) ([]pluginproto.Fact, error) {
	return call(ctx, h, errand[[]pluginproto.Fact]{cost: costTransfer, run: h.l.conn.Facts})
}

func (h *handle) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	shared := copyCommand(cmd)
	return call(ctx, h, errand[pluginproto.Result]{
		cost:   commandCosts[effortOf(cmd)],
		uses:   []pluginproto.KeyID{cmd.Key},
		run:    func(ctx context.Context) (pluginproto.Result, error) { return h.l.conn.Do(ctx, shared.Command) },
		finish: shared.release,
	})
}

// errand is one call of a driver.
type errand[T any] struct {
	writes bool                // it changes keys on the token
	uses   []pluginproto.KeyID // the keys whose copies have to be sound
	cost   int
	limit  time.Duration // after which the member is dropped; zero: the command timeout
	run    func(context.Context) (T, error)
	finish func() // called once, when run has returned or never will be; may be nil
}

// turn is one errand's, from enter to leave.
type turn struct {
	writes bool
	cost   int // what it counts for when a member is chosen
	began  time.Time

	// Guarded by Group.mu:
	abandoned bool        // nobody waits for it any more
	over      bool        // it has ended
	late      *time.Timer // drops the member when it does not end
}

type outcome[T any] struct {
	value T
	err   error
}

// call runs an errand for as long as its caller and the stint last. One that only
// reads ends with its caller. One that writes goes on to its end even when nobody
// waits for it, because the token does too; the next one waits for it, for a while.
// A member that has not ended an errand in its time is dropped: only the end of its
// driver is sure to end the errand too.
func call[T any](ctx context.Context, h *handle, e errand[T]) (value T, err error) {
	defer func() {
		if me := (*MemberError)(nil); err != nil && !errors.As(err, &me) {
			err = &MemberError{Member: h.Name(), Err: err}
		}
	}()
	done := make(chan outcome[T], 1)
	t, stop, err := start(ctx, h, e, done)
	if err != nil {
		if e.finish != nil {
			e.finish()
		}
		return value, err
	}
	if !e.writes {
		defer stop()
	}
	var o outcome[T]
	select {
	case o = <-done:
	case <-ctx.Done():
		if !h.abandon(t) {
			return value, ctx.Err()
		}
		o = <-done
	case <-h.st.ctx.Done():
		if !h.abandon(t) {
			return value, h.ended()
		}
		o = <-done
	}
	if o.err != nil && !fromDriver(o.err) && h.l.ctx.Err() != nil {
		return value, h.ended()
	}
	return o.value, o.err
}

// start runs an errand in a goroutine, when its turn has come. stop ends it.
func start[T any](ctx context.Context, h *handle, e errand[T], done chan<- outcome[T]) (t *turn, stop context.CancelFunc, err error) {
	t = &turn{writes: e.writes, cost: h.g.weigh(e.cost)}
	if err := h.enter(ctx, t, e.uses); err != nil {
		return nil, nil, err
	}
	limit := e.limit
	if limit == 0 {
		limit = h.g.cfg.CommandTimeout
	}
	runCtx, stop := h.context(ctx, e.writes)
	go func() {
		defer h.g.tasks.Done()
		defer stop()
		h.g.mu.Lock()
		h.timeLocked(t, limit)
		h.g.mu.Unlock()
		value, err := e.run(runCtx)
		h.leave(t, err)
		if e.finish != nil {
			e.finish()
		}
		done <- outcome[T]{value, err}
	}()
	return t, stop, nil
}

// timeLocked has the member dropped when a call has not ended in its time. After this process
// itself was stopped, or starved of time, the call gets its time anew: the answer may be
// waiting to be read.
func (h *handle) timeLocked(t *turn, limit time.Duration) {
	begun := time.Now()
	t.late = time.AfterFunc(limit, func() {
		h.g.mu.Lock()
		defer h.g.mu.Unlock()
		switch {
		case t.over:
		case h.g.stoppedLocked(h.l, time.Now()) || h.l.resumed.After(begun):
			h.timeLocked(t, limit)
		default:
			h.g.dropLocked(h.l, overran(limit))
		}
	})
}

// overran is why a member is dropped that did not come to the end of a call.
func overran(limit time.Duration) error {
	return &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "waiting for the end of a key operation",
		Msg: fmt.Sprintf("the member has been at it for %v", limit),
	}
}

// enter waits for the turn of a call and counts it in; leave undoes it. The member
// owes its answer, as that of a command, so it is probed soon: commands go around a
// member that is busy with keys, and would not find out that it hangs.
func (h *handle) enter(ctx context.Context, t *turn, uses []pluginproto.KeyID) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case h.st.ctx.Err() != nil:
		return h.ended()
	}
	if t.writes {
		if err := h.queue(ctx); err != nil {
			return err
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
	case h.l.barsOne(uses):
		err = quarantined(h.l.m, uses[slices.IndexFunc(uses, h.l.bars)])
	default:
		if t.writes {
			t.began = time.Now()
			h.l.writer = t
		}
		h.l.load += t.cost
		h.g.oweLocked(h.l, time.Now())
		h.g.tasks.Add(1)
		return nil
	}
	if t.writes {
		<-h.l.writes
	}
	return err
}

// queue waits for the calls before this one that change keys on the member, but not
// for long for any of them: its end may never come.
func (h *handle) queue(ctx context.Context) error {
	look := time.NewTicker(turnPatience)
	defer look.Stop()
	for {
		select {
		case h.l.writes <- struct{}{}:
			return nil
		case <-look.C:
			h.g.mu.Lock()
			occupied := h.l.occupied()
			h.g.mu.Unlock()
			if occupied {
				return fmt.Errorf("%w: %w", ErrOccupied, &pluginproto.Error{
					Class: pluginproto.ClassBusy, Op: "changing keys",
					Msg: "the HSM has not come to its end",
				})
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-h.st.ctx.Done():
			return h.ended()
		}
	}
}

// occupied reports whether the member is at a change of keys that takes long, or that
// nobody waits for any more. The caller has Group.mu.
func (l *link) occupied() bool {
	return l.writer != nil && (l.writer.abandoned || time.Since(l.writer.began) >= turnPatience)
}

// abandon notes that the caller of a call leaves. It reports whether the call is over
// already: its outcome is on its way then, and perhaps the caller leaves only because the
// member had been waiting for the end of this call in order to leave the group.
func (h *handle) abandon(t *turn) (over bool) {
	h.g.mu.Lock()
	defer h.g.mu.Unlock()
	t.abandoned = true
	return t.over
}

// leave counts a call out and drops the member when it failed.
func (h *handle) leave(t *turn, err error) {
	h.g.mu.Lock()
	t.over = true
	t.late.Stop()
	h.l.load -= t.cost
	h.l.returnedLocked()
	if fromDriver(err) {
		h.l.heardLocked(time.Now())
	}
	if err != nil && pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		h.l.m.errors++
	}
	if t.writes {
		h.l.writer = nil
	}
	h.g.mu.Unlock()
	if err != nil && pluginproto.ClassOf(err) == pluginproto.ClassMember {
		h.g.drop(h.l, err)
	}
	if t.writes {
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
	if cause == nil {
		cause = context.Cause(h.l.ctx) // a context is over a moment before those made from it
	}
	if pluginproto.ClassOf(cause) == pluginproto.ClassMember {
		return cause
	}
	return &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
		Op: "calling a member that was lost", Msg: cause.Error(),
	}
}
