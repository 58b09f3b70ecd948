package backup_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"kmsd/kms/api"
	"kmsd/kms/backup"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/pluginproto"
)

var at = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func identity(n byte) string { return pluginproto.KeyID{n}.String() }

func check(n byte) []byte { return []byte{n, n, n, n} }

func wrapped(n byte) []byte {
	e := envelope.Envelope{Algorithm: envelope.AES256GCM, Identity: pluginproto.KeyID{n}, IV: make([]byte, envelope.IVSize), Ciphertext: make([]byte, 48)}
	return e.Encode()
}

func dataVersion(number, master int, id byte) catalog.DataVersion {
	return catalog.DataVersion{Number: number, Created: at, Master: master, Envelope: wrapped(id)}
}

func blob(n byte) backup.Blob {
	return backup.Blob{Identity: identity(n), Type: "aes-256", CheckValue: check(n), Transfer: make([]byte, 16), Blob: []byte("wrapped")}
}

func header() backup.Header {
	return backup.Header{Created: at, Kmsd: "v1", Groups: []backup.Group{{Name: "g", DomainCheck: []byte{9}}}}
}

// sample is what is in a small backup: two databases, one of them with a data key of three
// versions, and two master keys, one of them with a version that is destroyed.
func sample() []any {
	return []any{
		catalog.Job{ID: "job-1", Database: "shop", Key: "shop", Version: 2, State: catalog.JobDone, Started: at, Ended: &at},
		catalog.Database{Name: "empty", Key: "other", Created: at},
		catalog.Database{Name: "shop", Key: "shop", Created: at, Job: "job-1"},
		catalog.DataKey{Database: "shop", ID: "1", First: at, DataVersion: dataVersion(3, 2, 2)},
		catalog.OldVersion{Database: "shop", ID: "1", DataVersion: dataVersion(1, 1, 1)},
		catalog.OldVersion{Database: "shop", ID: "1", DataVersion: dataVersion(2, 2, 2)},
		catalog.DataKey{Database: "shop", ID: "2/\xff", First: at, DataVersion: dataVersion(1, 1, 1)},
		catalog.Key{Name: "other", Group: "g", Type: "aes-256", MinCopies: 1, Created: at, Databases: []string{"empty"}, Versions: []catalog.Version{
			{Number: 1, Identity: identity(3), State: catalog.Destroyed, Created: at, CheckValue: check(3)},
			{Number: 2, Identity: identity(4), State: catalog.Disabled, Created: at, CheckValue: check(4), Copies: []string{"hsm-a"}},
		}},
		catalog.Key{Name: "shop", Group: "g", Type: "aes-256", MinCopies: 1, Created: at, Databases: []string{"shop"}, Versions: []catalog.Version{
			{Number: 1, Identity: identity(1), State: catalog.Enabled, Created: at, CheckValue: check(1), Copies: []string{"hsm-a"}},
			{Number: 2, Identity: identity(2), State: catalog.Enabled, Created: at, CheckValue: check(2), Copies: []string{"hsm-a"}},
		}},
		catalog.Tombstone{Identity: identity(3), Group: "g", Key: "other", Version: 1, Destroyed: at},
		catalog.Usage{Identity: identity(2), Wraps: 1 << 20},
		blob(4), blob(1), blob(2),
	}
}

func newIdentity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// write makes a backup, as far as it gets.
func write(t testing.TB, to *age.X25519Identity, things []any) ([]byte, api.BackupReport, error) {
	t.Helper()
	var file bytes.Buffer
	w, err := backup.NewWriter(&file, []age.Recipient{to.Recipient()}, header())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range things {
		if err := w.Put(v); err != nil {
			return nil, api.BackupReport{}, err
		}
	}
	report, err := w.Close()
	return file.Bytes(), report, err
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	id := newIdentity(t)
	want := sample()
	file, report, err := write(t, id, want)
	if err != nil {
		t.Fatal(err)
	}
	if report != (api.BackupReport{Keys: 2, Versions: 3, Databases: 2, NamedKeys: 4}) {
		t.Errorf("report %+v", report)
	}
	r, err := backup.NewReader(bytes.NewReader(file), newIdentity(t), id)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", r.Header()), fmt.Sprintf("%+v", header()); got != want {
		t.Errorf("header %s, want %s", got, want)
	}
	for i, v := range want {
		got, err := r.Next()
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", v) {
			t.Fatalf("%d: %+v, %v, want %+v", i, got, err, v)
		}
	}
	for range 2 {
		if v, err := r.Next(); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v, %v", v, err)
		}
	}
	contents, err := backup.Verify(bytes.NewReader(file), id)
	if err != nil || contents.BackupReport != report || contents.Kmsd != "v1" {
		t.Errorf("verified: %+v, %v", contents, err)
	}
}

