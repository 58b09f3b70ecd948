package leaktest

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { Main(m) }

// late is a package's tests that leave a goroutine behind for a while.
type late time.Duration

func (l late) Run() int {
	ended := time.After(time.Duration(l))
	go func() { <-ended }()
	return 3
}

func TestAGoroutineThatEndsLateIsWaitedFor(t *testing.T) {
	if code := (patient{late(2 * time.Second)}).Run(); code != 3 {
		t.Errorf("the tests ended with %d, want 3", code)
	}
	if err := goleak.Find(); err != nil {
		t.Error(err)
	}
}
