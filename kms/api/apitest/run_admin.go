package apitest

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"kmsd/kms/api"
)

// Operated is a service with what its operator can do.
type Operated interface {
	api.Service
	api.Admin
}

// OpenOperated returns a service without keys for one test, and closes it with
// t.Cleanup. Its first group has one or more members, all of them active and in step.
// spare makes an HSM that can join it, under that name.
type OpenOperated func(t *testing.T) (s Operated, spare func(name string) api.MemberSpec)

// operated is what a test of api.Admin has at hand.
type operated struct {
	Operated
	spare func(name string) api.MemberSpec
	group string
	first string // a member
}

// RunAdmin tests the promises of api.Admin.
func RunAdmin(t *testing.T, around Around, open OpenOperated) {
	for _, c := range []struct {
		promise string
		test    func(*testing.T, operated)
	}{
		{"a member that is added has every key and serves", added},
		{"a member is added once", addedOnce},
		{"a member that is not well described is refused and leaves no trace", badSpecs},
		{"a member that is removed is gone and the rest serves", removed},
		{"the last active member is refused unless forced", lastActive},
		{"a member becomes a standby and active again", roles},
		{"a drained member takes nothing until its role is set or it is recovered", drained},
		{"a member that is in step needs no recovery", inStepAlready},
		{"what does not exist is not found", strangersToAdmin},
		{"a synchronization finds every member in step", synced},
		{"a group that is well stays well when it is reinitialized", reinitialized},
		{"a check finds no fault and leaves nothing", checked},
		{"the log tells the last events, oldest first", logged},
		{"an administration whose time is over says so", adminDeadlines},
		{"keys serve while members come and go", comeAndGo},
	} {
		t.Run(c.promise, func(t *testing.T) {
			around(t, func(t *testing.T) {
				s, spare := open(t)
				g := s.Status().Groups[0]
				c.test(t, operated{Operated: s, spare: spare, group: g.Name, first: g.Members[0].Name})
			})
		})
	}
}

// member returns the one of that name; its Name is "" when there is none.
func (o operated) member(name string) api.Member {
	for _, m := range o.Status().Groups[0].Members {
		if m.Name == name {
			return m
		}
	}
	return api.Member{}
}

// add takes in a spare HSM.
func (o operated) add(t *testing.T, name string) api.Member {
	t.Helper()
	m, err := o.AddMember(t.Context(), o.group, o.spare(name))
	ok(t, err, "adding member "+name)
	return m
}

// copies are the members that hold the newest version of a key.
func (o operated) copies(t *testing.T, name string) []string {
	t.Helper()
	k, err := o.Key(t.Context(), name)
	ok(t, err, "showing key "+name)
	return k.Versions[len(k.Versions)-1].Copies
}

func added(t *testing.T, o operated) {
	make1(t, o, "shop", "")
	m := o.add(t, "spare-1")
	if m.Name != "spare-1" || m.Role != api.RoleActive || m.State != api.MemberActive || m.Keys != 1 || m.Missing != 0 {
		t.Errorf("added %+v", m)
	}
	if !slices.Contains(o.copies(t, "shop"), "spare-1") {
		t.Errorf("the new member holds no copy: %v", o.copies(t, "shop"))
	}
	v, err := o.Verify(t.Context(), "shop")
	ok(t, err, "verifying")
	if !v.OK || !slices.ContainsFunc(v.Copies, func(c api.Copy) bool { return c.Member == "spare-1" && c.State == "ok" }) {
		t.Errorf("verified %+v", v)
	}
	spec := o.spare("spare-2")
	spec.Standby = true
	standby, err := o.AddMember(t.Context(), o.group, spec)
	ok(t, err, "adding a standby")
	if standby.Role != api.RoleStandby || standby.State != api.MemberStandby {
		t.Errorf("added %+v", standby)
	}
	if g := o.Status().Groups[0]; g.State != api.GroupNormal {
		t.Errorf("the group is %s", g.State)
	}
}

