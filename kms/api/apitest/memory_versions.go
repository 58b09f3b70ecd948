package apitest

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"slices"
	"time"

	"kmsd/kms/api"
)

// setVersion moves the version at index i, and with it what the key says of all of them.
func (k *memoryKey) setVersion(i int, s api.State, at *time.Time) {
	k.Versions[i].State, k.Versions[i].DestroyAt = s, at
	if s == api.StateDestroyed {
		k.secrets[i] = secret{identity: k.secrets[i].identity}
	}
	k.State, k.Primary, k.DestroyAt = api.StateDestroyed, 0, nil
	for _, liveliest := range []api.State{api.StateDestroyScheduled, api.StateDisabled, api.StateEnabled} {
		if slices.ContainsFunc(k.Versions, func(v api.Version) bool { return v.State == liveliest }) {
			k.State = liveliest
		}
	}
	for _, v := range k.Versions {
		if v.State == api.StateEnabled {
			k.Primary = v.Number
		}
		if v.DestroyAt != nil && (k.DestroyAt == nil || v.DestroyAt.Before(*k.DestroyAt)) {
			k.DestroyAt = v.DestroyAt
		}
	}
}

// enabled returns ErrState unless a version, which exists, is enabled.
func (k *memoryKey) enabled(version int) error {
	if s := k.Versions[version-1].State; s != api.StateEnabled {
		return api.NewError(api.CodeState, fmt.Sprintf("version %d of key %s is %s", version, k.Name, s), nil)
	}
	return nil
}

// usedLocked reports whether a data key is kept under a version of a key, 0 for any.
func (m *Memory) usedLocked(k *memoryKey, version int) bool {
	for _, name := range k.Databases {
		for _, dk := range m.databases[name].keys {
			if slices.ContainsFunc(dk.versions, func(v api.NamedKey) bool { return version == 0 || v.Master == version }) {
				return true
			}
		}
	}
	return false
}

// ChangeVersion changes the state of one version of a key.
func (m *Memory) ChangeVersion(ctx context.Context, key string, version int, change api.VersionChange) (api.Key, error) {
	return m.change(ctx, "ChangeVersion", key, string(change.Action), func(k *memoryKey) error {
		return m.changeVersionLocked(k, version, change)
	})
}

func (m *Memory) changeVersionLocked(k *memoryKey, version int, change api.VersionChange) error {
	to, at, from := api.StateEnabled, (*time.Time)(nil), []api.State(nil)
	switch change.Action {
	case api.ActionDisable:
		to, from = api.StateDisabled, []api.State{api.StateEnabled, api.StateDisabled}
	case api.ActionEnable:
		from = []api.State{api.StateEnabled, api.StateDisabled}
	case api.ActionDestroy:
		to, at = doomed(change.Window)
		from = []api.State{api.StateEnabled, api.StateDisabled, api.StateDestroyScheduled}
	case api.ActionRestore:
		from = []api.State{api.StateDestroyScheduled}
	default:
		return api.NewError(api.CodeBadRequest, fmt.Sprintf("nothing is named %q that can be done to a version", change.Action), nil)
	}
	if version < 1 || version > len(k.Versions) {
		return api.NewError(api.CodeNotFound, fmt.Sprintf("key %s has no version %d", k.Name, version), nil)
	}
	if s := k.Versions[version-1].State; !slices.Contains(from, s) {
		return api.NewError(api.CodeState, fmt.Sprintf("version %d of key %s is %s", version, k.Name, s), nil)
	}
	if to != api.StateEnabled && m.usedLocked(k, version) {
		return api.NewError(api.CodeState, fmt.Sprintf("a data key is wrapped under version %d of key %s; rekey its database first", version, k.Name), nil)
	}
	k.setVersion(version-1, to, at)
	return nil
}

// Rekey makes the next version of the master key and has all data keys under it at once.
func (m *Memory) Rekey(ctx context.Context, database string, opts api.RekeyOptions) (job api.Job, err error) {
	if !slices.Contains([]api.Retire{api.RetireNone, api.RetireDisable, api.RetireDestroy}, opts.Retire) {
		return api.Job{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("old versions cannot become %q", opts.Retire), nil)
	}
	err = m.in(ctx, "Rekey", database, func(db *memoryDatabase) error {
		k := m.keys[db.Key]
		if err := k.is(api.StateEnabled); err != nil {
			return err
		}
		if err := k.rotate(m.holdersLocked()); err != nil {
			return err
		}
		began := time.Now().UTC()
		job = api.Job{
			ID: rand.Text(), Type: api.JobRekey, Database: database, Key: k.Name, Version: k.Primary,
			State: api.JobDone, Started: began, Ended: &began, Retire: opts.Retire,
		}
		for _, dk := range db.keys {
			for i := range dk.versions {
				dk.versions[i].Master = k.Primary
				job.Progress.Total++
			}
		}
		job.Progress.Done = job.Progress.Total
		m.retireLocked(k, opts.Retire)
		db.Job = job.ID
		if m.jobs == nil {
			m.jobs = make(map[string]api.Job)
		}
		m.jobs[job.ID] = job
		m.tellLocked(api.Event{Time: time.Now(), Type: api.EventJob, Key: k.Name, Database: database, Job: job.ID, To: string(job.State)})
		return nil
	})
	return job, err
}

// retireLocked does what a rekey is to do to the versions before the newest, but for
// those that another database uses.
func (m *Memory) retireLocked(k *memoryKey, retire api.Retire) {
	for i, v := range k.Versions {
		if v.Number == k.Primary || v.State != api.StateEnabled || m.usedLocked(k, v.Number) {
			continue
		}
		switch retire {
		case api.RetireDisable:
			k.setVersion(i, api.StateDisabled, nil)
		case api.RetireDestroy:
			s, at := doomed(-1)
			k.setVersion(i, s, at)
		}
	}
}

// Job returns a job, which is done.
func (m *Memory) Job(ctx context.Context, id string) (api.Job, error) {
	if err := m.begin(ctx, "Job", ""); err != nil {
		return api.Job{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	job, ok := m.jobs[id]
	if !ok {
		return api.Job{}, api.NewError(api.CodeNotFound, fmt.Sprintf("there is no job %q", id), nil)
	}
	return job, nil
}

// Backup writes a line that nothing can be restored from.
func (m *Memory) Backup(ctx context.Context, w io.Writer, recipients []string) (api.BackupReport, error) {
	if err := m.begin(ctx, "Backup", ""); err != nil {
		return api.BackupReport{}, err
	}
	if len(recipients) == 0 {
		return api.BackupReport{}, api.NewError(api.CodeBadRequest, "a backup needs a recipient", nil)
	}
	m.mu.Lock()
	report := api.BackupReport{Keys: len(m.keys), Versions: m.versionsLocked(), Databases: len(m.databases)}
	for _, db := range m.databases {
		_, versions := db.count()
		report.NamedKeys += versions
	}
	m.mu.Unlock()
	_, err := io.WriteString(w, "the backup of a memory\n")
	if err != nil {
		err = api.NewError(api.CodeInternal, "writing the backup: "+err.Error(), err)
	}
	return report, err
}
