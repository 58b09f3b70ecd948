package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"kmsd/kms/api"
	"kmsd/kms/backup"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

var _ api.Backups = (*KMS)(nil)

const (
	// exportsAtOnce is how many keys a member is asked for at a time. A token does one
	// thing at a time, so more only fill the wait between them.
	exportsAtOnce = 4
	// dumpPage is how many records are read at a time: with the largest of envelopes
	// some 16 MiB.
	dumpPage = 256
)

// Backup writes everything that is needed to begin anew with other tokens: the
// catalog, and every living version of a master key as its HSM gives it away under the
// domain key. Members give keys away side by side, and go on serving meanwhile.
//
// Keys are made and used all the time meanwhile. Whatever was acknowledged before Backup
// was called is in it; of what comes later some may be. Data keys are read first, and the
// master keys that wrap them after that, so that what is in it can be unwrapped. Only the
// destruction of a version in between spoils a backup: ErrUnavailable, make it again.
func (k *KMS) Backup(ctx context.Context, w io.Writer, recipients []string) (api.BackupReport, error) {
	to, err := backup.ParseRecipients(recipients)
	if err != nil {
		return api.BackupReport{}, badRequest("making a backup: %v", err)
	}
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return api.BackupReport{}, translate("making a backup", errClosed)
	}
	k.tasks.Add(1)
	k.mu.Unlock()
	defer k.tasks.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(k.life, func() { cancel(errClosed) })()

	report, err := k.backup(ctx, w, to)
	switch {
	case err == nil:
		k.log.Info("made a backup", "keys", report.Keys, "versions", report.Versions, "databases", report.Databases, "named_keys", report.NamedKeys)
		return report, nil
	case k.life.Err() != nil:
		err = errClosed
	case errors.Is(err, backup.ErrMoved):
		return api.BackupReport{}, api.NewError(api.CodeUnavailable, fmt.Sprintf("making a backup: %v", err), err)
	}
	return api.BackupReport{}, translate("making a backup", err)
}

func (k *KMS) backup(ctx context.Context, w io.Writer, to []age.Recipient) (api.BackupReport, error) {
	h, err := k.backupHeader()
	if err != nil {
		return api.BackupReport{}, err
	}
	out, err := backup.NewWriter(w, to, h)
	if err != nil {
		return api.BackupReport{}, err
	}
	d := &dump{kms: k, ctx: ctx, out: out, groups: map[string]bool{}, jobs: map[string]bool{}, databases: map[string]bool{}}
	for _, g := range h.Groups {
		d.groups[g.Name] = true
	}
	for _, step := range []func() error{d.putJobs, d.putDatabases, d.putKeys, d.putTombstones, d.putUsage, d.putBlobs} {
		if err := step(); err != nil {
			return api.BackupReport{}, err
		}
	}
	return out.Close()
}