func addedOnce(t *testing.T, o operated) {
	o.add(t, "spare-1")
	_, err := o.AddMember(t.Context(), o.group, o.spare("spare-1"))
	wants(t, err, api.ErrExists, "adding it again")
	if m := o.member("spare-1"); m.State != api.MemberActive {
		t.Errorf("the member is %+v", m)
	}
}

func badSpecs(t *testing.T, o operated) {
	before := len(o.Status().Groups[0].Members)
	for what, change := range map[string]func(*api.MemberSpec){
		"no name":         func(s *api.MemberSpec) { s.Name = "" },
		"a path for name": func(s *api.MemberSpec) { s.Name = "../hsm" },
		"no driver":       func(s *api.MemberSpec) { s.Driver = "" },
		"no PIN":          func(s *api.MemberSpec) { s.PIN.File = "" },
	} {
		spec := o.spare("spare-1")
		change(&spec)
		_, err := o.AddMember(t.Context(), o.group, spec)
		wants(t, err, api.ErrBadRequest, "adding a member with "+what)
	}
	if after := len(o.Status().Groups[0].Members); after != before {
		t.Errorf("%d members, before there were %d", after, before)
	}
}

func removed(t *testing.T, o operated) {
	o.add(t, "spare-1")
	make1(t, o, "shop", "")
	ok(t, o.RemoveMember(t.Context(), o.group, "spare-1", false), "removing a member")
	if m := o.member("spare-1"); m.Name != "" {
		t.Errorf("it is still there: %+v", m)
	}
	if slices.Contains(o.copies(t, "shop"), "spare-1") {
		t.Error("its copy is still counted")
	}
	if _, err := o.Wrap(t.Context(), "shop", []byte("p"), nil); err != nil {
		t.Errorf("wrapping with the rest: %v", err)
	}
	wants(t, o.RemoveMember(t.Context(), o.group, "spare-1", false), api.ErrNotFound, "removing it again")
	o.add(t, "spare-1") // the name is free, and its token still has its keys
}

// alone leaves one active member and returns it.
func (o operated) alone(t *testing.T) string {
	t.Helper()
	for _, m := range o.Status().Groups[0].Members {
		if m.Name != o.first {
			ok(t, o.RemoveMember(t.Context(), o.group, m.Name, true), "removing "+m.Name)
		}
	}
	return o.first
}

func lastActive(t *testing.T, o operated) {
	last := o.alone(t)
	spec := o.spare("spare-1")
	spec.Standby = true
	_, err := o.AddMember(t.Context(), o.group, spec)
	ok(t, err, "adding a standby")
	wants(t, o.RemoveMember(t.Context(), o.group, last, false), api.ErrState, "removing the last")
	_, err = o.Drain(t.Context(), o.group, last, false)
	wants(t, err, api.ErrState, "draining the last")
	_, err = o.SetRole(t.Context(), o.group, last, api.RoleStandby, false)
	wants(t, err, api.ErrState, "making a standby of the last")
	if m := o.member(last); m.State != api.MemberActive || m.Role != api.RoleActive {
		t.Errorf("what was refused has changed it: %+v", m)
	}
	m, err := o.Drain(t.Context(), o.group, last, true)
	ok(t, err, "draining the last by force")
	if m.State != api.MemberDraining {
		t.Errorf("drained: %+v", m)
	}
	_, err = o.SetRole(t.Context(), o.group, last, api.RoleActive, false)
	ok(t, err, "ending the drain")
}

func roles(t *testing.T, o operated) {
	o.add(t, "spare-1")
	m, err := o.SetRole(t.Context(), o.group, "spare-1", api.RoleStandby, false)
	ok(t, err, "making a standby")
	if m.Role != api.RoleStandby || m.State != api.MemberStandby {
		t.Errorf("standby: %+v", m)
	}
	m, err = o.SetRole(t.Context(), o.group, "spare-1", api.RoleActive, false)
	ok(t, err, "making it active")
	if m.Role != api.RoleActive || m.State != api.MemberActive {
		t.Errorf("active: %+v", m)
	}
	_, err = o.SetRole(t.Context(), o.group, "spare-1", "spare", false)
	wants(t, err, api.ErrBadRequest, "an unknown role")
}

