package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net/http"
	"time"

	"kmsd/kms/api"
)

const (
	maxEvent = 64 << 10 // bytes of one line of the stream
	// silence is how long a stream may say nothing, not even that it lives, before
	// it is taken for dead. The server's heartbeat is 15 s.
	silence = 45 * time.Second
)

// Events yields what happens from now on, until ctx or the client ends, the loop
// breaks, or kmsd says that it will not show them. A stream that breaks is opened
// again; an event of type [api.EventDropped] then stands for what was missed.
func (c *Client) Events(ctx context.Context) iter.Seq[api.Event] { return c.EventsAfter(ctx, 0) }

// EventsAfter is Events with a look back: it begins with the last events of the log,
// see Log, at most last of them. None is missed or told twice between the two.
func (c *Client) EventsAfter(ctx context.Context, last int) iter.Seq[api.Event] {
	return func(yield func(api.Event) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(c.closed, cancel)()
		if c.closed.Err() != nil {
			return
		}
		for attempt := 1; ; attempt++ {
			opened, e := c.stream(ctx, last, yield)
			if e == nil || ctx.Err() != nil || !e.Retryable {
				return
			}
			if opened {
				attempt, last = 1, 0
				if !yield(api.Event{Time: time.Now(), Type: api.EventDropped, Cause: "the stream of events broke: " + e.Error()}) {
					return
				}
			}
			if !pause(ctx, delay(attempt, left(ctx), e)) {
				return
			}
		}
	}
}

// stream reads one stream to its end. The error is nil when the loop has broken.
func (c *Client) stream(ctx context.Context, last int, yield func(api.Event) bool) (opened bool, _ *api.Error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dead := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer dead.Stop()

	q := question{method: http.MethodGet, path: withLast("/v1/events", last), kind: repeatable}
	req, err := c.request(ctx, q, nil)
	if err != nil {
		return false, api.NewError(api.CodeBadRequest, "making the request: "+err.Error(), err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return false, c.lost(ctx, q, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxEvent))
		if err != nil {
			return false, c.lost(ctx, q, err)
		}
		return false, decodeError(resp.StatusCode, body)
	}
	err = readEvents(resp.Body, func() { dead.Reset(silence) }, yield)
	if errors.Is(err, errBreak) {
		return true, nil
	}
	return true, c.lost(ctx, q, err)
}

// lost is what ended a stream. Silence ends the context of the stream alone, and is
// no reason to give up.
func (c *Client) lost(ctx context.Context, q question, err error) *api.Error {
	if errors.Is(context.Cause(ctx), errSilent) {
		err = errSilent
	}
	return c.broken(context.WithoutCancel(ctx), q, err).err
}

var (
	errBreak  = errors.New("the reader of the events has had enough")
	errSilent = errors.New("kmsd has been silent for " + silence.String())
)

// readEvents reads server-sent events until the end of r or of the reader's
// interest. Lines other than data say only that the stream lives.
func readEvents(r io.Reader, alive func(), yield func(api.Event) bool) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4<<10), maxEvent)
	for lines.Scan() {
		alive()
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue
		}
		var e api.Event
		if err := json.Unmarshal(data, &e); err != nil {
			return errors.New("an event cannot be decoded")
		}
		if !yield(e) {
			return errBreak
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}
