package mariadb_test

import "testing"

// The redo log is encrypted, with the version that was the newest when it was made.
func TestNoAcknowledgedRowIsLostWhenMariaDBIsKilled(t *testing.T) {
	s := start(t)
	s.do(t, createOrders)
	var acked [writerCount]int
	for range 2 {
		w := s.startWriters(t, acked)
		w.goOn(t, writesIn, 200)
		s.rotateKey(t, "1")
		w.goOn(t, writesIn, 200)
		s.mariadb.Kill()
		acked, _ = w.end()
		s.startMariaDB(t)
		s.hasRows(t, acked)
		acked = s.lastRows(t)
	}
	s.restartMariaDB(t)
	s.hasRows(t, acked)
	s.isSound(t, "shop.orders")
	s.hasNoComplaint(t, "")
}

// lastRows returns the last row of each writer: those whose answers got lost are there now.
func (s *site) lastRows(t *testing.T) (last [writerCount]int) {
	t.Helper()
	for i := range last {
		if err := s.mariadb.DB().QueryRowContext(t.Context(), "SELECT COALESCE(MAX(n), 0) FROM shop.orders WHERE writer = ?", i).Scan(&last[i]); err != nil {
			t.Fatal(err)
		}
	}
	return last
}
