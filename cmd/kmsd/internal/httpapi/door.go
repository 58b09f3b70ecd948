package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"kmsd/kms/api"
)

// call is a request on its way through the door: what an action may know of it,
// and what the audit log will be told.
type call struct {
	service Service
	caller  Caller
	request *http.Request // for path values
	params  params
	counted bool             // of a stranger, and not written down by itself
	failed  map[api.Code]int // :: code → items of a batch that failed with it; nil: none
	record  Record           // an action fills in what its body says: Version, Items, Failed, Group, Member, AllowDegraded, Force, Adopt, Spec, Job
}

// key is the name in the path, checked.
func (c *call) key() string { return c.record.Key }

// may says whether the caller may do the action on a key that the path does not
// name, for filtering lists.
func (c *call) may(action, key string) bool { return c.caller.May(action, key) }

// serve is the door. Every route that is not public passes it: authenticate,
// authorise, decode, act, audit, answer, in this order.
func (h *Handler) serve(rt *route, w http.ResponseWriter, r *http.Request) {
	c := &call{service: h.cfg.Service, request: r, record: Record{
		Time:      time.Now(),
		RequestID: w.Header().Get(api.RequestIDHeader),
		Action:    rt.action,
		Operation: rt.operation,
		Remote:    r.RemoteAddr,
	}}
	// Nothing else is looked at before it is clear who asks.
	err := h.authenticate(c, r)
	ctx, cancel, badTimeout := h.deadline(rt, r)
	defer cancel()
	if err == nil {
		err = badTimeout
	}
	var answer any
	if err == nil {
		answer, err = h.run(ctx, rt, c, w, r)
	}
	if err == nil {
		switch a := answer.(type) {
		case eventStream:
			h.serveStream(c, a, w, r)
			return
		case download:
			h.serveDownload(ctx, rt, c, a, w)
			return
		}
	}
	out := buffers.Get().(*bytes.Buffer)
	defer giveBack(out)
	if err == nil {
		err = encode(out, answer)
		wipe(answer)
	}
	if e := h.finish(ctx, c, err); e != nil {
		h.answerError(w, statusOf(e.Code), e)
		return
	}
	h.answer(w, http.StatusOK, out.Bytes())
}

