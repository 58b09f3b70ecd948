package kms

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// watched is a driver that notes when it last did what a database needs of it.
type watched struct {
	group.Conn
	trip *atomic.Int64 // Unix nanoseconds of the last success; outlives the connection
}

// Do notes the success of a wrap, an unwrap, or a probe, which is both.
func (c *watched) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	res, err := c.Conn.Do(ctx, cmd)
	if err == nil {
		switch cmd.Op {
		case pluginproto.OpEncrypt, pluginproto.OpDecrypt, pluginproto.OpProbe:
			c.trip.Store(time.Now().UnixNano())
		}
	}
	return res, err
}

// LastHeard passes on what the connection knows of heartbeats.
func (c *watched) LastHeard() time.Time {
	if h, ok := c.Conn.(interface{ LastHeard() time.Time }); ok {
		return h.LastHeard()
	}
	return time.Time{}
}

// inProcess is a driver inside this process as a group.Conn. There is nothing to
// kill, so Kill lets go of it: it is closed in the background, and Done tells when
// that is done.
type inProcess struct {
	pluginproto.Driver
	tasks *sync.WaitGroup // waits for the background Close
	once  sync.Once
	done  chan struct{}
	err   error // of Close; set before done is closed
}

// newInProcess returns a driver as a group.Conn; one that is so already is used as
// it is.
func newInProcess(d pluginproto.Driver, tasks *sync.WaitGroup) group.Conn {
	if c, ok := d.(group.Conn); ok {
		return c
	}
	return &inProcess{Driver: d, tasks: tasks, done: make(chan struct{})}
}

// Done is closed when the driver is closed.
func (c *inProcess) Done() <-chan struct{} { return c.done }

// Close closes the driver and waits for that.
func (c *inProcess) Close() error {
	c.Kill()
	<-c.done
	return c.err
}

// Kill lets go of the driver.
func (c *inProcess) Kill() {
	c.once.Do(func() {
		c.tasks.Go(func() {
			defer close(c.done)
			c.err = c.Driver.Close()
		})
	})
}

// PID is 0: there is no process.
func (c *inProcess) PID() int { return 0 }
