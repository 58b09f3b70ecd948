package kms_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// reserve is a rig with HSMs that belong to no group yet, and can be added by the
// names of their tokens.
type reserve struct {
	*rig
	spare map[string]*hsm // :: token label → HSM
}

// newReserve makes a group of n members and some spare HSMs.
func newReserve(t testing.TB, n int, spare ...string) *reserve {
	r := &reserve{rig: newRig(t, n), spare: make(map[string]*hsm)}
	for _, name := range spare {
		r.spare[name] = &hsm{name: name, token: memdriver.NewToken(name), pin: memdriver.PIN}
	}
	r.enlist = func(_ string, spec api.MemberSpec) (kms.MemberConfig, error) {
		h := r.spare[spec.Settings["token_label"]]
		if h == nil {
			return kms.MemberConfig{}, fmt.Errorf("there is no token %q", spec.Settings["token_label"])
		}
		settings := maps.Clone(spec.Settings)
		settings["token_label"] = h.token.Label()
		return kms.MemberConfig{
			Name: spec.Name, Driver: spec.Driver, Settings: settings, Open: h.open, Standby: spec.Standby,
			PIN: func(context.Context) ([]byte, error) { return []byte(memdriver.PIN), nil },
		}, nil
	}
	return r
}

func (r *reserve) spec(name, token string) api.MemberSpec {
	return api.MemberSpec{Name: name, Driver: "memory", Settings: map[string]string{"token_label": token}}
}

func (r *reserve) add(name string) {
	r.t.Helper()
	m, err := r.AddMember(r.t.Context(), "", r.spec(name, name))
	if err != nil {
		r.t.Fatal(err)
	}
	if m.Name != name || m.State != active {
		r.t.Fatalf("added %s, which is %s (%s)", m.Name, m.State, m.Reason)
	}
}

// wantMembers checks who is in the group, each with its state unless that is active.
func (r *reserve) wantMembers(want string) {
	r.t.Helper()
	r.eventually(func() error {
		var got []string
		for _, m := range r.Status().Groups[0].Members {
			name := m.Name
			if m.State != active {
				name += ":" + string(m.State)
			}
			got = append(got, name)
		}
		if s := strings.Join(got, " "); s != want {
			return fmt.Errorf("the members are %q, want %q", s, want)
		}
		return nil
	})
}

// load wraps and unwraps until stop is called, which fails the test when anything
// failed.
func (r *reserve) load(key string) (stop func()) {
	ctx, cancel := context.WithCancel(r.t.Context())
	var workers sync.WaitGroup
	var done atomic.Int64
	for range 8 {
		workers.Go(func() {
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				wrapped, err := r.Wrap(context.WithoutCancel(ctx), key, []byte("x"), nil)
				if err == nil {
					_, err = r.Unwrap(context.WithoutCancel(ctx), key, wrapped, nil)
				}
				if err != nil {
					r.t.Errorf("a request failed: %v", err)
				}
				done.Add(1)
				<-tick.C // an open loop would starve the bubble
			}
		})
	}
	return sync.OnceFunc(func() {
		cancel()
		workers.Wait()
		if done.Load() == 0 {
			r.t.Error("no request was made")
		}
	})
}

func TestMembershipChangesUnderLoadWithoutAFailedRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3, "hsm-d")
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		stop := r.load("shop")
		defer stop()
		ctx := t.Context()
		for range 3 {
			r.add("hsm-d")
			r.wantMembers("hsm-a hsm-b hsm-c hsm-d")
			for _, do := range []func() error{
				func() error { _, err := r.SetRole(ctx, "", "hsm-a", api.RoleStandby, false); return err },
				func() error { _, err := r.Drain(ctx, "", "hsm-b", false); return err },
				func() error { _, err := r.ReplaceMember(ctx, "", "hsm-c", nil); return err },
				func() error { _, err := r.SetRole(ctx, "", "hsm-b", api.RoleActive, false); return err },
				func() error { _, err := r.SetRole(ctx, "", "hsm-a", api.RoleActive, false); return err },
				func() error { return r.RemoveMember(ctx, "", "hsm-d", false) },
			} {
				if err := do(); err != nil {
					t.Fatal(err)
				}
			}
			r.wantMembers("hsm-a hsm-b hsm-c")
		}
		stop()
		r.wantConsistent()
	})
}

