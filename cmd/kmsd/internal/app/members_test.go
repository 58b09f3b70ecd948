package app_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// members is a Memory whose group looks as one does that has lost a member.
type members struct {
	apitest.Memory
	back  atomic.Bool  // hsm-c has been recovered
	asked atomic.Int32 // how often somebody has looked at a job
}

var since = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func (m *members) Status() api.Status {
	g := api.Group{
		Name: "default", State: api.GroupDegraded, Primary: "hsm-a", MinCopies: 2, Keys: 7, BelowMinCopies: 3, WithoutCopy: 1,
		Members: []api.Member{
			{Name: "hsm-a", Driver: "softhsm", Role: api.RoleActive, State: api.MemberActive, CKR: "CKR_OK", Since: since, InFlight: 3, Commands: 1234,
				LatencyP50: 80, LatencyP99: 310, Keys: 7, DriverPID: 4711, Token: api.Token{Label: "hsm-a", Serial: "0a1b", Manufacturer: "SoftHSM project", Model: "SoftHSM v2", Firmware: "2.6",
					Facts: []api.Fact{{Name: "storage", Value: "40 % used"}, {Name: "clock", Value: "3 h behind", Warning: true}}}},
			{Name: "hsm-b", Driver: "softhsm", Role: api.RoleStandby, State: api.MemberStandby, CKR: "CKR_OK", Since: since.Add(time.Second), Keys: 7},
			{Name: "hsm-c", Driver: "luna", Role: api.RoleActive, State: api.MemberDown, CKR: "CKR_DEVICE_ERROR", Since: since.Add(time.Minute), Reason: "the driver\x1b[2J ended \u202ebackwards",
				Errors: 2, Keys: 5, Missing: 2, RecoveryAttempts: 4},
		},
	}
	if m.back.Load() {
		c := &g.Members[2]
		g.State, g.BelowMinCopies, g.WithoutCopy = api.GroupNormal, 0, 0
		c.State, c.CKR, c.Reason, c.Keys, c.Missing = api.MemberActive, "CKR_OK", "", 7, 0
	}
	return api.Status{Version: "v0", Groups: []api.Group{g}}
}

func (m *members) Recover(_ context.Context, _, member string) error {
	if member == "hsm-b" {
		e := api.NewError(api.CodeMemberFailed, "recovering member hsm-b: the driver says \x1b[2Jnothing", nil)
		e.Member, e.CKR = "hsm-b", "CKR_DEVICE_REMOVED"
		return e
	}
	m.back.Store(member == "hsm-c")
	return nil
}

func (m *members) Log(_ context.Context, last int) ([]api.Event, error) {
	events := []api.Event{
		{Time: since, Type: api.EventMember, Group: "default", Member: "hsm-c", From: "active", To: "down", CKR: "CKR_DEVICE_ERROR", Cause: "the driver\x1b[2J ended"},
		{Time: since, Type: api.EventGroup, Group: "default", From: "normal", To: "degraded"},
		{Time: since.Add(time.Minute), Type: api.EventRecovery, Group: "default", Member: "hsm-c", CKR: "CKR_TOKEN_NOT_PRESENT", Cause: "recovery has used up its 4 attempts", Alarm: true},
		{Time: since.Add(time.Hour), Type: api.EventSync, Group: "default", Member: "hsm-b", To: "done", Progress: &api.Progress{Done: 10000, Total: 10000, Rate: 850.4}, Cause: "10000 of 10000 done"},
	}
	if last > 0 {
		events = events[max(0, len(events)-last):]
	}
	return events, nil
}

func (m *members) Sync(_ context.Context, group string, opts api.SyncOptions) (api.SyncReport, error) {
	object := api.Object{Identity: "0a0b", Label: "old", Type: "aes-256", CheckValue: "c0ffee"}
	r := api.SyncReport{Group: group, Members: []api.MemberSync{
		{Member: "hsm-a", Held: 7, Cloned: 2, Changed: 1, Destroyed: 1},
		{Member: "hsm-b", Held: 5, Missing: 1, Quarantined: []string{"shop version 2"}, Foreign: []api.Object{object}, Error: "listing its objects: CKR_DEVICE_ERROR"},
	}}
	if opts.Adopt {
		r.Adopted = []string{"old"}
		r.Members[1].Error, r.Members[1].Foreign[0].Refused = "", "the key cannot be cloned"
	}
	return r, nil
}

func (m *members) Check(_ context.Context, group string) (api.GroupCheck, error) {
	return api.GroupCheck{Group: group, Findings: []api.Finding{
		{Member: "hsm-a", Message: "its firmware is 2.6, that of the others 2.7"},
		{Member: "hsm-c", Fault: true, Message: "its domain is another one"},
	}}, nil
}

func (m *members) Reinitialize(context.Context, string) (api.Group, error) {
	g := m.Status().Groups[0]
	g.State, g.Primary, g.Members = api.GroupLost, "", g.Members[2:]
	return g, nil
}

func (m *members) AddMember(_ context.Context, _ string, spec api.MemberSpec) (api.Member, error) {
	e := api.NewError(api.CodeMemberFailed, fmt.Sprintf("adding member %s: its domain is another one", spec.Name), nil)
	e.Member = spec.Name
	return api.Member{}, e
}

func (m *members) CreateMasterKey(ctx context.Context, name string, opts api.KeyOptions) (api.Key, error) {
	if name == "lonely" && !opts.AllowDegraded {
		e := api.NewError(api.CodeInsufficientCopies, "key lonely needs 3 copies, but only hsm-a and hsm-b could take one", nil)
		e.Hint = "wait for the other members to recover, or allow the key to be made degraded"
		return api.Key{}, e
	}
	return m.Memory.CreateMasterKey(ctx, name, opts)
}

// Rekey begins a job that takes a while for the database slow, and has one at once for
// the others. That of the database broken fails.
func (m *members) Rekey(ctx context.Context, name string, opts api.RekeyOptions) (api.Job, error) {
	job := api.Job{ID: "job-of-" + name, Type: api.JobRekey, Database: name, Key: name, Version: 2, State: api.JobRunning, Started: since, Retire: opts.Retire}
	switch name {
	case "slow":
		m.asked.Store(0)
		job.Progress = api.Progress{Total: 1200}
	case "broken":
		job.State, job.Reason, job.Ended = api.JobFailed, "version 2 of key broken was disabled", &since
	default:
		return m.Memory.Rekey(ctx, name, opts)
	}
	return job, nil
}

func (m *members) Job(ctx context.Context, id string) (api.Job, error) {
	if id != "job-of-slow" {
		return m.Memory.Job(ctx, id)
	}
	job := api.Job{ID: id, Type: api.JobRekey, Database: "slow", Key: "slow", Version: 2, State: api.JobRunning, Started: since}
	job.Progress = api.Progress{Done: 600, Total: 1200, Rate: 300, Left: api.Duration(2 * time.Second)}
	switch m.asked.Add(1) {
	case 1:
		job.State, job.Reason = api.JobWaiting, "the group is lost"
	case 2:
		return api.Job{}, api.NewError(api.CodeUnavailable, "kmsd is being stopped", nil)
	case 3, 4, 5, 6: // the client has tried again by itself
	default:
		job.State, job.Progress, job.Ended = api.JobDone, api.Progress{Done: 1200, Total: 1200}, &since
		job.Failed = 1
		job.Failures = []api.JobFailure{{ID: "\ufffd", Raw: []byte{0xff}, Version: 3, Error: "the envelope is altered"}}
	}
	return job, nil
}
