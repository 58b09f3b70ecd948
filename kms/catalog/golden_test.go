package catalog_test

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// golden reads testdata/records.txt: a kind, an ID in quotes and a value on each line. What
// was written once is read for ever; lines are added and never changed.
func golden(t testing.TB) (all []catalog.Record) {
	t.Helper()
	f, err := os.Open("testdata/records.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), "\t", 3)
		id, err := strconv.Unquote(fields[1])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, catalog.Record{Kind: catalog.Kind(fields[0]), ID: id, Rev: 7, Value: []byte(fields[2])})
	}
	if lines.Err() != nil {
		t.Fatal(lines.Err())
	}
	return all
}

func TestGoldenRecords(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 890e6, time.UTC)
	key := catalog.Key{
		Rev: 7, Name: "shop", Group: "default", Type: "aes-256", MinCopies: 2, RotationPeriod: time.Hour, Created: at,
		Versions: []catalog.Version{
			{Number: 1, Identity: "01", State: catalog.DestroyScheduled, Created: at, DestroyAt: &at, Before: catalog.Disabled, CheckValue: []byte{1}, Copies: []string{"hsm-a"}},
		},
	}
	withDatabases := key
	withDatabases.Databases = []string{"orders", "sales"}
	version := catalog.DataVersion{Number: 2, Created: at, Object: true, Deleted: &at, Master: 3, Envelope: []byte("envelope")}
	job := catalog.Job{
		Rev: 7, ID: "job-1", Database: "orders", Key: "shop", Version: 3, State: catalog.JobFailed, Started: at, Ended: &at, Retire: catalog.RetireDestroy,
		Old: true, After: []byte("a/\xff"), AfterNumber: 4, Total: 9, Done: 5, Skipped: 2, Failed: 1,
		Failures: []catalog.Failure{{Key: []byte("\x00"), Version: 1, Error: "why"}}, Reason: "a reason",
	}
	want := []any{
		key,
		withDatabases,
		catalog.Tombstone{Rev: 7, Identity: "02", Group: "default", Key: "shop", Version: 1, Destroyed: at, Pending: []string{"hsm-a"}},
		catalog.Database{Rev: 7, Name: "orders", Key: "shop", Created: at, Job: "job-1"},
		catalog.DataKey{Rev: 7, Database: "orders", ID: "a/0000000001", First: at, DataVersion: version},
		catalog.DataKey{Rev: 7, Database: "orders", ID: "\x00/\xff", First: at, DataVersion: catalog.DataVersion{Number: 1, Created: at, Master: 1, Envelope: []byte{0xff}}},
		catalog.OldVersion{Rev: 7, Database: "orders", ID: "a/0000000001", DataVersion: version},
		job,
		catalog.Usage{Rev: 7, Identity: "01", Wraps: 1 << 32},
	}
	records := golden(t)
	if len(records) != len(want) {
		t.Fatalf("testdata has %d records, want %d", len(records), len(want))
	}
	for i, r := range records {
		got, err := catalog.Decode(r)
		if err != nil || !reflect.DeepEqual(got, want[i]) {
			t.Errorf("%s %q is %+v, %v, want %+v", r.Kind, r.ID, got, err, want[i])
		}
		written, err := catalog.Encode(want[i])
		if i == 0 { // of schema 1, which is not written any more
			r.Value = bytes.Replace(r.Value, []byte(`"schema":1`), []byte(`"schema":2`), 1)
		}
		if err != nil || written.ID != r.ID || written.Kind != r.Kind || !bytes.Equal(written.Value, r.Value) {
			t.Errorf("%s %q is written as %q: %s, %v", r.Kind, r.ID, written.ID, written.Value, err)
		}
	}
}

// FuzzDecode gives every kind of record foreign bytes: no panic, and what is read
// is written back as the same thing.
func FuzzDecode(f *testing.F) {
	for _, r := range golden(f) {
		f.Add(r.ID, r.Value)
	}
	f.Add("k/1", []byte(`{"schema":1,"identity":"x","op":"create","group":"g","key":"k","version":1,"started":"2026-01-02T03:04:05Z"}`))
	f.Add("g/a", []byte(`{"schema":1,"group":"g","name":"a","seen":"ab","token":{"serial":"1","label":"l","model":"m","domain":"AAEC","place":"cd"},"spec":{"name":"a"},"removed":true,"standby":false,"drained":true}`))
	f.Fuzz(func(t *testing.T, id string, value []byte) {
		if len(id) == 0 || len(id) > catalog.MaxID || len(value) > catalog.MaxValue {
			return
		}
		for _, kind := range catalog.Kinds() {
			read, err := catalog.Decode(catalog.Record{Kind: kind, ID: id, Value: value})
			if err != nil {
				continue
			}
			written, err := catalog.Encode(read)
			if err != nil || written.ID != id {
				t.Fatalf("%s %q is read as %+v, but not written: %q, %v", kind, id, read, written.ID, err)
			}
			again, err := catalog.Decode(written)
			if err != nil || !reflect.DeepEqual(normal(again), normal(read)) {
				t.Fatalf("%s %q is read as %+v, and then as %+v, %v", kind, id, read, again, err)
			}
		}
		ctx := context.Background()
		s := catalogtest.NewMemory()
		must(s.Apply(ctx, catalog.Record{Kind: catalog.KindIntent, ID: id, Value: value}, catalog.Record{Kind: catalog.KindMember, ID: id, Value: value}))
		c := catalog.New(s)
		for range c.Intents(ctx) {
		}
		for range c.Members(ctx, "g") {
		}
	})
}

// normal returns what two records of the same meaning have in common: in JSON a time has
// an offset, not a place.
func normal(v any) string {
	r, err := catalog.Encode(v)
	if err != nil {
		return err.Error()
	}
	return string(r.Value)
}
