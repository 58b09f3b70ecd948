package mariadb_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// writerCount is how many connections insert rows at the same time.
const writerCount = 4

// writers insert rows into shop.orders until they end, and remember which of them the
// server has acknowledged.
type writers struct {
	stop  context.CancelFunc
	ended sync.WaitGroup

	mu       sync.Mutex // guards what follows
	acked    [writerCount]int
	failures []error
	longest  time.Duration // that an insert took since the last look
}

const createOrders = "CREATE TABLE shop.orders (writer INT, n INT, text VARCHAR(400), PRIMARY KEY (writer, n)) ENGINE=InnoDB"

// textOf is what a row holds: enough to fill pages, so that the server has to write them.
func textOf(writer, n int) string {
	return strings.Repeat(fmt.Sprintf("row %d of writer %d. ", n, writer), 15)
}

// startWriters begins to write behind the rows that are there. With the first failure a
// writer ends.
func (s *site) startWriters(t *testing.T, acked [writerCount]int) *writers {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	w := &writers{stop: stop, acked: acked}
	db := s.mariadb.DB()
	for i := range writerCount {
		w.ended.Go(func() {
			for ctx.Err() == nil {
				begin := time.Now()
				n := w.next(i)
				// Without the context: what was begun is waited for, so that no row is in doubt.
				_, err := db.Exec("INSERT INTO shop.orders VALUES (?, ?, ?)", i, n, textOf(i, n))
				if !w.record(i, n, time.Since(begin), err) {
					return
				}
			}
		})
	}
	t.Cleanup(func() { w.end() })
	return w
}

func (w *writers) next(writer int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked[writer] + 1
}

func (w *writers) record(writer, n int, took time.Duration, err error) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.longest = max(w.longest, took)
	if err != nil {
		w.failures = append(w.failures, fmt.Errorf("inserting row %d of writer %d: %w", n, writer, err))
		return false
	}
	w.acked[writer] = n
	return true
}

// end waits for the writers and returns the last row of each that was acknowledged, and what
// failed.
func (w *writers) end() ([writerCount]int, []error) {
	w.stop()
	w.ended.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked, w.failures
}

// rows is how many rows have been acknowledged.
func (w *writers) rows() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	sum := 0
	for _, n := range w.acked {
		sum += n
	}
	return sum
}

// goOn checks that every writer writes: so many further rows within the time.
func (w *writers) goOn(t *testing.T, limit time.Duration, rows int) {
	t.Helper()
	want := w.rows() + rows
	await(t, limit, func(context.Context) error {
		w.mu.Lock()
		failures := w.failures
		w.mu.Unlock()
		if len(failures) > 0 {
			t.Fatal(failures)
		}
		if now := w.rows(); now < want {
			return fmt.Errorf("%d rows are written, want %d", now, want)
		}
		return nil
	})
}

// takeLongest returns how long the slowest insert took since the last call.
func (w *writers) takeLongest() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.longest = 0 }()
	return w.longest
}

// hasRows checks that every acknowledged row is there, with what was written. Behind them
// there may be one of each writer whose answer got lost.
func (s *site) hasRows(t *testing.T, acked [writerCount]int) {
	t.Helper()
	rows, err := s.mariadb.DB().QueryContext(t.Context(), "SELECT writer, n, text FROM shop.orders ORDER BY writer, n")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var found [writerCount]int
	for rows.Next() {
		var writer, n int
		var text string
		if err := rows.Scan(&writer, &n, &text); err != nil {
			t.Fatal(err)
		}
		if found[writer]++; n != found[writer] {
			t.Fatalf("row %d of writer %d is missing; %d were acknowledged", found[writer], writer, acked[writer])
		}
		if text != textOf(writer, n) {
			t.Fatalf("row %d of writer %d holds %q", n, writer, text)
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for i := range acked {
		if found[i] < acked[i] || found[i] > acked[i]+1 {
			t.Errorf("%d rows of writer %d are there; %d were acknowledged", found[i], i, acked[i])
		}
	}
	t.Logf("rows of each writer: %v, all as they were written", found)
}

// isSound lets the server check every page of a table.
func (s *site) isSound(t *testing.T, table string) {
	t.Helper()
	var name, op, kind, text string
	if err := s.mariadb.DB().QueryRowContext(t.Context(), "CHECK TABLE "+table+" EXTENDED").Scan(&name, &op, &kind, &text); err != nil {
		t.Fatal(err)
	}
	if text != "OK" {
		t.Errorf("CHECK TABLE %s: %s: %s", table, kind, text)
	}
}
