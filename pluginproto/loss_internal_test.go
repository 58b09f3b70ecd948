package pluginproto

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	driverv1 "kmsd/pluginproto/v1"
)

// A driver that has stopped reading and then dies leaves thousands of commands in all
// stages: on their way, waiting to be sent, given up. Each caller gets one answer, at
// once, and no input stays behind.
func TestALostDriverAnswersAllThatWaitAtOnce(t *testing.T) {
	const commands = 3_000
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stream := newPipe[*driverv1.CommandBatch, *driverv1.ResultBatch](ctx)
		c := startCommandClient(stream, ClientOptions{}.withDefaults())
		var callers sync.WaitGroup
		var lost time.Time
		call := func(limit time.Duration) {
			callers.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				began := time.Now()
				_, err := c.do(ctx, Command{Op: OpEncrypt, Mech: AESGCM, Input: make([]byte, 100), IV: make([]byte, GCMIVSize)})
				var e *Error
				switch took := time.Since(began); {
				case limit > time.Minute && (!errors.As(err, &e) || e.Class != ClassMember || time.Since(lost) != 0):
					t.Errorf("got %v, %v after the loss", err, time.Since(lost))
				case limit < time.Minute && (!errors.Is(err, context.DeadlineExceeded) || took != limit):
					t.Errorf("with a limit of %v got %v after %v", limit, err, took)
				}
			})
		}
		call(time.Hour)
		<-stream.sent // the first message is taken
		for i := range commands {
			if i%3 == 0 {
				call(time.Second) // nobody waits for it any more when the driver is lost
			} else {
				call(time.Hour)
			}
		}
		<-time.After(2 * time.Second)
		synctest.Wait()
		lost = time.Now()
		cancel()
		callers.Wait()
		c.wait()
		if _, err := c.do(t.Context(), Command{Op: OpProbe}); err == nil {
			t.Error("a command is taken after the loss")
		}
		if left := c.out.take(nil); len(left) != 0 {
			t.Errorf("%d messages wait still", len(left))
		}
	})
}

// A caller may be let in a moment before the driver is lost, and have its command ready a
// moment after what waits was wiped.
func TestNoInputStaysBehindThatComesAtTheMomentOfTheLoss(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c := startCommandClient(newPipe[*driverv1.CommandBatch, *driverv1.ResultBatch](ctx), ClientOptions{}.withDefaults())
			var callers sync.WaitGroup
			for i := range 100 {
				if i == 50 {
					callers.Go(cancel)
				}
				callers.Go(func() {
					if _, err := c.do(t.Context(), Command{Op: OpEncrypt, Mech: AESGCM, Input: make([]byte, 100), IV: make([]byte, GCMIVSize)}); ClassOf(err) != ClassMember {
						t.Errorf("got %v", err)
					}
				})
			}
			callers.Wait()
			c.wait()
			if left := c.out.take(nil); len(left) != 0 {
				t.Errorf("%d commands stay behind", len(left))
			}
		})
	}
}

// due is a context whose time is over and that does not know it yet.
type due struct{ context.Context }

func (due) Deadline() (time.Time, bool) { return time.Now(), true }

// The driver is told the time that a call has, and may say that it is over before our own
// timer does. That is no loss of the driver.
func TestADriverThatBreaksOffFirstIsNotGone(t *testing.T) {
	broken := status.Error(codes.DeadlineExceeded, "broken off")
	synctest.Test(t, func(t *testing.T) {
		c := NewClient(nil, ClientOptions{})
		running, end := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Millisecond, func() { end(silent("opening", time.Minute)) })
		if err := c.callError(t.Context(), due{running}, "opening", broken); ClassOf(err) != ClassMember || !strings.Contains(err.Error(), "no answer") {
			t.Errorf("a call that is over says %v", err)
		}
		caller, end := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Millisecond, func() { end(nil) })
		if err := c.callError(caller, due{caller}, "listing", broken); ClassOf(err) != ClassCaller {
			t.Errorf("a caller whose time is over is told %v", err)
		}
	})
}
