package apitest

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kmsd/kms/api"
)

// MemorySpare describes a member that a Memory takes in.
func MemorySpare(name string) api.MemberSpec {
	return api.MemberSpec{
		Name: name, Driver: "memory", PIN: api.PINSource{File: "/etc/kmsd/" + name + ".pin"}, Settings: map[string]string{"token_label": name},
	}
}

// memberLocked returns the member of that name.
func (m *Memory) memberLocked(group, name string) (*api.Member, error) {
	if group != MemoryGroup {
		return nil, api.NewError(api.CodeNotFound, "no group is named "+group, nil)
	}
	m.bornLocked()
	for i := range m.members {
		if m.members[i].Name == name {
			return &m.members[i], nil
		}
	}
	return nil, api.NewError(api.CodeNotFound, fmt.Sprintf("group %s has no member %q", group, name), nil)
}

// bornLocked gives the zero value its one member.
func (m *Memory) bornLocked() {
	if m.born {
		return
	}
	m.born = true
	m.members = []api.Member{{
		Name: MemoryMember, Driver: "memory", Role: api.RoleActive, State: api.MemberActive, CKR: "CKR_OK", Since: time.Now().UTC(),
	}}
}

// holdersLocked names the members, all of which hold every key.
func (m *Memory) holdersLocked() []string {
	m.bornLocked()
	names := make([]string, len(m.members))
	for i, member := range m.members {
		names[i] = member.Name
	}
	return names
}

// groupLocked is the group as it is.
func (m *Memory) groupLocked() api.Group {
	m.bornLocked()
	g := api.Group{Name: MemoryGroup, MinCopies: 1, Keys: m.versionsLocked(), Members: slices.Clone(m.members)}
	active, standby := 0, 0
	for i := range g.Members {
		g.Members[i].Keys = g.Keys
		switch g.Members[i].State {
		case api.MemberActive:
			active++
			if g.Primary == "" {
				g.Primary = g.Members[i].Name
			}
		case api.MemberStandby:
			standby++
		}
	}
	switch {
	case active+standby == 0:
		g.State = api.GroupLost
	case active == 0:
		g.State = api.GroupStandbyServing
	case active+standby == len(g.Members):
		g.State = api.GroupNormal
	case active == 1:
		g.State = api.GroupSole
	default:
		g.State = api.GroupDegraded
	}
	return g
}

// versionsLocked counts the versions that are not destroyed.
func (m *Memory) versionsLocked() int {
	n := 0
	for _, k := range m.keys {
		for _, v := range k.Versions {
			if v.State != api.StateDestroyed {
				n++
			}
		}
	}
	return n
}