func drained(t *testing.T, o operated) {
	o.add(t, "spare-1")
	for _, end := range []struct {
		name string
		do   func() error
	}{
		{"setting its role", func() error {
			_, err := o.SetRole(t.Context(), o.group, "spare-1", api.RoleActive, false)
			return err
		}},
		{"recovering it", func() error { return o.Recover(t.Context(), o.group, "spare-1") }},
	} {
		m, err := o.Drain(t.Context(), o.group, "spare-1", false)
		ok(t, err, "draining")
		if m.State != api.MemberDraining || m.InFlight != 0 {
			t.Errorf("drained: %+v", m)
		}
		ok(t, end.do(), end.name)
		if m := o.member("spare-1"); m.State != api.MemberActive {
			t.Errorf("after %s it is %s", end.name, m.State)
		}
	}
}

func inStepAlready(t *testing.T, o operated) {
	ok(t, o.Recover(t.Context(), o.group, o.first), "recovering a member in step")
	if m := o.member(o.first); m.State != api.MemberActive {
		t.Errorf("it is %s", m.State)
	}
}

func strangersToAdmin(t *testing.T, o operated) {
	ctx := t.Context()
	for _, c := range []struct{ group, member string }{{"nowhere", o.first}, {o.group, "nobody"}, {o.group, ""}} {
		what := c.group + "/" + c.member
		wants(t, o.Recover(ctx, c.group, c.member), api.ErrNotFound, "Recover "+what)
		wants(t, o.RemoveMember(ctx, c.group, c.member, true), api.ErrNotFound, "RemoveMember "+what)
		_, err := o.ReplaceMember(ctx, c.group, c.member, nil)
		wants(t, err, api.ErrNotFound, "ReplaceMember "+what)
		_, err = o.SetRole(ctx, c.group, c.member, api.RoleActive, false)
		wants(t, err, api.ErrNotFound, "SetRole "+what)
		_, err = o.Drain(ctx, c.group, c.member, true)
		wants(t, err, api.ErrNotFound, "Drain "+what)
	}
	_, err := o.AddMember(ctx, "nowhere", o.spare("spare-1"))
	wants(t, err, api.ErrNotFound, "AddMember")
	_, err = o.Sync(ctx, "nowhere", api.SyncOptions{})
	wants(t, err, api.ErrNotFound, "Sync")
	_, err = o.Reinitialize(ctx, "nowhere")
	wants(t, err, api.ErrNotFound, "Reinitialize")
	_, err = o.Check(ctx, "nowhere")
	wants(t, err, api.ErrNotFound, "Check")
}

func synced(t *testing.T, o operated) {
	make1(t, o, "shop", "")
	o.add(t, "spare-1")
	report, err := o.Sync(t.Context(), o.group, api.SyncOptions{})
	ok(t, err, "synchronizing")
	if report.Group != o.group || len(report.Members) != len(o.Status().Groups[0].Members) || len(report.Adopted) != 0 {
		t.Errorf("report %+v", report)
	}
	for _, m := range report.Members {
		if m.Held != 1 || m.Cloned+m.Changed+m.Destroyed+m.Missing != 0 || len(m.Quarantined)+len(m.Foreign) != 0 || m.Error != "" {
			t.Errorf("member %+v", m)
		}
	}
}

func reinitialized(t *testing.T, o operated) {
	make1(t, o, "shop", "")
	g, err := o.Reinitialize(t.Context(), o.group)
	ok(t, err, "reinitializing")
	if g.Name != o.group || g.State != api.GroupNormal {
		t.Errorf("group %+v", g)
	}
	if _, err := o.Wrap(t.Context(), "shop", []byte("p"), nil); err != nil {
		t.Errorf("wrapping: %v", err)
	}
}

