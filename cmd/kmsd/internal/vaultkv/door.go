package vaultkv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/kms/api"
)

// maxBody is the longest body, in bytes: an object of 64 KiB, and room for white space.
const maxBody = 128 << 10

// call is a request on its way through the door.
type call struct {
	request
	h      *Handler
	ctx    context.Context
	in     *bytes.Buffer // the body
	out    *bytes.Buffer // what is answered under "data", when all went well
	status int           // 0 means 200
	sys    bool          // it is not about secrets: the data stand beside "data" too
	record audit.Record
}

// serve is the door: find out what is asked and by whom, authorise, act, audit,
// answer, in this order. It ends with an answer, or with abort.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), h.cfg.Timeout)
	defer cancel()
	c := &call{
		h: h, ctx: ctx, in: buffers.Get().(*bytes.Buffer), out: buffers.Get().(*bytes.Buffer),
		record: audit.Record{Time: time.Now(), RequestID: newID(), Remote: r.RemoteAddr, Action: unrouted},
	}
	defer giveBack(c.in)
	defer giveBack(c.out)
	err := c.run(w, r)
	if !c.finish(err) {
		abort(r)
	}
	body := buffers.Get().(*bytes.Buffer)
	defer giveBack(body)
	if refused := refusalOf(err); refused != nil {
		refused.write(body, c.record.RequestID)
		answer(w, refused.status, body.Bytes())
		return
	}
	c.write(body)
	answer(w, c.status, body.Bytes())
}

// run does all that can fail before the audit.
func (c *call) run(w http.ResponseWriter, r *http.Request) error {
	q, refused := c.h.mounts.Load().route(r)
	c.request = q
	c.record.Database, c.record.NamedKey, c.record.Version = q.behind.Database, q.id, q.version
	if len(q.actions) > 0 {
		c.record.Action, c.record.Operation = q.actions[0], q.name
	}
	caller, err := c.h.cfg.Auth.Authenticate(c.ctx, token(r))
	if err != nil {
		c.h.cfg.Logger.Debug("a request has no token that is known", "request_id", c.record.RequestID, "remote", r.RemoteAddr, "error", err)
		return permissionDenied(api.CodeUnauthenticated)
	}
	c.record.Principal = caller.Name()
	if !c.h.shares.take(caller.Name()) {
		return api.NewError(api.CodeRateLimited, fmt.Sprintf("%s has %d requests in flight", caller.Name(), c.h.shares.most), nil)
	}
	defer c.h.shares.give(caller.Name())
	if refused != nil {
		return refused
	}
	if err := c.authorise(caller); err != nil {
		return err
	}
	if err := c.read(w, r); err != nil {
		return err
	}
	return c.do()
}

// token is how a client proves who it is. Vault takes either header.
func token(r *http.Request) string {
	if t := r.Header.Get("X-Vault-Token"); t != "" {
		return t
	}
	const scheme = "bearer "
	if h := r.Header.Get("Authorization"); len(h) > len(scheme) && strings.EqualFold(h[:len(scheme)], scheme) {
		return strings.TrimSpace(h[len(scheme):])
	}
	return ""
}

func (c *call) authorise(caller Caller) error {
	for _, action := range c.actions {
		if caller.May(action, c.behind.Database) {
			c.record.Action = action
			return nil
		}
	}
	c.h.cfg.Logger.Debug("no policy allows it", "request_id", c.record.RequestID, "principal", caller.Name(),
		"action", c.record.Action, "database", c.behind.Database)
	return permissionDenied(api.CodeDenied)
}

func (c *call) read(w http.ResponseWriter, r *http.Request) error {
	if r.ContentLength == 0 || r.Method == http.MethodGet {
		return nil
	}
	c.in.Grow(maxBody + bytes.MinRead) // at once, so that no copy is left behind
	_, err := c.in.ReadFrom(http.MaxBytesReader(w, r.Body, maxBody))
	var over *http.MaxBytesError
	if errors.As(err, &over) {
		return refuse(http.StatusRequestEntityTooLarge, api.CodeTooLarge, fmt.Sprintf("the body is longer than %d bytes", maxBody))
	}
	if err != nil {
		return api.NewError(api.CodeDeadline, "the body has not come to its end", err)
	}
	return nil
}

// do calls the operation. A panic ends this request and nothing else.
func (c *call) do() (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.h.cfg.Logger.Error("a request of a database panicked", "request_id", c.record.RequestID, "action", c.record.Action,
				"type", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			err = fmt.Errorf("panic in action %s", c.record.Action)
		}
	}()
	return c.act(c)
}

// finish records how the request ended, and says whether it may be answered: what is
// not certain may not, nor what is not written down.
func (c *call) finish(err error) bool {
	c.record.Outcome = "ok"
	if err != nil {
		c.record.Outcome = string(codeOf(err))
	}
	certain := err == nil || refusalOf(err) != nil
	if !certain {
		c.log(err)
	}
	c.record.Duration = time.Since(c.record.Time)
	written := c.record.Principal == "" && !c.h.strangers.Take(c.record.Time) || c.h.record(c.record) == nil
	outcome := c.record.Outcome
	if !written {
		outcome = string(api.CodeInternal)
	}
	c.h.cfg.Observe(c.record.Action, outcome, c.record.Duration)
	return certain && written
}

// log says why a database gets no answer. What mends by itself is no news for everybody:
// the groups have told of it.
func (c *call) log(err error) {
	level := hclog.Error
	if e := (*api.Error)(nil); errors.As(err, &e) && e.Retryable {
		level = hclog.Debug
	}
	about := []any{"request_id", c.record.RequestID, "principal", c.record.Principal, "mount", c.mount, "key", c.id, "code", c.record.Outcome, "error", err}
	if errors.Is(err, api.ErrNoDatabase) {
		about = append(about, "hint", "if it is new: kmsd database create "+c.behind.Database+"; if not, kmsd has another catalog than it had")
	}
	c.h.cfg.Logger.Log(level, "a database gets no answer: its connection is closed", about...)
}

// write writes a success in Vault's envelope.
func (c *call) write(to *bytes.Buffer) {
	if c.status == 0 {
		c.status = http.StatusOK
	}
	if c.status == http.StatusNoContent {
		return
	}
	data := c.out.Bytes()
	to.Grow(2*len(data) + 512)
	kind := "kv"
	var beside []byte
	if c.sys { // as Vault has done since before there was "data"
		kind, beside = "system", data[1:len(data)-1]
	}
	envelope(to, c.record.RequestID, data, beside, kind)
}

func (r *refusal) write(to *bytes.Buffer, id string) {
	if r.data != nil {
		envelope(to, id, r.data, nil, "kv")
		return
	}
	list := r.errors
	if list == nil {
		list = []string{}
	}
	enc := json.NewEncoder(to)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(map[string][]string{"errors": list}) // text is always JSON
}

func envelope(to *bytes.Buffer, id string, data, beside []byte, kind string) {
	to.WriteString(`{"request_id":"` + id + `","lease_id":"","renewable":false,"lease_duration":0,"data":`)
	to.Write(data)
	if beside != nil {
		to.WriteByte(',')
		to.Write(beside)
	}
	to.WriteString(`,"wrap_info":null,"warnings":null,"auth":null,"mount_type":"` + kind + "\"}\n")
}
