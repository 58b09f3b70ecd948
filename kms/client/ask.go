package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"kmsd/kms/api"
)

// maxAnswer is the longest answer that is read, in bytes: a batch of 1000 items in
// base64, or a page of keys with many versions.
const maxAnswer = 32 << 20

// kind says what a second attempt would do.
type kind int

const (
	once       kind = iota // change something again
	repeatable             // the same as the first
)

// question is one call.
type question struct {
	method string
	path   string // escaped, with query
	body   any    // nil: none
	kind   kind
	// also is a status besides 200 whose body is the answer; 0: none.
	also int
	// patient: a context without a deadline does not get one.
	patient bool
	// sink takes the body of the answer as it comes, and the answer itself is in the
	// trailer; nil: the body is the answer.
	sink io.Writer
}

// failure is why an attempt failed.
type failure struct {
	err *api.Error
	// unsent: kmsd has certainly not acted on it.
	unsent bool
}

// ask puts a question until it is answered, it is certain that it will not be, or
// the time is over.
func ask[Ans any](ctx context.Context, c *Client, q question) (Ans, error) {
	var answer Ans
	ctx, cancel := c.within(ctx, q.patient)
	defer cancel()
	var body []byte
	if q.body != nil {
		var err error
		if body, err = json.Marshal(q.body); err != nil {
			return answer, api.NewError(api.CodeInternal, "encoding the request: "+err.Error(), err)
		}
	}
	for attempt := 1; ; attempt++ {
		f := c.attempt(ctx, q, body, &answer)
		if f == nil {
			return answer, nil
		}
		if ctx.Err() != nil && (f.err.Code == api.CodeDeadline || f.err.Code == api.CodeInternal) {
			f = c.broken(ctx, q, ctx.Err()) // what a server says to a connection that is being closed
		}
		if attempt == c.opts.Attempts || !again(q, f) || !pause(ctx, delay(attempt, left(ctx), f.err)) {
			var zero Ans
			return zero, f.err
		}
	}
}

// within gives ctx a deadline if it has none, unless that is meant, and ends it when
// the client closes.
func (c *Client) within(ctx context.Context, patient bool) (context.Context, context.CancelFunc) {
	cancelTimeout := func() {}
	if _, ok := ctx.Deadline(); !ok && !patient {
		ctx, cancelTimeout = context.WithTimeout(ctx, c.opts.Timeout)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	if c.closed.Err() != nil {
		cancel(errClosed) // now: AfterFunc may be later than the answer
	}
	stop := context.AfterFunc(c.closed, func() { cancel(errClosed) })
	return ctx, func() { stop(); cancel(nil); cancelTimeout() }
}

var errClosed = errors.New("the client is closed")

// again says whether another attempt may help and does no harm.
func again(q question, f *failure) bool {
	switch {
	case !f.err.Retryable, f.err.Code == api.CodeDeadline:
		return false
	case f.unsent, f.err.Code == api.CodeRateLimited: // refused at the door
		return true
	default:
		return q.kind == repeatable
	}
}

// maxRetryAfter bounds the pause that a server may ask for.
const maxRetryAfter = time.Minute

// delay is a random part of 50 ms, 100 ms, 200 ms and so on, up to 2 s and up to half of
// the time that is left, so that a call is not given up while another attempt may help. It
// is no less than what the server asks for, within reason.
func delay(attempt int, left time.Duration, e *api.Error) time.Duration {
	const first, most = 50 * time.Millisecond, 2 * time.Second
	d := min(first<<min(attempt-1, 10), most)
	d = d/2 + rand.N(d/2)
	if left > first {
		d = min(d, left/2)
	}
	return max(d, time.Duration(min(e.RetryAfterMS, maxRetryAfter.Milliseconds()))*time.Millisecond)
}

// left is the time until ctx ends.
func left(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return time.Until(end)
	}
	return math.MaxInt64
}

