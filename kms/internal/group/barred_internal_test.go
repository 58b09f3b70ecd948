package group

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/pluginproto"
)

// namedConn answers each command with its name, after a second.
type namedConn struct {
	Conn
	name string
	done chan struct{}
}

func (c *namedConn) Done() <-chan struct{} { return c.done }
func (c *namedConn) Kill()                 {}
func (c *namedConn) PID() int              { return 0 }
func (c *namedConn) Close() error          { return nil }

func (c *namedConn) Do(_ context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if cmd.Op != pluginproto.OpProbe {
		<-time.After(time.Second)
	}
	return pluginproto.Result{Output: []byte(c.name)}, nil
}

func TestAnAnswerFromACopyThatWasQuarantinedMeanwhileIsThrownAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cfg Config
		for _, name := range []string{"a", "b"} {
			c := &namedConn{name: name, done: make(chan struct{})}
			cfg.Members = append(cfg.Members, MemberConfig{
				Name: name,
				Connect: func(context.Context) (Conn, pluginproto.TokenInfo, error) {
					return c, pluginproto.TokenInfo{Label: name}, nil
				},
			})
			defer close(c.done)
		}
		g, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		key := pluginproto.KeyID{1}
		time.AfterFunc(500*time.Millisecond, func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			for _, m := range g.members {
				if m.link.inFlight > 0 {
					m.link.bar([]pluginproto.KeyID{key})
				}
			}
		})
		began := time.Now()
		res, err := g.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpDecrypt, Key: key, Mech: pluginproto.AESGCM})
		if err != nil || string(res.Output) != "b" || time.Since(began) != 2*time.Second {
			t.Errorf("answered by %q with %v after %v, want b after a's answer was thrown away", res.Output, err, time.Since(began))
		}
		if s := g.Status(); s.State != "normal" {
			t.Errorf("the group is %s", s.State)
		}
	})
}
