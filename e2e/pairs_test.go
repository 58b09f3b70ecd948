package e2e_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"kmsd/internal/faultlib"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

const (
	signTime = 2 * time.Millisecond    // of each of the two calls for a signature; a driver of SoftHSM makes one at a time
	pairTime = 1500 * time.Millisecond // less than the probe interval, so that nobody takes the HSM for hung
	signers  = 64                      // programs that sign, again and again
)

// An HSM that makes a pair does nothing else meanwhile, so that what is sent to it waits.
// That SoftHSM does, as long as there are processors for it, would hide it.
func TestSignaturesDoNotWaitForTheMakingOfAPair(t *testing.T) {
	s := startSigning(t, "cost", true)
	for try := 1; ; try++ {
		quiet, during := s.measure(t)
		q, d := quiet.quantile(0.99), during.wraps.quantile(0.99)
		if d <= 2*q {
			break
		}
		// The machine may be busy with something else; but then not each time, and it
		// does not take as long as the pair, unless it takes that from others too.
		if d > pairTime/2+share*during.control.quantile(1) || try == attempts {
			t.Fatalf("the p99 of signatures is %v while a pair is made and %v before, want at most twice that", d, q)
		}
	}
}

// The difference that weighing makes, with what a Luna client does.
func TestByPlainCountSignaturesWaitForTheMakingOfAPair(t *testing.T) {
	s := startSigning(t, "count", false)
	for try := 1; ; try++ {
		quiet, during := s.measure(t)
		q, d := quiet.quantile(0.99), during.wraps.quantile(0.99)
		if d >= 2*q && d >= pairTime/2 {
			break
		}
		if try == attempts { // the machine may have stalled before, or while nobody looked
			t.Fatalf("the p99 of signatures is %v while a pair is made and %v before; the load does not show a stall", d, q)
		}
	}
}

// signing is a group with programs that sign.
type signing struct {
	c       *client.Client
	primary *faultlib.Library
	load    *openLoad // each program signs as soon as it has an answer
	control *openLoad // that no HSM has a part in
	pairs   int       // that have been made
}

func startSigning(t *testing.T, balance string, hedge bool) *signing {
	t.Helper()
	server, libs := prepareFaulty(t, 3)
	changeConfig(t, server, func(group map[string]any) { group["balance"], group["hedge"] = balance, hedge })
	c := dial(t, serve(t, server))
	g, _ := awaitWhole(t, c, recoveredIn)
	if _, err := c.CreateMasterKey(t.Context(), "signer", api.KeyOptions{Type: "ec-p256"}); err != nil {
		t.Fatal(err)
	}
	s := &signing{c: c, load: &openLoad{c: c, key: "signer", send: (*openLoad).sign}}
	for i, lib := range libs {
		lib.Arm(t, 0, faultlib.Fault{What: faultlib.Sleep, Function: "C_Sign", Times: faultlib.Forever, Arg: uint32(signTime.Milliseconds())})
		if g.Members[i].Name == g.Primary {
			s.primary = lib
		}
	}
	startPrograms(t, s.load, signers)
	s.control = startControl(t, c, "signer")
	wait(t, time.Second)
	return s
}

// measure returns how programs that sign are answered, before and while the primary makes
// a pair.
func (s *signing) measure(t *testing.T) (quiet outcome, during stall) {
	t.Helper()
	s.load.take()
	wait(t, pairTime)
	quiet = s.load.take()
	s.primary.Arm(t, 1, faultlib.Fault{What: faultlib.Occupy, Function: "C_GenerateKeyPair", Arg: uint32(pairTime.Milliseconds())})
	s.pairs++
	made := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), recoveredIn)
		defer cancel()
		_, err := s.c.CreateMasterKey(ctx, fmt.Sprintf("pair-%d", s.pairs), api.KeyOptions{Type: "rsa-2048"}) // the least work beside the fault
		made <- err
	}()
	awaitFired(t, s.primary, 1, 1)
	s.load.take()
	s.control.take()
	wait(t, pairTime+100*signTime) // with what has waited
	during = stall{wraps: s.load.take(), control: s.control.take()}
	if err := <-made; err != nil {
		t.Errorf("making a pair: %v", err)
	}
	t.Logf("before: %v", quiet)
	t.Logf("during: %v", during)
	quiet.noFailure(t)
	during.wraps.noFailure(t)
	return quiet, during
}

// sign signs with the key.
func (l *openLoad) sign(due time.Time) {
	_, err := l.c.Sign(context.Background(), l.key, api.SignRequest{Digest: make([]byte, 32)})
	l.record(due, "sign", err)
}
