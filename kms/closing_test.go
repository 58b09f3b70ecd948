package kms_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
)

func TestNobodyIsToldOfTheEndBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1).mustStart()
		hold := make(chan struct{})
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Hang: hold})
		go func() { _, _ = r.CreateMasterKey(context.Background(), "shop", kms.KeyOptions{}) }()
		synctest.Wait()
		r.hsms[0].mu.Lock()
		r.hsms[0].step = func(*hsm) { <-time.After(time.Second) } // the call takes its time to end
		r.hsms[0].mu.Unlock()
		began := time.Now()
		var ends sync.WaitGroup
		for range 2 {
			ends.Go(func() {
				if err := r.Close(); err != nil || time.Since(began) < time.Second {
					t.Errorf("Close came to its end after %v, %v", time.Since(began), err)
				}
			})
		}
		ends.Wait()
		close(hold)
	})
}
