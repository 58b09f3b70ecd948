package backup_test

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"testing"

	"filippo.io/age"

	"kmsd/kms/backup"
	"kmsd/kms/catalog"
)

// BenchmarkDataKeys writes a backup of so many data keys and reads it at the same time. It
// shows what a data key costs, and that none is kept in memory.
func BenchmarkDataKeys(b *testing.B) {
	id := newIdentity(b)
	r, w := io.Pipe()
	written := make(chan error, 1)
	b.ReportAllocs()
	b.ResetTimer()
	go func() { written <- writeMany(w, id, b.N) }()
	read, err := backup.NewReader(r, id)
	for err == nil {
		_, err = read.Next()
	}
	if !errors.Is(err, io.EOF) {
		b.Fatal(err)
	}
	if err := <-written; err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "MiB-kept")
	if got := read.Contents().NamedKeys; got != b.N {
		b.Errorf("%d data keys, want %d", got, b.N)
	}
}

func writeMany(to *io.PipeWriter, id *age.X25519Identity, n int) error {
	w, err := backup.NewWriter(to, []age.Recipient{id.Recipient()}, header())
	if err != nil {
		return err
	}
	put := func(v any) {
		if err == nil {
			err = w.Put(v)
		}
	}
	put(catalog.Database{Name: "shop", Key: "shop", Created: at})
	for i := range n {
		put(catalog.DataKey{Database: "shop", ID: fmt.Sprintf("%09d", i), First: at, DataVersion: dataVersion(1, 1, 1)})
	}
	put(catalog.Key{Name: "shop", Group: "g", Type: "aes-256", MinCopies: 1, Created: at, Databases: []string{"shop"}, Versions: []catalog.Version{
		{Number: 1, Identity: identity(1), State: catalog.Enabled, Created: at, CheckValue: check(1)},
	}})
	put(blob(1))
	if err == nil {
		_, err = w.Close()
	}
	return errors.Join(err, to.CloseWithError(err))
}
