package backup

import (
	"bytes"
	"fmt"
	"strings"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/pluginproto"
)

// ledger checks what goes into a backup or comes out of one, as it goes by: its order,
// and that the parts belong together. It remembers master keys and databases, but no
// data key.
type ledger struct {
	groups map[string]bool
	stage  stage
	last   string // ID of the last record, which the next one's must be greater than
	counts api.BackupReport

	jobs      map[string]string   // :: job → database
	databases map[string]string   // :: database → name of its master key
	database  string              // the last one, whose data keys come now
	dataKey   catalog.DataKey     // the last one, whose older versions come now
	older     int                 // of them, how many have come
	uses      map[use]bool        // :: what the envelopes say of themselves
	served    map[string]bool     // :: database → its master key has come and names it
	versions  map[string]*version // :: identity → the version
	missing   int                 // living versions whose blobs are still to come
}

// use says that a data key of a database is wrapped by a version of its master key.
type use struct {
	database, identity string
	master             int
}

type version struct {
	key    string
	number int
	typ    string
	check  []byte
	living bool
	blob   bool // has come
}

// stage is how far a backup is. Stages come in their order.
type stage int

const (
	stageJobs stage = iota
	stageDatabases
	stageKeys
	stageTombstones
	stageUsage
	stageBlobs
)

func newLedger(h Header) (*ledger, error) {
	l := &ledger{
		groups: map[string]bool{}, jobs: map[string]string{}, databases: map[string]string{},
		uses: map[use]bool{}, served: map[string]bool{}, versions: map[string]*version{},
	}
	if len(h.Groups) > maxGroups || len(h.Kmsd) > maxText {
		return nil, fmt.Errorf("%d groups, a version of %d bytes", len(h.Groups), len(h.Kmsd))
	}
	for _, g := range h.Groups {
		if g.Name == "" || len(g.Name) > maxText || len(g.DomainCheck) == 0 || len(g.DomainCheck) > maxCheck || l.groups[g.Name] {
			return nil, fmt.Errorf("group %q, with a check value of %d bytes", g.Name, len(g.DomainCheck))
		}
		l.groups[g.Name] = true
	}
	return l, nil
}

// put takes the next thing.
func (l *ledger) put(v any) error {
	if o, ok := v.(catalog.OldVersion); ok {
		return l.putOld(o)
	}
	if err := l.wholeDataKey(); err != nil {
		return err
	}
	switch v := v.(type) {
	case catalog.Job:
		return l.putJob(v)
	case catalog.Database:
		return l.putDatabase(v)
	case catalog.DataKey:
		return l.putDataKey(v)
	case catalog.Key:
		return l.putKey(v)
	case catalog.Tombstone:
		return l.putTombstone(v)
	case catalog.Usage:
		return l.next(stageUsage, v.Identity)
	case Blob:
		return l.putBlob(v)
	default:
		return fmt.Errorf("a %T has no place in a backup", v)
	}
}

// next moves on to a record of a stage.
func (l *ledger) next(s stage, id string) error {
	if s < l.stage || s == l.stage && id <= l.last {
		return fmt.Errorf("%q is out of order", id)
	}
	if l.stage < stageTombstones && s >= stageTombstones {
		if err := l.keysAreThere(); err != nil {
			return err
		}
	}
	l.stage, l.last = s, id
	return nil
}

func (l *ledger) putJob(j catalog.Job) error {
	if j.State == catalog.JobRunning {
		return fmt.Errorf("job %q has not ended", j.ID)
	}
	l.jobs[j.ID] = j.Database
	return l.next(stageJobs, j.ID)
}

func (l *ledger) putDatabase(db catalog.Database) error {
	if err := l.next(stageDatabases, db.Name); err != nil {
		return err
	}
	if db.Job != "" && l.jobs[db.Job] != db.Name {
		return fmt.Errorf("job %q of database %q is missing", db.Job, db.Name)
	}
	l.databases[db.Name] = db.Key
	l.database, l.dataKey = db.Name, catalog.DataKey{}
	l.counts.Databases++
	return nil
}

func (l *ledger) putDataKey(dk catalog.DataKey) error {
	if l.stage != stageDatabases || dk.Database != l.database || dk.ID <= l.dataKey.ID {
		return fmt.Errorf("data key %q of database %q is out of order", dk.ID, dk.Database)
	}
	l.dataKey, l.older = dk, 0
	return l.noteVersion(dk.Database, dk.DataVersion)
}

func (l *ledger) putOld(o catalog.OldVersion) error {
	if l.stage != stageDatabases || o.Database != l.database || o.ID != l.dataKey.ID ||
		o.Number != l.older+1 || o.Number >= l.dataKey.Number {
		return fmt.Errorf("version %d of data key %q of database %q is out of order", o.Number, o.ID, o.Database)
	}
	l.older = o.Number
	return l.noteVersion(o.Database, o.DataVersion)
}

