package mariadb_test

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	"kmsd/kms/api"
)

// movedIn is within what MariaDB's threads have moved the pages of small tables, on any
// machine and disk.
const movedIn = 2 * time.Minute

// MariaDB moves pages that are more than one version behind: the first rotation is for what
// is written from then on, the second moves what was there before the first.
func TestPagesMoveToTheVersionsThatKmsdMakes(t *testing.T) {
	s := start(t)
	const rows = " SELECT seq, CONCAT('row ', seq) FROM shop.seq_1_to_5000"
	tables := []string{"shop.first", "shop.second", "shop.third"} // each made under the version of its number
	for i, table := range tables {
		version := i + 1
		if version > 1 {
			if made := s.rotateKey(t, "1"); made != version {
				t.Fatalf("the rotation made version %d, want %d", made, version)
			}
			s.awaitVersions(t, "shop/first", oldest(version), version)
		}
		s.do(t, "CREATE TABLE "+table+" (id INT PRIMARY KEY, text VARCHAR(200))")
		s.do(t, "INSERT INTO "+table+rows)
	}
	s.awaitVersions(t, "shop/first", 3, 3)
	s.awaitVersions(t, "shop/second", 2, 3)
	s.awaitVersions(t, "shop/third", 3, 3)

	s.restartMariaDB(t)
	for _, table := range tables {
		var n int
		query := "SELECT COUNT(*) FROM " + table + " WHERE text = CONCAT('row ', id)"
		if err := s.mariadb.DB().QueryRowContext(t.Context(), query).Scan(&n); err != nil {
			t.Fatal(err)
		}
		if n != 5000 {
			t.Errorf("%s: %d rows are as they were written, want 5000", table, n)
		}
		s.isSound(t, table)
	}
	s.hasNoComplaint(t, "")
}

// oldest is the version of the oldest pages of a table that was made under version 1.
func oldest(newest int) int {
	if newest < 3 {
		return 1
	}
	return newest
}

// awaitVersions waits until the oldest page of a tablespace has one version of its key, and
// the server knows of another one as the newest.
func (s *site) awaitVersions(t *testing.T, tablespace string, oldest, newest int) {
	t.Helper()
	begin := time.Now()
	await(t, movedIn, func(context.Context) error {
		var min, current int
		err := s.mariadb.DB().QueryRowContext(t.Context(), `SELECT MIN_KEY_VERSION, CURRENT_KEY_VERSION
			FROM information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE NAME = ?`, tablespace).Scan(&min, &current)
		if err != nil {
			return err
		}
		if min != oldest || current != newest {
			return fmt.Errorf("pages of %s have version %d or a later one, and %d is the newest; want %d and %d", tablespace, min, current, oldest, newest)
		}
		return nil
	})
	t.Logf("%s: oldest version %d, newest %d, after %v", tablespace, oldest, newest, time.Since(begin))
}

func TestARekeyIsNotNoticed(t *testing.T) {
	s := start(t)
	const others = 50 // keys that the job has to wrap beside those that MariaDB uses
	for i := range others {
		s.makeKey(t, strconv.Itoa(100+i))
	}
	s.rotateKey(t, "1")
	s.do(t, createOrders)
	w := s.startWriters(t, [writerCount]int{})
	w.goOn(t, writesIn, 50)

	job, err := s.c.Rekey(t.Context(), database, api.RekeyOptions{Retire: api.RetireDisable})
	if err != nil {
		t.Fatal(err)
	}
	await(t, recoveredIn, func(ctx context.Context) error {
		if job, err = s.c.Job(ctx, job.ID); err == nil && job.State != api.JobDone {
			err = fmt.Errorf("the job is %s: %+v", job.State, job)
		}
		return err
	})
	w.goOn(t, writesIn, 50)
	acked, failures := w.end()
	if len(failures) > 0 {
		t.Fatal(failures)
	}
	if job.Failed != 0 || job.Progress.Done < others+3 {
		t.Errorf("the job has wrapped %d versions, %d failed; want %d at least", job.Progress.Done, job.Failed, others+3)
	}
	k, err := s.c.DescribeNamedKey(t.Context(), database, "1")
	if err != nil {
		t.Fatal(err)
	}
	if k.Master != job.Version || k.Version != 2 {
		t.Errorf("version %d of key 1 is under version %d of the master key, want 2 under %d", k.Version, k.Master, job.Version)
	}

	s.restartMariaDB(t)
	s.hasRows(t, acked)
	s.isSound(t, "shop.orders")
	s.hasNoComplaint(t, "")
}
