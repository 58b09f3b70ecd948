package httpapi

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"time"

	"kmsd/kms/api"
)

// eventStream is the answer of a route that does not end by itself. The door
// writes it as server-sent events.
type eventStream struct {
	events func(ctx context.Context) iter.Seq[api.Event]
	// past is what the reader gets first.
	past func(ctx context.Context) ([]api.Event, error)
	// show says whether the caller may see an event.
	show func(api.Event) bool
}

// follow streams what happens from now on, after the last events of the log if they
// are asked for.
func follow(_ context.Context, c *call, _ none) (eventStream, error) {
	last, err := c.params.number("last", 0, api.MaxLog)
	if err != nil {
		return eventStream{}, err
	}
	past := func(context.Context) ([]api.Event, error) { return nil, nil }
	if last > 0 {
		past = func(ctx context.Context) ([]api.Event, error) { return c.service.Log(ctx, last) }
	}
	return eventStream{events: c.service.Events, past: past, show: c.mayKnow}, nil
}

// showLog shows what has happened to groups and members.
func showLog(ctx context.Context, c *call, _ none) (api.LogBody, error) {
	last, err := c.params.number("last", 0, api.MaxLog)
	if err != nil {
		return api.LogBody{}, err
	}
	events, err := c.service.Log(ctx, last)
	if err != nil {
		return api.LogBody{}, err
	}
	shown := make([]api.Event, 0, len(events))
	for _, e := range events {
		if c.mayKnow(e) {
			shown = append(shown, e)
		}
	}
	return api.LogBody{Events: shown}, nil
}

// mayKnow says whether the caller may see an event. Those of a database or a key are for
// those who may read it.
func (c *call) mayKnow(e api.Event) bool {
	if e.Database != "" {
		return c.may("database-read", e.Database)
	}
	return e.Key == "" || c.may("read", e.Key)
}

// serveStream writes events until the client goes, the handler closes or the
// service ends them.
func (h *Handler) serveStream(c *call, s eventStream, w http.ResponseWriter, r *http.Request) {
	err := h.streams.enter(c.caller.Name())
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var arrived <-chan api.Event
	var past []api.Event
	if err == nil {
		defer h.streams.leave(c.caller.Name())
		var ended <-chan struct{}
		arrived, ended = pump(ctx, s)
		defer func() { cancel(); <-ended }()
		past, err = s.past(ctx)
	}
	if e := h.finish(r.Context(), c, err); e != nil {
		h.refuse(w, e)
		return
	}
	head := w.Header()
	head.Set("Content-Type", "text/event-stream")
	head.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	out := sse{w: w, rc: http.NewResponseController(w)}
	_ = out.rc.SetReadDeadline(time.Time{}) // the server's own is for requests that end
	seen := make(map[mark]bool, len(past))  // what has happened between the look at the past and its end comes twice
	for _, e := range past {
		seen[markOf(e)] = true
		if s.show(e) && !out.event(e) {
			return
		}
	}
	if !out.comment("events from now on") {
		return
	}
	// A stream may outlive the token that has opened it.
	allowed := func() bool { return c.may(c.record.Action, "") }
	beat := time.NewTicker(h.cfg.Heartbeat)
	defer beat.Stop()
	for {
		select {
		case e, ok := <-arrived:
			if !ok || !allowed() || s.show(e) && !seen[markOf(e)] && !out.event(e) {
				return
			}
		case <-beat.C:
			if !allowed() || !out.comment("alive") {
				return
			}
		case <-h.closing.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

// mark tells an event from others.
type mark struct {
	at                                int64 // in nanoseconds
	kind, group, member, key, to, why string
}

func markOf(e api.Event) mark {
	return mark{e.Time.UnixNano(), e.Type, e.Group, e.Member, e.Key, e.To, e.Cause}
}

// pump runs the iterator in a goroutine of its own, so that heartbeats can go out
// while nothing happens. It ends, and closes both channels, when ctx does.
func pump(ctx context.Context, s eventStream) (<-chan api.Event, <-chan struct{}) {
	arrived, ended := make(chan api.Event), make(chan struct{})
	events := s.events(ctx) // from here on nothing is missed
	go func() {
		defer close(ended)
		defer close(arrived)
		for e := range events {
			select {
			case arrived <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return arrived, ended
}

// sse writes server-sent events. A method returns false when the client is gone.
type sse struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

func (s sse) comment(text string) bool { return s.write([]byte(": " + text + "\n\n")) }

func (s sse) event(e api.Event) bool {
	data, err := json.Marshal(e)
	if err != nil {
		return false
	}
	return s.write([]byte("event: " + e.Type + "\ndata: " + string(data) + "\n\n"))
}

// write gives a client ten seconds to take each event.
func (s sse) write(b []byte) bool {
	_ = s.rc.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := s.w.Write(b); err != nil {
		return false
	}
	return s.rc.Flush() == nil
}