// wholeDataKey is asked when the next data key comes, or what is none.
func (l *ledger) wholeDataKey() error {
	if missing := l.older + 1; missing < l.dataKey.Number {
		return fmt.Errorf("version %d of data key %q of database %q is missing", missing, l.dataKey.ID, l.dataKey.Database)
	}
	return nil
}

func (l *ledger) noteVersion(database string, v catalog.DataVersion) error {
	e, err := envelope.Parse(v.Envelope)
	if err != nil {
		return fmt.Errorf("version %d of a data key of database %q: %w", v.Number, database, err)
	}
	l.uses[use{database, pluginproto.KeyID(e.Identity).String(), v.Master}] = true
	l.counts.NamedKeys++
	return nil
}

func (l *ledger) putKey(k catalog.Key) error {
	if err := l.next(stageKeys, k.Name); err != nil {
		return err
	}
	l.counts.Keys++
	for _, db := range k.Databases {
		if l.databases[db] != k.Name {
			return fmt.Errorf("key %q says that database %q uses it, which says otherwise", k.Name, db)
		}
		l.served[db] = true
	}
	for _, v := range k.Versions {
		if _, err := pluginproto.ParseKeyID(v.Identity); err != nil {
			return fmt.Errorf("version %d of key %q: %w", v.Number, k.Name, err)
		}
		if l.versions[v.Identity] != nil {
			return fmt.Errorf("two versions have the identity %s", v.Identity)
		}
		living := v.State != catalog.Destroyed
		l.versions[v.Identity] = &version{key: k.Name, number: v.Number, typ: k.Type, check: v.CheckValue, living: living}
		if !living {
			continue
		}
		if !l.groups[k.Group] {
			return fmt.Errorf("key %q is of group %q, whose domain the header does not have", k.Name, k.Group)
		}
		l.missing++
		l.counts.Versions++
	}
	return nil
}

// keysAreThere is asked when all master keys have come.
func (l *ledger) keysAreThere() error {
	for db, key := range l.databases {
		if !l.served[db] {
			return fmt.Errorf("key %q of database %q is missing, or does not name it", key, db)
		}
	}
	for u := range l.uses {
		v := l.versions[u.identity]
		switch {
		case v == nil:
			return fmt.Errorf("a data key of database %q is wrapped by %s, which is no version of any key here", u.database, u.identity)
		case v.key != l.databases[u.database] || v.number != u.master:
			return fmt.Errorf("a data key of database %q is wrapped by version %d of key %q, and says something else", u.database, v.number, v.key)
		case !v.living:
			return fmt.Errorf("version %d of key %q wraps data keys of database %q: %w", v.number, v.key, u.database, ErrMoved)
		}
	}
	return nil
}

func (l *ledger) putTombstone(t catalog.Tombstone) error {
	if err := l.next(stageTombstones, t.Identity); err != nil {
		return err
	}
	if v := l.versions[t.Identity]; v != nil && v.living {
		return fmt.Errorf("version %d of key %q: %w", v.number, v.key, ErrMoved)
	}
	return nil
}

// putBlob takes blobs in any order: members give them away side by side.
func (l *ledger) putBlob(b Blob) error {
	if l.stage != stageBlobs {
		if err := l.next(stageBlobs, ""); err != nil {
			return err
		}
	}
	v := l.versions[b.Identity]
	switch {
	case v == nil || !v.living || v.blob:
		return fmt.Errorf("the blob of %s belongs to no version, or comes twice", clip(b.Identity))
	case b.Type != v.typ || !bytes.Equal(b.CheckValue, v.check):
		return fmt.Errorf("the blob of version %d of key %q is of another key, by its type or check value", v.number, v.key)
	case len(b.Transfer) != transferSize || len(b.Blob) == 0 || len(b.Blob) > maxBlob:
		return fmt.Errorf("the blob of version %d of key %q has %d bytes, its transfer number %d", v.number, v.key, len(b.Blob), len(b.Transfer))
	}
	v.blob = true
	l.missing--
	return nil
}

// finish is asked at the end.
func (l *ledger) finish() (api.BackupReport, error) {
	err := l.wholeDataKey()
	if err == nil {
		err = l.next(stageBlobs+1, "")
	}
	if err != nil {
		return api.BackupReport{}, err
	}
	if l.missing > 0 {
		return api.BackupReport{}, fmt.Errorf("the blobs of %d versions are missing", l.missing)
	}
	return l.counts, nil
}

// clip bounds foreign text in an error.
func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "?") }