// deadline gives the request the time it may take: that of the configuration, or
// less if the client says so. What takes as long as a member needs gets the time that
// the client says, but never outlives the server. A stream has no end.
func (h *Handler) deadline(rt *route, r *http.Request) (context.Context, context.CancelFunc, error) {
	timeout := h.cfg.Limits.Timeout
	if s := r.Header.Get(api.TimeoutHeader); s != "" {
		d, err := time.ParseDuration(s)
		switch {
		case err != nil || d <= 0:
			return r.Context(), func() {}, badRequest("header " + api.TimeoutHeader + " wants a duration like 5s")
		case rt.patience != hurried:
			timeout = min(forever, d)
		default:
			timeout = min(timeout, d)
		}
	} else if rt.patience == endless {
		timeout = forever
	}
	if rt.stream {
		return r.Context(), func() {}, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	if rt.patience == hurried {
		return ctx, cancel, nil
	}
	stop := context.AfterFunc(h.closing, cancel)
	return ctx, func() { stop(); cancel() }, nil
}

// forever is longer than any request.
const forever = 365 * 24 * time.Hour

// run does all that can fail between the authentication and the audit.
func (h *Handler) run(ctx context.Context, rt *route, c *call, w http.ResponseWriter, r *http.Request) (any, error) {
	// A browser sends a client certificate by itself, also for another site's page.
	err := h.origin.Check(r)
	if err != nil {
		return nil, api.NewError(api.CodeDenied, "requests from another site's page are not allowed", err)
	}
	if c.params, err = parseQuery(r.URL.RawQuery, rt.query); err != nil {
		return nil, err
	}
	if err := c.namesInPath(); err != nil {
		return nil, err
	}
	if rt.namesIn == nil && rt.foundIn == nil {
		if err := c.authorise(rt); err != nil {
			return nil, err
		}
	}
	req, err := h.decode(rt, w, r)
	if err != nil {
		return nil, err
	}
	if rt.namesIn != nil {
		if err := rt.namesIn(c, req); err != nil {
			return nil, err
		}
		if err := c.authorise(rt); err != nil {
			return nil, err
		}
	}
	if rt.patience != hurried { // the server's own deadlines are for what ends soon
		rc := http.NewResponseController(w)
		_, _ = rc.SetReadDeadline(time.Time{}), rc.SetWriteDeadline(time.Time{})
	}
	answer, err := h.guard(rt, c, func() (any, error) { return rt.act(ctx, c, req) })
	if err == nil && rt.foundIn != nil {
		if err = rt.foundIn(c, answer); err == nil {
			err = c.authorise(rt)
		}
	}
	return answer, err
}

func (h *Handler) authenticate(c *call, r *http.Request) error {
	cr := credentialsOf(r)
	if cr.PeerUID >= 0 {
		c.record.Remote = "unix:" + strconv.Itoa(cr.PeerUID)
	}
	caller, err := h.cfg.Auth.Authenticate(r.Context(), cr)
	if err != nil {
		if !h.strangers.Take(c.record.Time) {
			c.counted = true
			limited := api.NewError(api.CodeRateLimited, "too many requests of clients that are not authenticated", nil)
			limited.RetryAfterMS = 1000
			return limited
		}
		e := api.NewError(api.CodeUnauthenticated, err.Error(), err)
		e.Hint = "send a token as \"Authorization: Bearer TOKEN\", or use a client certificate"
		return e
	}
	c.caller = caller
	c.record.Principal = caller.Name()
	return h.rates.take(caller.Name())
}

// namesInPath finds the names in the path.
func (c *call) namesInPath() error {
	value := c.request.PathValue
	c.record.Group, c.record.Member, c.record.Job = clip(value("group")), clip(value("member")), clip(value("id"))
	if name := value("name"); name != "" {
		return c.setKey(name)
	}
	if db := value("db"); db != "" {
		if err := c.setDatabase(db); err != nil {
			return err
		}
	}
	if id := value("key"); id != "" {
		if err := api.CheckNamedKeyID(id); err != nil {
			return err
		}
		c.record.NamedKey = id
	}
	return nil
}

// setKey takes only a well-formed name, so that no other text gets into policies
// and logs.
func (c *call) setKey(name string) error {
	if err := api.CheckName(name); err != nil {
		return err
	}
	c.record.Key = name
	return nil
}

// setDatabase is the same for the name of a database.
func (c *call) setDatabase(name string) error {
	if err := api.CheckDatabaseName(name); err != nil {
		return err
	}
	c.record.Database = name
	return nil
}

// authorise asks for what the route is about: a database, a key, or nothing with a
// name. A list is about the names under its prefix; its action leaves out what the
// caller may not list.
func (c *call) authorise(rt *route) error {
	switch {
	case rt.subject != "":
		return c.allow(rt.action, c.params.text(rt.subject))
	case c.record.Database == "":
		return c.allow(rt.action, c.record.Key)
	case c.record.Key != "":
		// Whose database has the master key of somebody else can rotate that.
		if err := c.allow(rt.action, c.record.Key); err != nil {
			return err
		}
	}
	return c.allow(rt.action, c.record.Database)
}

// allow returns an error unless a policy allows the action on a name.
func (c *call) allow(action, name string) error {
	if c.caller.May(action, name) {
		return nil
	}
	on := ""
	if name != "" {
		on = " on " + clip(name)
	}
	return api.NewError(api.CodeDenied, fmt.Sprintf("no policy of %s allows %s%s", c.caller.Name(), action, on), nil)
}

func (h *Handler) decode(rt *route, w http.ResponseWriter, r *http.Request) (any, error) {
	in := buffers.Get().(*bytes.Buffer)
	defer giveBack(in)
	if r.ContentLength != 0 {
		if err := readBody(w, r, rt.maxBody, in); err != nil {
			return nil, err
		}
	}
	return rt.decode(in.Bytes())
}

// guard calls what a route does. A panic ends this request and nothing else.
func (h *Handler) guard(rt *route, c *call, do func() (any, error)) (answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			h.cfg.Logger.Error("an action panicked", "request_id", c.record.RequestID, "action", rt.action,
				"type", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			answer, err = nil, fmt.Errorf("panic in action %s", rt.action)
		}
	}()
	answer, err = do()
	if err != nil && rt.patience != hurried && h.closing.Err() != nil {
		e := api.NewError(api.CodeUnavailable, "kmsd is being stopped", err)
		e.Hint = "ask again when it runs: what is done stays done, and the rest is done then"
		err = e
	}
	return answer, err
}

