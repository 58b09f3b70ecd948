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
	return call(ctx, h, reads, costTransfer, h.l.conn.List)
}

func (h *handle) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	return call(ctx, h, reads, costTransfer, func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Inspect(ctx, id)
	})
}

func (h *handle) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	return call(ctx, h, writes, costGenerate, func(ctx context.Context) (pluginproto.Object, error) {
		return h.l.conn.Generate(ctx, spec)
	})
}

func (h *handle) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	_, err := call(ctx, h, writes, costTransfer, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, h.l.conn.SetAttributes(ctx, id, attrs)
	})
	return err
}

func (h *handle) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	_, err := call(ctx, h, writes, costTransfer, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, h.l.conn.Destroy(ctx, id)
	})
	return err
}

func (h *handle) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	access := reads
	if req.Role == pluginproto.CloneTarget {
		access = writes
	}
	return call(ctx, h, access, costTransfer, func(ctx context.Context) (pluginproto.CloneReply, error) {
		return h.l.conn.CloneStep(ctx, req)
	})
}

func (h *handle) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	shared := copyCommand(cmd)
	shared.users.Add(1)
	defer shared.release()
	return call(ctx, h, reads, costOf(cmd), func(ctx context.Context) (pluginproto.Result, error) {
		defer shared.release()
		return h.l.conn.Do(ctx, shared.Command)
	})
}

// access says whether a call changes keys on the token.
type access bool

const (
	reads  access = false
	writes access = true
)

// call runs one driver call for as long as its caller and the stint last. A call
// that reads ends with its caller. A call that writes goes on to its end even
// when nobody waits for it, because the token does too; the next one waits for it.
func call[T any](ctx context.Context, h *handle, kind access, cost int, run func(context.Context) (T, error)) (T, error) {
	var zero T
	fail := func(err error) (T, error) { return zero, &MemberError{Member: h.Name(), Err: err} }
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if h.st.ctx.Err() != nil {
		return fail(h.ended())
	}
	if kind == writes {
		select {
		case h.l.writes <- struct{}{}:
		case <-ctx.Done():
			return fail(ctx.Err())
		case <-h.st.ctx.Done():
			return fail(h.ended())
		}
	}
	runCtx, cancel := h.context(ctx, kind)
	if kind == reads {
		defer cancel()
	}
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	ran := h.start(cost, func() {
		defer cancel()
		value, err := run(runCtx)
		h.finish(kind, cost, err)
		done <- outcome{value, err}
	})
	if !ran {
		cancel()
		if kind == writes {
			<-h.l.writes
		}
		return fail(ErrClosed)
	}
	select {
	case o := <-done:
		if o.err == nil {
			return o.value, nil
		}
		if h.l.ctx.Err() != nil && !fromDriver(o.err) { // cut off by the loss of the member
			return fail(h.ended())
		}
		return fail(o.err)
	case <-ctx.Done():
		return fail(ctx.Err())
	case <-h.st.ctx.Done():
		return fail(h.ended())
	}
}

// context is what a call runs under: the link's, and for one that reads the
// caller's deadline.
func (h *handle) context(ctx context.Context, kind access) (context.Context, context.CancelFunc) {
	if t, ok := ctx.Deadline(); ok && kind == reads {
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
	return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "calling a member that was lost", Msg: cause.Error()}
}

// start counts a call in and runs it, unless the group is closed.
func (h *handle) start(cost int, run func()) bool {
	h.g.mu.Lock()
	defer h.g.mu.Unlock()
	if h.g.closed {
		return false
	}
	h.l.load += cost
	h.g.tasks.Go(run)
	return true
}

// finish counts a call out and drops the member when it failed.
func (h *handle) finish(kind access, cost int, err error) {
	h.g.mu.Lock()
	h.l.load -= cost
	if fromDriver(err) {
		h.l.heardLocked(time.Now())
	}
	if err != nil {
		h.l.m.errors++
	}
	h.g.mu.Unlock()
	if err != nil && pluginproto.ClassOf(err) == pluginproto.ClassMember {
		h.g.drop(h.l, err)
	}
	if kind == writes {
		<-h.l.writes
	}
}
