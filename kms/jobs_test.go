package kms_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

func TestJobsAreThoseThatHaveNotEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		r.mustStart()
		defer r.stop()
		for _, name := range []string{"shop", "bank"} {
			if _, err := r.CreateDatabase(t.Context(), name, api.DatabaseOptions{}); err != nil {
				t.Fatal(err)
			}
			if _, err := r.PutNamedKey(t.Context(), name, "1", api.NamedKeyPut{}); err != nil {
				t.Fatal(err)
			}
		}
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Delay: time.Second})
		for _, name := range []string{"shop", "bank"} {
			if _, err := r.Rekey(t.Context(), name, api.RekeyOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if jobs := r.Jobs(); len(jobs) != 2 || jobs[0].Database != "bank" || jobs[1].Database != "shop" || jobs[0].State != api.JobRunning || jobs[0].Progress.Total != 1 {
			t.Errorf("the jobs are %+v", jobs)
		}
		r.eventually(func() error {
			if jobs := r.Jobs(); len(jobs) > 0 {
				return fmt.Errorf("the jobs are %+v", jobs)
			}
			return nil
		})
	})
}