// audit records how the request ended and returns the error to answer with, nil
// when it went well. If the record cannot be written, nothing may be released.
func (h *Handler) audit(ctx context.Context, c *call, err error) *api.Error {
	c.record.Duration = time.Since(c.record.Time)
	c.record.Outcome = "ok"
	var e *api.Error
	if err != nil {
		e = errorFor(err, c.record.RequestID)
		c.record.Outcome = string(e.Code)
		if e.Member != "" {
			c.record.Member = e.Member
		}
		h.log(c, e, err)
	}
	if c.counted {
		return e
	}
	if auditErr := h.cfg.Audit.Record(context.WithoutCancel(ctx), c.record); auditErr != nil {
		h.cfg.Logger.Error("the audit log cannot be written, so the request fails", "request_id", c.record.RequestID, "error", auditErr)
		e = errorFor(api.NewError(api.CodeInternal, "the audit log cannot be written", auditErr), c.record.RequestID)
		e.Hint = "nothing is answered without it; make room for it, kmsd's log says where; what was asked for may have been done"
	}
	return e
}

func (h *Handler) log(c *call, e *api.Error, cause error) {
	args := []any{"request_id", c.record.RequestID, "action", c.record.Action, "key", c.record.Key, "database", c.record.Database, "code", e.Code, "error", cause}
	if e.Code == api.CodeInternal {
		h.cfg.Logger.Error("a request failed", args...)
		return
	}
	h.cfg.Logger.Debug("a request failed", args...)
}

// buffers hold bodies. They are wiped when they are given back.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func giveBack(b *bytes.Buffer) {
	clear(b.Bytes())
	b.Reset()
	const keep = 256 << 10 // bytes; the buffer of a huge batch is not kept for small ones
	if b.Cap() <= keep {
		buffers.Put(b)
	}
}

func encode(out *bytes.Buffer, answer any) error {
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(answer); err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	return nil
}

// answer writes a whole answer. A client that is gone is not worth a line.
func (h *Handler) answer(w http.ResponseWriter, status int, body []byte) {
	h.answerAs(w, status, "application/json", body)
}

func (h *Handler) answerAs(w http.ResponseWriter, status int, contentType string, body []byte) {
	head := w.Header()
	head.Set("Content-Type", contentType)
	head.Set("Content-Length", strconv.Itoa(len(body)))
	head.Set("Cache-Control", "no-store")
	head.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// refuse answers a request that does not get as far as a route.
func (h *Handler) refuse(w http.ResponseWriter, e *api.Error) {
	h.answerError(w, statusOf(e.Code), e)
}

func (h *Handler) answerError(w http.ResponseWriter, status int, e *api.Error) {
	e = errorFor(e, w.Header().Get(api.RequestIDHeader))
	if e.RetryAfterMS > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt((e.RetryAfterMS+999)/1000, 10))
	}
	if e.Code == api.CodeUnauthenticated {
		w.Header().Set("WWW-Authenticate", `Bearer realm="kmsd"`)
	}
	out := buffers.Get().(*bytes.Buffer)
	defer giveBack(out)
	_ = encode(out, api.ErrorBody{Error: e}) // an Error is always JSON
	h.answer(w, status, out.Bytes())
}

// servePublic answers what everybody may ask.
func (h *Handler) servePublic(rt publicRoute, w http.ResponseWriter, _ *http.Request) {
	status, body := rt.answer(h)
	switch body := body.(type) {
	case exposition:
		h.answerAs(w, status, metricsType, body)
		return
	case *api.Error:
		h.answerError(w, status, body)
		return
	}
	out := buffers.Get().(*bytes.Buffer)
	defer giveBack(out)
	if err := encode(out, body); err != nil {
		h.refuse(w, errorFor(err, ""))
		return
	}
	h.answer(w, status, out.Bytes())
}