func TestAnAddedMemberHoldsWhatItShouldBeforeItServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2, "hsm-d")
		r.mustStart()
		defer func() { r.stop() }()
		for i := range 20 {
			r.create(fmt.Sprint("key-", i))
		}
		wrapped := r.wrap("key-7")
		r.add("hsm-d")
		if got := len(r.spare["hsm-d"].token.Keys()); got != 20 {
			t.Errorf("it serves and holds %d keys, want 20 and no canary", got)
		}
		r.hsms[0].leave()
		r.hsms[1].leave()
		r.wantMembers("hsm-a:down hsm-b:down hsm-d")
		r.wantUnwrap("key-7", wrapped)
		r.hsms[0].come()
		r.hsms[1].come()
		r.wantMembers("hsm-a hsm-b hsm-d")
		_, err := r.AddMember(t.Context(), "", r.spec("hsm-d", "hsm-d"))
		wantError(t, err, api.ErrExists, "has a member hsm-d already")
	})
}

func TestWhatWasChangedAtRunTimeOutlivesARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 4, "hsm-d2", "hsm-x")
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		wrapped := r.wrap("shop")
		ctx := t.Context()
		r.add("hsm-x")
		if err := r.RemoveMember(ctx, "", "hsm-a", false); err != nil {
			t.Fatal(err)
		}
		if _, err := r.SetRole(ctx, "", "hsm-b", api.RoleStandby, false); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Drain(ctx, "", "hsm-c", false); err != nil {
			t.Fatal(err)
		}
		spec := r.spec("hsm-d", "hsm-d2")
		if _, err := r.ReplaceMember(ctx, "", "hsm-d", &spec); err != nil {
			t.Fatal(err)
		}
		r.restart()
		r.wantMembers("hsm-b:standby hsm-c:draining hsm-d hsm-x")
		if m := r.Status().Groups[0].Members[2]; m.Token.Label != "hsm-d2" {
			t.Errorf("hsm-d has the token %s", m.Token.Label)
		}
		r.wantUnwrap("shop", wrapped)
		if err := r.Recover(ctx, "", "hsm-c"); err != nil { // which ends the drain
			t.Fatal(err)
		}
		r.restart()
		r.wantMembers("hsm-b:standby hsm-c hsm-d hsm-x")
		key, err := r.Key(ctx, "shop")
		if got := fmt.Sprint(key.Versions[0].Copies); err != nil || got != "[hsm-b hsm-c hsm-d hsm-x]" {
			t.Errorf("the copies are on %s, %v", got, err)
		}
	})
}

func TestReconfigureFollowsTheFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 4)
		all := r.group.Members
		r.group.Members = all[:3]
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		stop := r.load("shop")
		defer stop()
		ctx := t.Context()
		reload := func(want string, members ...kms.MemberConfig) []string {
			t.Helper()
			g := r.group
			g.Members = members
			left, err := r.Reconfigure(ctx, []kms.GroupConfig{g})
			if err != nil {
				t.Fatal(err)
			}
			r.group.Members = members
			r.wantMembers(want)
			return left
		}
		reload("hsm-a hsm-b hsm-c hsm-d", all...)
		if _, err := r.SetRole(ctx, "", "hsm-b", api.RoleStandby, false); err != nil {
			t.Fatal(err)
		}
		reload("hsm-a hsm-b:standby hsm-c hsm-d", all...) // the file says nothing new
		b := all[1]
		b.Source = "file:/etc/other.pin"
		reload("hsm-a hsm-b hsm-c hsm-d", all[0], b, all[2], all[3])
		reload("hsm-a hsm-c hsm-d", all[0], all[2], all[3])
		standby := all[3]
		standby.Standby = true
		reload("hsm-a hsm-c hsm-d:standby", all[0], all[2], standby)
		other := all[2]
		other.Settings = map[string]string{"token_label": "hsm-c"}
		reload("hsm-a hsm-c hsm-d:standby", all[0], other, standby)
		stop()

		left := reload("hsm-c hsm-d:standby", other) // hsm-c is not left alone: no key would have two copies
		if len(left) != 1 || !strings.Contains(left[0], "hsm-d of group default is in the configuration no more, and stays until a restart") {
			t.Errorf("left is %q", left)
		}
		g := r.group
		g.Members, g.MinCopies, g.NoHedge = nil, 1, true
		if _, err := r.Reconfigure(ctx, []kms.GroupConfig{g}); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("a group without members: %v", err)
		}
		g.Members = []kms.MemberConfig{other, standby, all[0]}
		left, err := r.Reconfigure(ctx, []kms.GroupConfig{g, {Name: "new", Domain: g.Domain, Members: all[1:2]}})
		if err != nil || len(left) != 3 || !strings.Contains(strings.Join(left, "\n"), "group new is new: it needs a restart") {
			t.Errorf("left is %q, %v", left, err)
		}
	})
}

