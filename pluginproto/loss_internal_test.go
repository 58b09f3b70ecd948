package pluginproto

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
