package rekey_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
)

// made is one version of a data key before or after it is in the catalog.
type made struct {
	i, version int
	envelope   []byte
}

// aad is what kmsd binds the envelope to; see dataKeyAAD in package kms.
func (m *made) aad() []byte {
	aad := []byte("kmsd data key 1\x00")
	aad = append(append(aad, byte(len(database))), database...)
	id := idOf(m.i)
	aad = append(append(aad, byte(len(id))), id...)
	return append(binary.BigEndian.AppendUint32(aad, uint32(m.version)), 0)
}

// inBatches gives all of them to a few programs, up to a thousand at a time.
func (s *site) inBatches(all []made, do func(batch []made)) {
	batches := make(chan []made)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for batch := range batches {
				if !s.t.Failed() {
					do(batch)
				}
			}
		})
	}
	for batch := range slices.Chunk(all, api.MaxItems) {
		batches <- batch
	}
	close(batches)
	wg.Wait()
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// fill makes the data keys: wrapped by kmsd, and put into its catalog while it is stopped.
func (s *site) fill() {
	s.t.Helper()
	all := make([]made, 0, total())
	for i := range *keys {
		all = append(all, made{i: i, version: 1})
		if i%everyOld == 0 {
			all = append(all, made{i: i, version: 2})
		}
	}
	s.inBatches(all, s.wrap)
	s.stop()

	store, err := boltcat.Open(s.catalog())
	if err != nil {
		s.t.Fatal(err)
	}
	defer store.Close()
	at := time.Now().UTC().Truncate(time.Millisecond)
	for batch := range slices.Chunk(all, 1000) {
		records := make([]catalog.Record, len(batch))
		for n, m := range batch {
			v := catalog.DataVersion{Number: m.version, Created: at, Master: 1, Envelope: m.envelope}
			var record any = catalog.DataKey{Database: database, ID: idOf(m.i), First: at, DataVersion: v}
			if m.version == 1 && m.i%everyOld == 0 {
				record = catalog.OldVersion{Database: database, ID: idOf(m.i), DataVersion: v}
			}
			if records[n], err = catalog.Encode(record); err != nil {
				s.t.Fatal(err)
			}
		}
		if _, err := store.Apply(s.t.Context(), records...); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *site) wrap(batch []made) {
	items := make([]api.Item, len(batch))
	for n := range batch {
		items[n] = api.Item{Plaintext: plaintextOf(batch[n].i, batch[n].version), AAD: batch[n].aad()}
	}
	results, err := s.client.Batch(s.t.Context(), api.OpWrap, database, items)
	if err != nil {
		s.t.Error(err)
		return
	}
	for n, r := range results {
		if r.Error != nil {
			s.t.Errorf("wrapping %s: %v", idOf(batch[n].i), r.Error)
			return
		}
		batch[n].envelope = r.Wrapped
	}
}

// maxUnwrapped is how many envelopes of a large database are unwrapped in the end.
const maxUnwrapped = 20_000

// check reads the catalog past kmsd: every version is there once, under the job's version
// of the master key, and unwraps to what it was.
func (s *site) check(job api.Job) {
	s.t.Helper()
	s.stop()
	all := s.read(job)
	if len(all) != total() {
		s.t.Errorf("the catalog has %d versions, want %d", len(all), total())
	}
	if len(all) > maxUnwrapped {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = all[:maxUnwrapped]
	}
	s.serve()
	s.inBatches(all, s.unwrap)
	for range 10 {
		m := all[rand.IntN(len(all))]
		got, err := s.client.NamedKey(s.t.Context(), database, idOf(m.i), m.version)
		if err != nil || !bytes.Equal(got.Plaintext, plaintextOf(m.i, m.version)) || got.Master != job.Version {
			s.t.Errorf("version %d of %s: %x under version %d, %v", m.version, idOf(m.i), got.Plaintext, got.Master, err)
		}
	}
}

// read returns every version in the catalog, and finds fault with those that are not
// wrapped as the job has to leave them.
func (s *site) read(job api.Job) (all []made) {
	s.t.Helper()
	store, err := boltcat.Open(s.catalog())
	if err != nil {
		s.t.Fatal(err)
	}
	defer store.Close()
	c := catalog.New(store)
	key, err := c.Key(s.t.Context(), database)
	if err != nil {
		s.t.Fatal(err)
	}
	identity, err := hex.DecodeString(key.Versions[job.Version-1].Identity)
	if err != nil {
		s.t.Fatal(err)
	}
	faults := 0
	look := func(i int, id string, want int, v catalog.DataVersion) {
		// An envelope names its key from byte 6 on.
		if id != idOf(i) || v.Number != want || v.Master != job.Version || !bytes.Equal(v.Envelope[6:22], identity) {
			if faults++; faults <= 10 {
				s.t.Errorf("at %d there is version %d of %q under version %d of the master key", i, v.Number, id, v.Master)
			}
		}
		all = append(all, made{i: i, version: v.Number, envelope: v.Envelope})
	}
	i := 0
	for last, n := "", 1; n > 0; {
		n = 0
		for dk, err := range c.DataKeys(s.t.Context(), database, "", last, 1000) {
			if err != nil {
				s.t.Fatal(err)
			}
			want := 1
			if i%everyOld == 0 {
				want = 2
			}
			look(i, dk.ID, want, dk.DataVersion)
			last = dk.ID
			i, n = i+1, n+1
		}
	}
	i = 0
	for last, n := (catalog.OldVersion{}), 1; n > 0; {
		n = 0
		for old, err := range c.OldVersions(s.t.Context(), database, last, 1000) {
			if err != nil {
				s.t.Fatal(err)
			}
			look(i, old.ID, 1, old.DataVersion)
			last = old
			i, n = i+everyOld, n+1
		}
	}
	return all
}

func (s *site) unwrap(batch []made) {
	items := make([]api.Item, len(batch))
	for n := range batch {
		items[n] = api.Item{Wrapped: batch[n].envelope, AAD: batch[n].aad()}
	}
	results, err := s.client.Batch(s.t.Context(), api.OpUnwrap, database, items)
	if err != nil {
		s.t.Error(err)
		return
	}
	for n, r := range results {
		if m := batch[n]; r.Error != nil || !bytes.Equal(r.Plaintext, plaintextOf(m.i, m.version)) {
			s.t.Errorf("version %d of %s unwraps to %x, %v", m.version, idOf(m.i), r.Plaintext, r.Error)
			return
		}
	}
}