// A member that comes into the file and is away belongs to the group all the same.
func TestAMemberOfTheFileThatIsAwayIsRecovered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3)
		all := r.group.Members
		r.group.Members = all[:2]
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		r.hsms[2].leave()
		g := r.group
		g.Members = all
		left, err := r.Reconfigure(t.Context(), []kms.GroupConfig{g})
		if err != nil || len(left) != 1 || !strings.Contains(left[0], "member hsm-c of group default: it is a member now, and does not serve yet") {
			t.Errorf("left is %q, %v", left, err)
		}
		r.wantMembers("hsm-a hsm-b hsm-c:down")
		r.hsms[2].come()
		r.wantMembers("hsm-a hsm-b hsm-c")
		r.wantConsistent()
	})
}

// What the others could not do without when the file was read is done when it is read again.
func TestARoleThatTheFileCouldNotChangeIsChangedByTheNextReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2)
		r.mustStart()
		defer func() { r.stop() }()
		r.hsms[1].leave()
		r.wantMembers("hsm-a hsm-b:down")
		g := r.group
		g.Members = slices.Clone(r.group.Members)
		g.Members[0].Standby = true
		reload := func() []string {
			t.Helper()
			left, err := r.Reconfigure(t.Context(), []kms.GroupConfig{g})
			if err != nil {
				t.Fatal(err)
			}
			return left
		}
		for range 2 { // it is said as often as it is asked for
			if left := reload(); len(left) != 1 || !strings.Contains(left[0], "member hsm-a of group default") {
				t.Errorf("making a standby of the last active member: left is %q", left)
			}
		}
		r.wantMembers("hsm-a hsm-b:down")
		r.hsms[1].come()
		r.wantMembers("hsm-a hsm-b")
		if left := reload(); len(left) > 0 {
			t.Errorf("left is %q", left)
		}
		r.wantMembers("hsm-a:standby hsm-b")
	})
}

func TestRemovalsThatAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3)
		r.mustStart()
		defer func() { r.stop() }()
		ctx := t.Context()
		wantError(t, r.RemoveMember(ctx, "", "hsm-x", false), api.ErrNotFound, `no member "hsm-x"`)
		wantError(t, r.RemoveMember(ctx, "nowhere", "hsm-a", false), api.ErrNotFound, "nowhere")

		r.hsms[1].leave()
		r.hsms[2].leave()
		r.wantMembers("hsm-a hsm-b:down hsm-c:down")
		lastActive := func(doing string, err error) {
			t.Helper()
			wantError(t, err, api.ErrState, "")
			if want := doing + ": it is the last active member of the group"; err.Error() != want {
				t.Errorf("error says %q, want %q", err, want)
			}
			if e, _ := errors.AsType[*api.Error](err); e.Member != "hsm-a" {
				t.Errorf("the member of error %q is %q", err, e.Member)
			}
		}
		lastActive("removing member hsm-a", r.RemoveMember(ctx, "", "hsm-a", false))
		_, err := r.Drain(ctx, "", "hsm-a", false)
		lastActive("draining member hsm-a", err)
		_, err = r.SetRole(ctx, "", "hsm-a", api.RoleStandby, false)
		lastActive("making member hsm-a standby", err)
		_, err = r.SetRole(ctx, "", "hsm-a", "boss", false)
		wantError(t, err, api.ErrBadRequest, `no role "boss"`)

		if _, err := r.CreateMasterKey(ctx, "alone", kms.KeyOptions{AllowDegraded: true}); err != nil {
			t.Fatal(err)
		}
		wrapped := r.wrap("alone")
		wantError(t, r.RemoveMember(ctx, "", "hsm-a", false), api.ErrState, "no other member is known to hold key alone")
		r.wantUnwrap("alone", wrapped)
		r.hsms[1].come()
		r.hsms[2].come()
		r.wantMembers("hsm-a hsm-b hsm-c")
		r.wantConsistent()

		if err := r.RemoveMember(ctx, "", "hsm-a", false); err != nil {
			t.Fatal(err)
		}
		wantError(t, r.RemoveMember(ctx, "", "hsm-b", false), api.ErrState, "would have 1 members, and new keys need 2 copies")
		r.wantMembers("hsm-b hsm-c")
		if err := r.RemoveMember(ctx, "", "hsm-b", true); err != nil {
			t.Fatal(err)
		}
		wantError(t, r.RemoveMember(ctx, "", "hsm-c", true), api.ErrState, "the only member")
		r.wantUnwrap("alone", wrapped)
		r.create("after") // a group of one keeps one copy
		r.restart()
		r.wantMembers("hsm-c")
		r.wantUnwrap("alone", wrapped)
	})
}

// records says what the catalog remembers of members.
func records(t testing.TB, disk *catalogtest.Memory) string {
	t.Helper()
	var all []string
	for m, err := range catalog.New(disk.Reopen()).Members(context.Background(), "default") {
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b))
	}
	return strings.Join(all, "\n")
}

func TestAReinitialisedTokenIsFailedUntilItIsAccepted(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted %v", restarted), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReserve(t, 3)
				r.mustStart()
				defer func() { r.stop() }()
				r.create("shop")
				wrapped := r.wrap("shop")
				h := r.hsms[2]
				h.leave()
				r.wantMembers("hsm-a hsm-b hsm-c:down")
				h.token = memdriver.NewToken("anew") // another serial number
				h.come()
				if restarted {
					r.restart()
				}
				r.wantMembers("hsm-a hsm-b hsm-c:failed")
				m := r.Status().Groups[0].Members[2]
				for _, want := range []string{"mem-hsm-c", "mem-anew", "kmsd member replace hsm-c"} {
					if !strings.Contains(m.Reason, want) {
						t.Errorf("the reason does not say %q: %s", want, m.Reason)
					}
				}
				if m.CKR != "CKR_TOKEN_NOT_RECOGNIZED" {
					t.Errorf("the CKR is %s", m.CKR)
				}
				wantError(t, r.Recover(t.Context(), "", "hsm-c"), api.ErrMemberFailed, "kmsd member replace hsm-c")
				if len(h.token.Keys()) > 0 {
					t.Error("keys were put on it")
				}
				if _, err := r.ReplaceMember(t.Context(), "", "hsm-c", nil); err != nil {
					t.Fatal(err)
				}
				r.wantMembers("hsm-a hsm-b hsm-c")
				r.wantConsistent()
				r.wantUnwrapOn(h, "shop", wrapped)
				r.restart()
				r.wantMembers("hsm-a hsm-b hsm-c")
			})
		})
	}
}

func TestAReplacementThatFailsLeavesTheMemberAsItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3, "hsm-x")
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		before := records(t, r.disk)
		r.spare["hsm-x"].leave()
		spec := r.spec("hsm-c", "hsm-x")
		_, err := r.ReplaceMember(t.Context(), "", "hsm-c", &spec)
		wantError(t, err, api.ErrMemberFailed, "replacing member hsm-c")
		r.wantMembers("hsm-a hsm-b hsm-c")
		r.wantConsistent()
		spec.Name = "hsm-y"
		_, err = r.ReplaceMember(t.Context(), "", "hsm-c", &spec)
		wantError(t, err, api.ErrBadRequest, "cannot get another name")
		if after := records(t, r.disk); after != before {
			t.Errorf("what is remembered of members was\n%s\nand is\n%s", before, after)
		}
	})
}