// onMember calls f with a member under the lock and returns it as it is then. The
// change is an event.
func (m *Memory) onMember(ctx context.Context, method, group, name, cause string, f func(*api.Member) error) (api.Member, error) {
	if err := m.begin(ctx, method, ""); err != nil {
		return api.Member{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	member, err := m.memberLocked(group, name)
	if err != nil {
		return api.Member{}, err
	}
	before := member.State
	if err := f(member); err != nil {
		return api.Member{}, err
	}
	m.recordLocked(name, before, member.State, cause)
	after := *member
	after.Keys = m.versionsLocked()
	return after, nil
}

// recordLocked tells the readers of events of a member, and remembers it.
func (m *Memory) recordLocked(name string, from, to api.MemberState, cause string) {
	e := api.Event{
		Time: time.Now(), Type: api.EventMember, Group: MemoryGroup, Member: name, From: string(from), To: string(to), CKR: "CKR_OK", Cause: cause,
	}
	m.log = append(m.log, e)
	m.tellLocked(e)
}

// lastLocked refuses to take the last active member out of service.
func (m *Memory) lastLocked(member *api.Member, doing string, force bool) error {
	others := slices.ContainsFunc(m.members, func(o api.Member) bool { return o.Name != member.Name && o.State == api.MemberActive })
	if member.State != api.MemberActive || others || force {
		return nil
	}
	e := api.NewError(api.CodeState, fmt.Sprintf("%s %s: it is the last active member of group %s", doing, member.Name, MemoryGroup), nil)
	e.Member, e.Hint = member.Name, "bring another member back first, or force it, and nobody will serve"
	return e
}

// inStep is the state of a member that serves or stands by.
func inStep(role string) api.MemberState {
	if role == api.RoleStandby {
		return api.MemberStandby
	}
	return api.MemberActive
}

// Recover brings a member in step.
func (m *Memory) Recover(ctx context.Context, group, member string) error {
	_, err := m.onMember(ctx, "Recover", group, member, "recover was asked for", func(mb *api.Member) error {
		mb.State = inStep(mb.Role)
		return nil
	})
	return err
}

// AddMember takes in a member that is nothing but its name.
func (m *Memory) AddMember(ctx context.Context, group string, spec api.MemberSpec) (api.Member, error) {
	if err := m.begin(ctx, "AddMember", ""); err != nil {
		return api.Member{}, err
	}
	if err := checkSpec(spec); err != nil {
		return api.Member{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if group != MemoryGroup {
		return api.Member{}, api.NewError(api.CodeNotFound, "no group is named "+group, nil)
	}
	if slices.Contains(m.holdersLocked(), spec.Name) {
		return api.Member{}, api.NewError(api.CodeExists, fmt.Sprintf("group %s has a member %s already", group, spec.Name), nil)
	}
	role := api.RoleActive
	if spec.Standby {
		role = api.RoleStandby
	}
	added := api.Member{
		Name: spec.Name, Driver: spec.Driver, Role: role, State: inStep(role), CKR: "CKR_OK", Since: time.Now().UTC(), Keys: m.versionsLocked(),
		Token: api.Token{Label: spec.Settings["token_label"]},
	}
	m.members = append(m.members, added)
	m.copiesLocked(func(copies []string) []string { return append(copies, spec.Name) })
	m.recordLocked(spec.Name, "", added.State, "it was added")
	return added, nil
}

func checkSpec(spec api.MemberSpec) error {
	wrong := ""
	switch {
	case api.CheckName(spec.Name) != nil:
		wrong = fmt.Sprintf("%q is no name of a member", spec.Name)
	case spec.Driver == "":
		wrong = "member " + spec.Name + " has no driver"
	case spec.PIN.File == "":
		wrong = "member " + spec.Name + " has no PIN file"
	default:
		return nil
	}
	return api.NewError(api.CodeBadRequest, wrong, nil)
}

// copiesLocked changes the list of holders of every version that lives.
func (m *Memory) copiesLocked(change func(copies []string) []string) {
	for _, k := range m.keys {
		for i := range k.Versions {
			if k.Versions[i].State != api.StateDestroyed {
				k.Versions[i].Copies = change(slices.Clone(k.Versions[i].Copies))
			}
		}
	}
}

// RemoveMember forgets a member.
func (m *Memory) RemoveMember(ctx context.Context, group, member string, force bool) error {
	if err := m.begin(ctx, "RemoveMember", ""); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	mb, err := m.memberLocked(group, member)
	if err != nil {
		return err
	}
	if err := m.lastLocked(mb, "removing member", force); err != nil {
		return err
	}
	m.recordLocked(member, mb.State, "", "it was removed")
	m.members = slices.DeleteFunc(m.members, func(o api.Member) bool { return o.Name == member })
	m.copiesLocked(func(copies []string) []string {
		return slices.DeleteFunc(copies, func(name string) bool { return name == member })
	})
	return nil
}

// ReplaceMember takes another token for granted.
func (m *Memory) ReplaceMember(ctx context.Context, group, member string, spec *api.MemberSpec) (api.Member, error) {
	return m.onMember(ctx, "ReplaceMember", group, member, "it was replaced", func(mb *api.Member) error {
		if spec != nil {
			if err := checkSpec(*spec); err != nil {
				return err
			}
			mb.Driver, mb.Token.Label = spec.Driver, spec.Settings["token_label"]
		}
		mb.State = inStep(mb.Role)
		return nil
	})
}

// SetRole makes a member active or standby.
func (m *Memory) SetRole(ctx context.Context, group, member, role string, force bool) (api.Member, error) {
	return m.onMember(ctx, "SetRole", group, member, "its role was set", func(mb *api.Member) error {
		switch role {
		case api.RoleActive:
		case api.RoleStandby:
			if err := m.lastLocked(mb, "making a standby of member", force); err != nil {
				return err
			}
		default:
			return api.NewError(api.CodeBadRequest, fmt.Sprintf("a member's role is %s or %s, not %q", api.RoleActive, api.RoleStandby, role), nil)
		}
		mb.Role, mb.State = role, inStep(role)
		return nil
	})
}

// Drain gives a member nothing new; it never has anything to finish.
func (m *Memory) Drain(ctx context.Context, group, member string, force bool) (api.Member, error) {
	return m.onMember(ctx, "Drain", group, member, "it was drained", func(mb *api.Member) error {
		if err := m.lastLocked(mb, "draining member", force); err != nil {
			return err
		}
		mb.State = api.MemberDraining
		return nil
	})
}

// ofGroup is begin for what is about the group. The lock is held when the error is nil.
func (m *Memory) ofGroup(ctx context.Context, method, group string) error {
	if err := m.begin(ctx, method, ""); err != nil {
		return err
	}
	if group != MemoryGroup {
		return api.NewError(api.CodeNotFound, "no group is named "+group, nil)
	}
	m.mu.Lock()
	m.bornLocked()
	return nil
}

// Sync finds every member in step.
func (m *Memory) Sync(ctx context.Context, group string, _ api.SyncOptions) (api.SyncReport, error) {
	if err := m.ofGroup(ctx, "Sync", group); err != nil {
		return api.SyncReport{}, err
	}
	defer m.mu.Unlock()
	report := api.SyncReport{Group: group, Members: []api.MemberSync{}}
	for _, mb := range m.members {
		if mb.State == inStep(mb.Role) {
			report.Members = append(report.Members, api.MemberSync{Member: mb.Name, Held: m.versionsLocked()})
		}
	}
	return report, nil
}

// Reinitialize brings back who is away. A member that drains is not.
func (m *Memory) Reinitialize(ctx context.Context, group string) (api.Group, error) {
	if err := m.ofGroup(ctx, "Reinitialize", group); err != nil {
		return api.Group{}, err
	}
	defer m.mu.Unlock()
	return m.groupLocked(), nil
}

// Check finds no fault.
func (m *Memory) Check(ctx context.Context, group string) (api.GroupCheck, error) {
	if err := m.ofGroup(ctx, "Check", group); err != nil {
		return api.GroupCheck{}, err
	}
	defer m.mu.Unlock()
	return api.GroupCheck{Group: group, OK: true, Findings: []api.Finding{}}, nil
}

// Log returns what has happened to members.
func (m *Memory) Log(ctx context.Context, last int) ([]api.Event, error) {
	if err := m.begin(ctx, "Log", ""); err != nil {
		return nil, err
	}
	if last < 0 {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("the log has no last %d events", last), nil)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	from := 0
	if last > 0 {
		from = max(0, len(m.log)-last)
	}
	return append([]api.Event{}, m.log[from:]...), nil
}