func TestAnEmptyCatalogIsABackup(t *testing.T) {
	id := newIdentity(t)
	file, _, err := write(t, id, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Verify(bytes.NewReader(file), id); err != nil {
		t.Error(err)
	}
}

func TestAnotherIdentityOpensNothing(t *testing.T) {
	file, _, err := write(t, newIdentity(t), sample())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Verify(bytes.NewReader(file), newIdentity(t)); !errors.Is(err, backup.ErrIdentity) {
		t.Errorf("error %v, want ErrIdentity", err)
	}
}

func TestNoAlteredFileIsABackup(t *testing.T) {
	id := newIdentity(t)
	small := catalog.Key{Name: "other", Group: "g", Type: "aes-256", MinCopies: 1, Created: at, Versions: []catalog.Version{
		{Number: 1, Identity: identity(4), State: catalog.Enabled, Created: at, CheckValue: check(4)},
	}}
	file, _, err := write(t, id, []any{small, blob(4)})
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, altered []byte) {
		t.Helper()
		_, err := backup.Verify(bytes.NewReader(altered), id)
		if !errors.Is(err, backup.ErrDamaged) && !errors.Is(err, backup.ErrIdentity) {
			t.Errorf("%s: error %v", what, err)
		}
	}
	// age seals what comes after its header in one piece, where each byte is like another.
	header := bytes.Index(file, []byte("\n---")) + 100
	for i := range file {
		if i > header && i%7 > 0 && i < len(file)-20 {
			continue
		}
		altered := bytes.Clone(file)
		altered[i] ^= 1
		refused(fmt.Sprintf("byte %d flipped", i), altered)
		refused(fmt.Sprintf("cut after %d bytes", i), file[:i])
	}
	refused("with more behind it", append(bytes.Clone(file), '\n'))
}