// A catalog from before tokens were known by their serial numbers: what is there is
// taken.
func TestACatalogWithoutMembersTakesTheTokensThatAreThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3)
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		wrapped := r.wrap("shop")
		r.stop()
		for _, name := range []string{"hsm-a", "hsm-b", "hsm-c"} {
			if err := catalog.New(r.disk.Reopen()).ForgetMember(t.Context(), "default", name); err != nil {
				t.Fatal(err)
			}
		}
		r.mustStart()
		r.wantMembers("hsm-a hsm-b hsm-c")
		r.wantUnwrap("shop", wrapped)
		r.wantConsistent()
		if got := records(t, r.disk); strings.Count(got, `"serial"`) != 3 {
			t.Errorf("remembered is\n%s", got)
		}
	})
}

func TestMembershipIsRightAfterACrashAtEveryStep(t *testing.T) {
	story := func(r *reserve) {
		ctx := r.t.Context()
		r.CreateMasterKey(ctx, "shop", kms.KeyOptions{})
		r.AddMember(ctx, "", r.spec("hsm-x", "hsm-x"))
		spec := r.spec("hsm-b", "hsm-y")
		r.ReplaceMember(ctx, "", "hsm-b", &spec)
		r.SetRole(ctx, "", "hsm-c", api.RoleStandby, false)
		r.RemoveMember(ctx, "", "hsm-a", false)
		r.Drain(ctx, "", "hsm-x", true)
		r.RemoveMember(ctx, "", "hsm-x", true)
	}
	for step, more := 1, true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReserve(t, 3, "hsm-x", "hsm-y")
				store := catalogtest.NewCrasher(r.disk.Reopen(), step)
				if err := r.start(store); err == nil {
					story(r)
					r.stop()
				}
				more = store.Crashed()
				r.mustStart()
				defer func() { r.stop() }()
				members := r.Status().Groups[0].Members
				for _, m := range members {
					if m.State == api.MemberDraining {
						if _, err := r.SetRole(t.Context(), "", m.Name, api.RoleActive, false); err != nil {
							t.Fatal(err)
						}
					}
				}
				var want []string
				for _, m := range members {
					want = append(want, m.Name)
				}
				slices.Sort(want)
				r.eventually(func() error { return r.whole(want) })
				if !more && fmt.Sprint(want) != "[hsm-b hsm-c]" {
					t.Errorf("without a crash the members are %v", want)
				}
			})
		})
	}
}

// whole checks that every member serves, and that versions are known to be on the
// members and on nobody else.
func (r *reserve) whole(members []string) error {
	for _, m := range r.Status().Groups[0].Members {
		if m.State != active && m.State != standby {
			return fmt.Errorf("%s is %s (%s)", m.Name, m.State, m.Reason)
		}
		if m.Missing > 0 {
			return fmt.Errorf("%s misses %d", m.Name, m.Missing)
		}
	}
	c := catalog.New(r.disk.Reopen())
	for rec, err := range c.Keys(context.Background(), "", "", 0) {
		if err != nil {
			return err
		}
		for _, v := range rec.Versions {
			if v.State != catalog.Destroyed && !slices.Equal(v.Copies, members) {
				return fmt.Errorf("key %s version %d is on %v, the members are %v", rec.Name, v.Number, v.Copies, members)
			}
		}
	}
	for t, err := range c.Tombstones(context.Background()) {
		if err != nil || len(t.Pending) > 0 && !t.IsCanary() { // those may name one that did not join
			return fmt.Errorf("the tombstone of key %s is pending on %v, %w", t.Key, t.Pending, err)
		}
	}
	for in, err := range c.Intents(context.Background()) {
		return fmt.Errorf("an intent for key %s is left, %w", in.Key, err)
	}
	return nil
}