// pause waits, or returns false at once if ctx would end meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	if left(ctx) <= d {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// attempt puts the question once and decodes the answer into answer.
func (c *Client) attempt(ctx context.Context, q question, body []byte, answer any) *failure {
	req, err := c.request(ctx, q, body)
	if err != nil {
		return &failure{err: api.NewError(api.CodeBadRequest, "making the request: "+err.Error(), err), unsent: true}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.broken(ctx, q, err)
	}
	defer resp.Body.Close()
	if q.sink != nil && resp.StatusCode == http.StatusOK {
		return c.drain(ctx, q, resp, answer)
	}
	buf := buffers.Get().(*bytes.Buffer)
	defer giveBack(buf)
	if n := resp.ContentLength; n > 0 && n <= maxAnswer {
		buf.Grow(int(n) + bytes.MinRead)
	}
	if _, err := buf.ReadFrom(io.LimitReader(resp.Body, maxAnswer+1)); err != nil {
		return c.broken(ctx, q, err)
	}
	if buf.Len() > maxAnswer {
		return &failure{err: api.NewError(api.CodeInternal, fmt.Sprintf("the answer of kmsd is longer than %d bytes", maxAnswer), nil)}
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != q.also {
		return &failure{err: decodeError(resp.StatusCode, buf.Bytes())}
	}
	if err := json.Unmarshal(buf.Bytes(), answer); err != nil {
		// The text of err may quote the answer, which may be secret.
		return &failure{err: api.NewError(api.CodeInternal, "the answer of kmsd is not what was asked for: it cannot be decoded", nil)}
	}
	return nil
}

func (c *Client) request(ctx context.Context, q question, body []byte) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, q.method, c.base+q.path, nil)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Body = io.NopCloser(bytes.NewReader(body))
		req.ContentLength = int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		req.Header.Set("Content-Type", "application/json")
	}
	if c.opts.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.opts.Token)
	}
	req.Header.Set("User-Agent", "kmsd-client")
	if end, ok := ctx.Deadline(); ok {
		req.Header.Set(api.TimeoutHeader, max(time.Until(end), time.Millisecond).String())
	}
	return req, nil
}

// decodeError reads what the server says, or makes the best of a status that
// somebody else, a proxy perhaps, has answered.
func decodeError(status int, body []byte) *api.Error {
	var e api.ErrorBody
	if err := json.Unmarshal(body, &e); err == nil && e.Error != nil && e.Error.Code != "" {
		return e.Error
	}
	code := api.CodeInternal
	switch status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		code = api.CodeUnavailable
	case http.StatusTooManyRequests:
		code = api.CodeRateLimited
	}
	return api.NewError(code, fmt.Sprintf("the answer has HTTP status %d and is not kmsd's", status), nil)
}

// broken says what it means that there is no answer.
func (c *Client) broken(ctx context.Context, q question, err error) *failure {
	var op *net.OpError
	var untrusted *tls.CertificateVerificationError
	switch {
	case errors.Is(context.Cause(ctx), errClosed):
		e := api.NewError(api.CodeUnavailable, "asking kmsd at "+c.shown+": "+errClosed.Error(), errClosed)
		e.Retryable = false
		return &failure{err: e}
	case ctx.Err() != nil:
		return &failure{err: api.NewError(api.CodeDeadline, "waiting for kmsd at "+c.shown+": "+ctx.Err().Error(), ctx.Err())}
	case errors.As(err, &untrusted):
		e := api.NewError(api.CodeUnavailable, "connecting to kmsd at "+c.shown+": "+untrusted.Error(), err)
		e.Retryable = false
		e.Hint = "is the right CA certificate given (--cacert or KMSD_CACERT)?"
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			e.Hint = "if the clock is right: renew the certificate of kmsd, which it reads by itself; on its host it can be asked over its Unix socket meanwhile"
		}
		return &failure{err: e, unsent: true}
	case errors.As(err, &op) && op.Op == "dial":
		e := api.NewError(api.CodeUnavailable, "connecting to kmsd at "+c.shown+": "+op.Err.Error(), err)
		e.Hint = "is kmsd running, and is the address right (--addr or KMSD_ADDR)?"
		return &failure{err: e, unsent: true}
	}
	e := api.NewError(api.CodeUnavailable, "asking kmsd at "+c.shown+": "+cause(err).Error(), err)
	if q.kind == once {
		e.Hint = "kmsd may have done it before the connection broke; look before you try again"
	}
	return &failure{err: e}
}

// cause is err without the URL that net/http puts in front.
func cause(err error) error {
	if u := errors.Unwrap(err); u != nil {
		return u
	}
	return err
}

// buffers hold answers. They are wiped when they are given back.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func giveBack(b *bytes.Buffer) {
	clear(b.Bytes())
	b.Reset()
	const keep = 256 << 10 // bytes
	if b.Cap() <= keep {
		buffers.Put(b)
	}
}