// The writer refuses what the reader would refuse, so both are shown by it.
func TestWhatDoesNotBelongTogetherIsNoBackup(t *testing.T) {
	with := func(change func([]any) []any) []any { return change(sample()) }
	without := func(i int) []any {
		return with(func(all []any) []any { return append(all[:i:i], all[i+1:]...) })
	}
	swapped := func(i, j int) []any {
		return with(func(all []any) []any { all[i], all[j] = all[j], all[i]; return all })
	}
	key := func(change func(*catalog.Key)) []any {
		return with(func(all []any) []any {
			k := all[8].(catalog.Key)
			change(&k)
			all[8] = k
			return all
		})
	}
	replaced := func(i int, v any) []any {
		return with(func(all []any) []any { all[i] = v; return all })
	}
	other := blob(2)
	other.CheckValue = check(7)
	for _, c := range []struct {
		name   string
		things []any
		says   string
		moved  bool
	}{
		{"a database's job is missing", without(0), `job "job-1"`, false},
		{"a job that runs", replaced(0, catalog.Job{ID: "job-1", Database: "shop", Key: "shop", Version: 2, State: catalog.JobRunning}), "has not ended", false},
		{"a database is missing", without(2), "out of order", false},
		{"a data key is missing, and its versions are there", without(3), "out of order", false},
		{"an older version is missing", without(4), "version 2 of data key", false},
		{"the last older version is missing", without(5), "version 2 of data key", false},
		{"a data key comes twice", replaced(6, sample()[3]), "out of order", false},
		{"an envelope of a version that is nowhere", replaced(6, catalog.DataKey{Database: "shop", ID: "2", First: at, DataVersion: dataVersion(1, 1, 8)}), "no version of any key", false},
		{"an envelope of another key", replaced(6, catalog.DataKey{Database: "shop", ID: "2", First: at, DataVersion: dataVersion(1, 2, 4)}), "says something else", false},
		{"an envelope that says another version", replaced(6, catalog.DataKey{Database: "shop", ID: "2", First: at, DataVersion: dataVersion(1, 2, 1)}), "says something else", false},
		{"an envelope that is none", replaced(6, catalog.DataKey{Database: "shop", ID: "2", First: at, DataVersion: catalog.DataVersion{Number: 1, Master: 1, Envelope: []byte("KMS")}}), "envelope", false},
		{"a version in use was destroyed", key(func(k *catalog.Key) { k.Versions[0].State = catalog.Destroyed }), "make it again", true},
		{"a master key is missing", without(8), `key "shop" of database "shop" is missing`, false},
		{"a master key that does not name its database", key(func(k *catalog.Key) { k.Databases = nil }), "does not name it", false},
		{"a master key that names another database", key(func(k *catalog.Key) { k.Databases = append(k.Databases, "empty") }), "says otherwise", false},
		{"a master key of another group", key(func(k *catalog.Key) { k.Group = "elsewhere" }), `group "elsewhere"`, false},
		{"two versions of one identity", key(func(k *catalog.Key) { k.Versions[1].Identity = identity(4) }), "two versions", false},
		{"an identity that is none", key(func(k *catalog.Key) { k.Versions[1].Identity = "x" }), "32 hexadecimal", false},
		{"master keys out of order", swapped(7, 8), "out of order", false},
		{"a tombstone of a living version", replaced(9, catalog.Tombstone{Identity: identity(1), Group: "g", Key: "shop", Version: 1, Destroyed: at}), "make it again", true},
		{"a tombstone before the keys", swapped(8, 9), "is missing", false},
		{"a blob is missing", without(13), "blobs of 1 versions", false},
		{"a blob that comes twice", replaced(13, blob(1)), "comes twice", false},
		{"a blob of a destroyed version", replaced(13, blob(3)), "belongs to no version", false},
		{"a blob of another key", replaced(13, other), "of another key", false},
		{"a blob before the end of the records", swapped(10, 11), "out of order", false},
		{"a thing from elsewhere", replaced(13, "text"), "no place", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := write(t, newIdentity(t), c.things)
			if err == nil || !strings.Contains(err.Error(), c.says) || errors.Is(err, backup.ErrMoved) != c.moved {
				t.Errorf("error %v, want %q", err, c.says)
			}
		})
	}
}

func TestRecipients(t *testing.T) {
	good := newIdentity(t)
	if r, err := backup.ParseRecipients([]string{good.Recipient().String()}); err != nil || len(r) != 1 {
		t.Errorf("%v, %v", r, err)
	}
	for _, c := range []struct {
		name  string
		texts []string
		says  string
	}{
		{"none", nil, "needs a recipient"},
		{"one that is none", []string{good.Recipient().String(), "age1nonsense"}, `recipient "age1nonsense"`},
		{"a secret", []string{good.String()}, "public half"},
		{"a secret in small letters", []string{strings.ToLower(good.String())}, "public half"},
	} {
		_, err := backup.ParseRecipients(c.texts)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.says)
		}
		if err != nil && strings.Contains(strings.ToUpper(err.Error()), good.String()[20:]) {
			t.Errorf("%s: the error shows the secret", c.name)
		}
	}
}

func TestAWriterThatFailedWritesNothingMore(t *testing.T) {
	w, err := backup.NewWriter(io.Discard, []age.Recipient{newIdentity(t).Recipient()}, header())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Put("text"); err == nil {
		t.Fatal("it takes text")
	}
	if err := w.Put(sample()[0]); err == nil {
		t.Error("it goes on after a failure")
	}
	if _, err := w.Close(); err == nil {
		t.Error("it ends well after a failure")
	}
}
