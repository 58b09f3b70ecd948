package p11_test

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"kmsd/plugins/internal/p11"
)

// A driver that opens its token waits for one that is logging in.
func TestDriversAreKeptApartWhileTheyLogIn(t *testing.T) {
	b := newBench(t)
	other, err := os.Open(b.store.Conf)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := syscall.Flock(int(other.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	d := p11.New(quirks(), p11.Options{})
	if _, err := d.Open(ctx, b.request()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("opening while another driver logs in: %v", err)
	}
	if err := syscall.Flock(int(other.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil { // which waits for the opening to end
		t.Fatal(err)
	}
	// A driver that is open keeps nobody away.
	b.open(t)
	if err := syscall.Flock(int(other.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		t.Errorf("the lock is still held: %v", err)
	}
}