// backupHeader names the groups that have keys, and the domain of each.
func (k *KMS) backupHeader() (backup.Header, error) {
	h := backup.Header{Created: now(), Kmsd: buildVersion(), Groups: []backup.Group{}}
	for _, g := range k.groups {
		if alive, _ := k.ring.count(g.name, ""); alive == 0 {
			continue
		}
		members := g.InStep()
		if len(members) == 0 {
			return backup.Header{}, fmt.Errorf("reading the domain of group %s: %w", g.name, group.ErrLost)
		}
		if !slices.ContainsFunc(members, func(m group.Member) bool { _, ok := givesAlone(m); return ok }) {
			// Said before the first byte, for a backup that breaks off says nothing.
			return backup.Header{}, cannotKeep(fmt.Errorf("the keys of group %s: %w", g.name, tokenToToken(members[0])))
		}
		h.Groups = append(h.Groups, backup.Group{Name: g.name, DomainCheck: members[0].Token().DomainCheck})
	}
	return h, nil
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// dump is a backup that is being made.
type dump struct {
	kms *KMS
	ctx context.Context // of the one call that makes it
	out *backup.Writer

	groups          map[string]bool // that its header names
	jobs, databases map[string]bool // that are in it
	living          []export
}

// export is a version whose key is to be given away.
type export struct {
	g       *keyGroup
	key     string
	version catalog.Version
	id      pluginproto.KeyID
	typ     pluginproto.KeyType
}

// putJobs writes the jobs that have ended. One that runs would go on from a place that
// its data keys, which are read later, have left behind.
func (d *dump) putJobs() error {
	for job, err := range d.kms.catalog.Jobs(d.ctx) {
		if err != nil {
			return err
		}
		if job.State == catalog.JobRunning {
			continue
		}
		d.jobs[job.ID] = true
		if err := d.out.Put(job); err != nil {
			return err
		}
	}
	return nil
}

func (d *dump) putDatabases() error {
	for db, err := range d.kms.catalog.Databases(d.ctx, "", "", 0) {
		if err != nil {
			return err
		}
		if master, err := d.kms.ring.get(db.Key); err == nil && d.isLate(master.rec) {
			continue
		}
		if !d.jobs[db.Job] {
			db.Job = ""
		}
		d.databases[db.Name] = true
		if err := d.out.Put(db); err != nil {
			return err
		}
		if err := d.putDataKeys(db.Name); err != nil {
			return err
		}
	}
	return nil
}

// putDataKeys writes the data keys of a database, a page at a time, each with its older
// versions: those up to the newest that was read, which never go away.
func (d *dump) putDataKeys(database string) error {
	after := ""
	for {
		n := 0
		for dk, err := range d.kms.catalog.DataKeys(d.ctx, database, "", after, dumpPage) {
			if err == nil {
				err = d.out.Put(dk)
			}
			for number := 1; err == nil && number < dk.Number; number++ {
				var old catalog.OldVersion
				if old, err = d.kms.catalog.OldVersion(d.ctx, database, dk.ID, number); err == nil {
					err = d.out.Put(old)
				}
			}
			if err != nil {
				return err
			}
			after, n = dk.ID, n+1
		}
		if n < dumpPage {
			return d.ctx.Err()
		}
	}
}

// putKeys writes the master keys. What has become of them since the databases were read
// is in there: a database that is newer is left out.
func (d *dump) putKeys() error {
	after := ""
	for {
		n := 0
		for rec, err := range d.kms.catalog.Keys(d.ctx, "", after, dumpPage) {
			if err != nil {
				return err
			}
			after, n = rec.Name, n+1
			if d.isLate(rec) {
				continue
			}
			rec.Databases = slices.DeleteFunc(slices.Clone(rec.Databases), func(db string) bool { return !d.databases[db] })
			if err := d.putKey(rec); err != nil {
				return err
			}
		}
		if n < dumpPage {
			return d.ctx.Err()
		}
	}
}

// isLate reports whether a key is of a group that had none when the header was written. It is
// left out, and so are databases that use it: the header must have the domain of every key.
func (d *dump) isLate(rec catalog.Key) bool {
	return d.kms.byName[rec.Group] != nil && !d.groups[rec.Group] && slices.ContainsFunc(rec.Versions, living)
}

func (d *dump) putKey(rec catalog.Key) error {
	for _, v := range rec.Versions {
		if !living(v) {
			continue
		}
		g, err := d.kms.groupOf(rec)
		if err != nil {
			return err
		}
		id, err := pluginproto.ParseKeyID(v.Identity)
		if err != nil {
			return fmt.Errorf("reading key %s version %d: %w", rec.Name, v.Number, err)
		}
		d.living = append(d.living, export{g, rec.Name, v, id, pluginproto.KeyType(rec.Type)})
	}
	return d.out.Put(rec)
}

func (d *dump) putTombstones() error { return putAll(d.out, d.kms.catalog.Tombstones(d.ctx)) }

func (d *dump) putUsage() error { return putAll(d.out, d.kms.catalog.Usages(d.ctx)) }

func putAll[T any](out *backup.Writer, records func(func(T, error) bool)) error {
	for v, err := range records {
		if err == nil {
			err = out.Put(v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// putBlobs has the members give their keys away.
func (d *dump) putBlobs() error {
	members := 0
	for _, g := range d.kms.groups {
		members += len(g.InStep())
	}
	tasks, ctx := errgroup.WithContext(d.ctx)
	tasks.SetLimit(exportsAtOnce * max(1, members))
	var mu sync.Mutex // one blob is written at a time
	for i, v := range d.living {
		if ctx.Err() != nil {
			break
		}
		tasks.Go(func() error {
			blob, err := d.kms.export(ctx, v, i)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			return d.out.Put(blob)
		})
	}
	if err := tasks.Wait(); err != nil {
		return err
	}
	return d.ctx.Err()
}

// errTokenToToken is about keys whose clones have several steps: both tokens take part in
// them, so there is nothing that could be kept.
var errTokenToToken = errors.New("its keys go from token to token only and cannot be put in a file")

// export has a version given away by the member whose turn it is, or by the next that can.
func (k *KMS) export(ctx context.Context, v export, turn int) (backup.Blob, error) {
	members := v.g.InStep()
	var refused error
	for i := range members {
		m := members[(turn+i)%len(members)]
		blob, err := exportFrom(ctx, m, v)
		if err == nil || ctx.Err() != nil {
			return blob, err
		}
		if refused == nil || pluginproto.ClassOf(refused) == pluginproto.ClassMember || errors.Is(err, errTokenToToken) {
			refused = err
		}
	}
	if cur, err := k.ring.get(v.key); err == nil {
		if i := cur.index(v.version.Number); i >= 0 && !living(cur.rec.Versions[i]) {
			return backup.Blob{}, fmt.Errorf("version %d of key %s: %w", v.version.Number, v.key, backup.ErrMoved)
		}
	}
	if refused != nil && pluginproto.ClassOf(refused) != pluginproto.ClassMember {
		return backup.Blob{}, cannotExport(v, refused)
	}
	// All that were there are lost; somebody may just be coming back.
	var blob backup.Blob
	_, err := v.g.OnPrimary(ctx, func(ctx context.Context, m group.Member) (err error) {
		blob, err = exportFrom(ctx, m, v)
		return err
	})
	return blob, err
}

// cannotExport says of which key it was that no member gave it away.
func cannotExport(v export, err error) error {
	err = fmt.Errorf("version %d of key %s: %w", v.version.Number, v.key, err)
	if !errors.Is(err, errTokenToToken) {
		return err
	}
	return cannotKeep(err)
}

// cannotKeep is the refusal of keys that go from token to token only.
func cannotKeep(err error) error {
	e := api.NewError(api.CodeState, fmt.Sprintf("making a backup: %v", err), err)
	e.Hint = "back such HSMs up with the means of their maker; a member that stands by is a copy too"
	if m, ok := errors.AsType[*group.MemberError](err); ok {
		e.Member = m.Member
	}
	return e
}

func exportFrom(ctx context.Context, m group.Member, v export) (backup.Blob, error) {
	protocol, ok := givesAlone(m)
	if !ok {
		return backup.Blob{}, tokenToToken(m)
	}
	req := pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: protocol, Keys: []pluginproto.KeyID{v.id}}
	rand.Read(req.Transfer[:]) // never fails
	said, err := m.CloneStep(ctx, req)
	switch {
	case err != nil:
		return backup.Blob{}, err
	case !said.Done || len(said.Keys) != 1 || said.Keys[0].Object == nil:
		return backup.Blob{}, tokenToToken(m)
	case said.Keys[0].Object.Type != v.typ || !bytes.Equal(said.Keys[0].Object.CheckValue, v.version.CheckValue):
		return backup.Blob{}, &group.MemberError{Member: m.Name(), Err: errors.New("it has another key under this identity")}
	}
	return backup.Blob{
		Identity: v.id.String(), Type: string(v.typ), CheckValue: v.version.CheckValue,
		Protocol: protocol, Transfer: req.Transfer[:], Blob: said.Blob,
	}, nil
}

// givesAlone returns the protocol by which a member gives keys away that can be kept.
func givesAlone(m group.Member) (protocol string, ok bool) {
	return aloneProtocol(m.Token(), func(p pluginproto.CloneProtocol) bool { return p.Gives })
}

// tokenToToken is the refusal of a member whose keys cannot be put in a file.
func tokenToToken(m group.Member) error {
	names := make([]string, 0, len(m.Token().Cloning))
	for _, p := range m.Token().Cloning {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return &group.MemberError{Member: m.Name(), Err: fmt.Errorf("%w: it has no cloning protocol", errTokenToToken)}
	}
	return &group.MemberError{Member: m.Name(), Err: fmt.Errorf("%w: it clones by %s, which needs both tokens", errTokenToToken, strings.Join(names, ", "))}
}

// aloneProtocol returns the name of the first protocol of a token that is fit for something
// and whose blobs can be kept; false when there is none.
func aloneProtocol(t pluginproto.TokenInfo, fit func(pluginproto.CloneProtocol) bool) (string, bool) {
	at := slices.IndexFunc(t.Cloning, func(p pluginproto.CloneProtocol) bool { return p.Alone && fit(p) })
	if at < 0 {
		return "", false
	}
	return t.Cloning[at].Name, true
}
