package group_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// barring makes members be admitted with a quarantined copy of key 1.
func barring(names ...string) func(*group.Config) {
	return func(c *group.Config) {
		c.Admit = func(_ context.Context, m group.Member, _ bool) (group.Admission, error) {
			for _, name := range names {
				if m.Name() == name {
					return group.Admission{Barred: []pluginproto.KeyID{keyID(1)}}, nil
				}
			}
			return group.Admission{}, nil
		}
	}
}

// withKey is a command for a key.
func withKey(n int) pluginproto.Command {
	cmd := encrypt
	cmd.Key = keyID(n)
	return cmd
}

// watchKey counts the commands for key 1 that reach an HSM.
func (h *hsm) watchKey() *atomic.Int32 {
	var asked atomic.Int32
	h.set(func(h *hsm) {
		h.fault = func(cmd pluginproto.Command) error {
			if cmd.Key == keyID(1) {
				asked.Add(1)
			}
			return nil
		}
	})
	return &asked
}

func TestAQuarantinedCopyIsNeverUsed(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []string
		barred  []string
		happens func(r *rig)
		want    string // who answers; empty: anybody else
	}{
		{"the other members serve the key", three, []string{"a"}, func(*rig) {}, ""},
		{"the one member with a sound copy does", three, []string{"a", "c"}, func(*rig) {}, "b"},
		{"a standby does when no active member can", []string{"a", "s*"}, []string{"a"}, func(*rig) {}, "s"},
		{"no slow command is hedged to it", []string{"a", "b", "c"}, []string{"a"}, func(r *rig) {
			r.hsms["b"].set(func(h *hsm) { h.delay = time.Second })
			r.hsms["c"].set(func(h *hsm) { h.delay = time.Second })
		}, ""},
		{"no command moves to it from one that froze", []string{"a", "b", "c"}, []string{"a"}, func(r *rig) {
			r.hsms["b"].freeze()
			time.AfterFunc(10*time.Second, r.hsms["b"].thaw)
		}, ""},
		{"no command waits for it when another one is coming back", []string{"a", "b"}, []string{"a"}, func(r *rig) {
			r.hsms["b"].set(func(h *hsm) { h.delay = 50 * time.Millisecond })
			time.AfterFunc(20*time.Millisecond, r.hsms["b"].crash)
		}, "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, c.members, func(cfg *group.Config) {
					cfg.Hedge = true
					barring(c.barred...)(cfg)
				}).start()
				var asked []*atomic.Int32
				for _, name := range c.barred {
					asked = append(asked, r.hsms[name].watchKey())
				}
				c.happens(r)
				for range 10 {
					res, err := r.Do(t.Context(), withKey(1))
					if by := string(res.Output); err != nil || (c.want != "" && by != c.want) {
						t.Errorf("answered by %q with %v, want %q", by, err, c.want)
					}
				}
				elapse(5 * time.Second)
				for i, name := range c.barred {
					if n := asked[i].Load(); n > 0 {
						t.Errorf("%s was asked %d times for the key of which it has a wrong copy", name, n)
					}
				}
				elapse(20 * time.Second)
				served := map[string]int{}
				for range 30 {
					res, err := r.Do(t.Context(), withKey(2))
					if err != nil {
						t.Error(err)
					}
					served[string(res.Output)]++
				}
				for _, name := range c.barred {
					if served[name] == 0 {
						t.Errorf("%s serves no other key: %v", name, served)
					}
				}
			})
		})
	}
}

func TestAKeyWithNoCopyButQuarantinedOnesIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "c"}, barring("a", "b")).start()
		r.hsms["c"].set(func(h *hsm) { h.refusal = errors.New("no power") })
		r.hsms["c"].crash()
		elapse(5 * time.Second)
		began := time.Now()
		_, err := r.Do(t.Context(), withKey(1))
		if !errors.Is(err, group.ErrBarred) || errors.Is(err, group.ErrLost) || pluginproto.ClassOf(err) != pluginproto.ClassMember {
			t.Fatalf("got %v, want the quarantine, as a failure of members", err)
		}
		want := fmt.Sprintf("group g: key %s cannot be used now: no member that serves has a sound copy, and that on a, b is quarantined", keyID(1))
		if err.Error() != want || time.Since(began) > 0 {
			t.Errorf("got %q after %v, want %q at once", err, time.Since(began), want)
		}
		var me *group.MemberError
		if !errors.As(err, &me) || me.Member != "a" {
			t.Errorf("%v names no member", err)
		}
		if _, err := r.Do(t.Context(), withKey(2)); err != nil {
			t.Errorf("another key: %v", err)
		}
		r.hsms["c"].set(func(h *hsm) { h.refusal = nil })
		elapse(time.Minute)
		if res, err := r.Do(t.Context(), withKey(1)); string(res.Output) != "c" || err != nil {
			t.Errorf("answered by %q with %v, want c, which is back with its sound copy", res.Output, err)
		}
	})
}

func TestWhatMayBeDoneToAQuarantinedCopy(t *testing.T) {
	for _, c := range []struct {
		name   string
		call   func(context.Context, group.Member) error
		refuse bool
	}{
		{"a command is refused", func(ctx context.Context, m group.Member) error {
			_, err := m.Do(ctx, withKey(1))
			return err
		}, true},
		{"it is not cloned to others", func(ctx context.Context, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
			return err
		}, true},
		{"another key is cloned to others", func(ctx context.Context, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(2)}})
			return err
		}, false},
		{"the member may be asked to take a copy", func(ctx context.Context, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
			return err
		}, false},
		{"it may be looked at", func(ctx context.Context, m group.Member) error {
			_, err := m.Inspect(ctx, keyID(1))
			return err
		}, false},
		{"it is listed", func(ctx context.Context, m group.Member) error {
			_, err := m.List(ctx)
			return err
		}, false},
		{"it may be destroyed", func(ctx context.Context, m group.Member) error {
			return m.Destroy(ctx, keyID(1))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a"}, barring("a")).start()
				m, err := r.Member("a")
				if err != nil {
					t.Fatal(err)
				}
				err = c.call(t.Context(), m)
				if !c.refuse {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if !errors.Is(err, group.ErrBarred) || pluginproto.ClassOf(err) == pluginproto.ClassNotFound {
					t.Errorf("got %v, want a refusal", err)
				}
				if n := strings.Count(err.Error(), "member a"); n != 1 {
					t.Errorf("%q names the member %d times", err, n)
				}
				r.wantState("a", api.MemberActive) // it is no fault of the member's
			})
		})
	}
}
