package catalog_test

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"kmsd/kms/catalog"
)

func TestEncodeAndDecodeAgree(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	version := catalog.DataVersion{Number: 2, Created: at, Master: 1, Envelope: []byte{1, 2, 3}}
	for _, v := range []any{
		catalog.Key{Rev: 7, Name: "shop", Group: "g", Type: "aes-256", MinCopies: 2, Created: at, Databases: []string{"db"}, Versions: []catalog.Version{
			{Number: 1, Identity: "01", State: catalog.Enabled, Created: at, CheckValue: []byte{1}, Copies: []string{"hsm-a"}},
		}},
		catalog.Tombstone{Rev: 7, Identity: "02", Group: "g", Key: "shop", Version: 1, Destroyed: at, Pending: []string{"hsm-a"}},
		catalog.Database{Rev: 7, Name: "db", Key: "shop", Created: at, Job: "j"},
		catalog.DataKey{Rev: 7, Database: "db", ID: "any/\xff bytes", First: at, DataVersion: version},
		catalog.OldVersion{Rev: 7, Database: "db", ID: "any/\xff bytes", DataVersion: version},
		catalog.Job{Rev: 7, ID: "j", Database: "db", Key: "shop", Version: 1, State: catalog.JobDone, Started: at, Ended: &at},
		catalog.Usage{Rev: 7, Identity: "01", Wraps: 1 << 20},
	} {
		r, err := catalog.Encode(v)
		if err != nil {
			t.Errorf("%T: %v", v, err)
			continue
		}
		back, err := catalog.Decode(r)
		if err != nil || !reflect.DeepEqual(back, v) {
			t.Errorf("%T: %+v, %v, want %+v", v, back, err, v)
		}
		if _, err := catalog.Decode(catalog.Record{Kind: r.Kind, ID: r.ID, Value: bytes.Replace(r.Value, []byte("schema"), []byte("rot-13"), 1)}); err == nil {
			t.Errorf("%T: another value is taken for it", v)
		}
	}
}

func TestIntentsAndMembersDoNotLeaveTheirCatalog(t *testing.T) {
	for _, v := range []any{catalog.Intent{}, catalog.Member{}, "text"} {
		if _, err := catalog.Encode(v); err == nil {
			t.Errorf("%T is encoded", v)
		}
	}
	for _, kind := range []catalog.Kind{catalog.KindIntent, catalog.KindMember, "unknown"} {
		if _, err := catalog.Decode(catalog.Record{Kind: kind, ID: "id", Value: []byte("{}")}); err == nil {
			t.Errorf("a %s is decoded", kind)
		}
	}
}