func checked(t *testing.T, o operated) {
	make1(t, o, "shop", "")
	c, err := o.Check(t.Context(), o.group)
	ok(t, err, "checking")
	faulty := slices.ContainsFunc(c.Findings, func(f api.Finding) bool { return f.Fault })
	if c.Group != o.group || !c.OK || faulty {
		t.Errorf("check %+v", c)
	}
	report, err := o.Sync(t.Context(), o.group, api.SyncOptions{})
	ok(t, err, "synchronizing")
	for _, m := range report.Members {
		if m.Held != 1 || m.Destroyed != 0 || len(m.Foreign) != 0 {
			t.Errorf("the check has left something: %+v", m)
		}
	}
}

func logged(t *testing.T, o operated) {
	o.add(t, "spare-1")
	_, err := o.Drain(t.Context(), o.group, "spare-1", false)
	ok(t, err, "draining")
	isDrain := func(e api.Event) bool {
		return e.Member == "spare-1" && e.Group == o.group && e.Type == api.EventMember && e.To == string(api.MemberDraining)
	}
	var all []api.Event
	for end := time.Now().Add(patience); !slices.ContainsFunc(all, isDrain); { // events are told a moment later
		if time.Now().After(end) {
			t.Fatalf("the log does not tell of the drain: %+v", all)
		}
		<-time.After(10 * time.Millisecond)
		all, err = o.Log(t.Context(), 0)
		ok(t, err, "reading the log")
	}
	joined := slices.IndexFunc(all, func(e api.Event) bool { return e.Member == "spare-1" })
	if joined < 0 || joined >= slices.IndexFunc(all, isDrain) ||
		!slices.IsSortedFunc(all, func(a, b api.Event) int { return a.Time.Compare(b.Time) }) {
		t.Errorf("the log is out of order: %+v", all)
	}
	last, err := o.Log(t.Context(), 1)
	ok(t, err, "reading its end")
	if len(last) != 1 || last[0].Time.Before(all[len(all)-1].Time) {
		t.Errorf("the last one is %+v, before it was %+v", last, all[len(all)-1])
	}
	_, err = o.Log(t.Context(), -1)
	wants(t, err, api.ErrBadRequest, "the last -1 events")
}

func adminDeadlines(t *testing.T, o operated) {
	for _, ctx := range []context.Context{canceled(t), expired(t)} {
		_, err := o.AddMember(ctx, o.group, o.spare("spare-1"))
		wants(t, err, api.ErrDeadline, "adding a member when the time is over")
		_, err = o.Check(ctx, o.group)
		wants(t, err, api.ErrDeadline, "checking when the time is over")
	}
	if m := o.member("spare-1"); m.Name != "" {
		t.Errorf("the member is there: %+v", m)
	}
}

// comeAndGo wraps and unwraps while the membership changes.
func comeAndGo(t *testing.T, o operated) {
	make1(t, o, "shop", "")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				wrapped, err := o.Wrap(t.Context(), "shop", []byte("p"), nil)
				if err == nil {
					_, err = o.Unwrap(t.Context(), "shop", wrapped, nil)
				}
				if err != nil {
					t.Errorf("using a key meanwhile: %v", err)
					return
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	meanwhile := func() { <-time.After(3 * time.Millisecond) } // they go on, and are at it when it ends
	for range 3 {
		meanwhile()
		o.add(t, "spare-1")
		meanwhile()
		_, err := o.Drain(t.Context(), o.group, "spare-1", false)
		ok(t, err, "draining")
		meanwhile()
		_, err = o.SetRole(t.Context(), o.group, "spare-1", api.RoleStandby, false)
		ok(t, err, "making a standby")
		meanwhile()
		ok(t, o.RemoveMember(t.Context(), o.group, "spare-1", false), "removing")
	}
}
