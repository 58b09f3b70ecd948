package catalog

import (
	"reflect"
	"testing"
	"time"
)

// FuzzScan reads records in both ways: what the scanner takes, decode takes too, as the
// same thing.
func FuzzScan(f *testing.F) {
	f.Add([]byte(`{"schema":1,"first":"2026-03-04T05:06:07.89Z","version":2,"created":"2026-03-04T05:06:07+01:00","object":true,"deleted":"2026-03-04T05:06:07Z","master":3,"envelope":"ZW52ZWxvcGU="}`))
	f.Add([]byte(`{"schema":1,"version":2,"created":"2026-03-04T05:06:07Z","master":3,"envelope":"ZW52ZWxv"}`))
	f.Add([]byte("{\"schema\":1,\"version\":2,\"created\":\"2026-03-04T05:06:07Z\",\"master\":3,\"envelope\":\"ZW52\nZWxv\"}"))
	f.Add([]byte(`{"schema":1,"version":02,"created":"2026-03-04T05:06:07Z","master":3,"envelope":"\u005aW52"}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		var dk DataKey
		if scanDataKey(value, &dk) {
			var v dataKeyRecord
			if err := decode(Record{Kind: KindDataKey, Value: value}, &v); err != nil || !same(dk.DataVersion, v.DataVersion) || !dk.First.Equal(v.First) {
				t.Errorf("scanned %+v, decoded %+v, %v", dk, v.DataKey, err)
			}
		}
		var old OldVersion
		if scanOldVersion(value, &old) {
			var v oldVersionRecord
			if err := decode(Record{Kind: KindDataVersion, Value: value}, &v); err != nil || !same(old.DataVersion, v.DataVersion) {
				t.Errorf("scanned %+v, decoded %+v, %v", old, v.OldVersion, err)
			}
		}
	})
}

// same compares times as times.
func same(a, b DataVersion) bool {
	if (a.Deleted == nil) != (b.Deleted == nil) || a.Deleted != nil && !a.Deleted.Equal(*b.Deleted) || !a.Created.Equal(b.Created) {
		return false
	}
	a.Created, a.Deleted, b.Created, b.Deleted = time.Time{}, nil, time.Time{}, nil
	return reflect.DeepEqual(a, b)
}

func TestTheScannerReadsWhatIsWritten(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 890e6, time.UTC)
	for _, v := range []DataVersion{
		{Number: 1, Created: at, Master: 1, Envelope: []byte{1}},
		{Number: 999999999, Created: at, Object: true, Deleted: &at, Master: 20000, Envelope: make([]byte, 65000)},
	} {
		r, err := encodeDataKey(DataKey{Database: "orders", ID: "a", First: at, DataVersion: v})
		var dk DataKey
		if err != nil || !scanDataKey(r.Value, &dk) || !same(dk.DataVersion, v) || !dk.First.Equal(at) {
			t.Errorf("scanned %+v, %v, want %+v", dk, err, v)
		}
		r, err = encodeOldVersion(OldVersion{Database: "orders", ID: "a", DataVersion: v})
		var old OldVersion
		if err != nil || !scanOldVersion(r.Value, &old) || !same(old.DataVersion, v) {
			t.Errorf("scanned %+v, %v, want %+v", old, err, v)
		}
	}
}
