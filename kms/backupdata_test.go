package kms_test

import (
	"fmt"
	"testing"
	"testing/synctest"

	"kmsd/kms"
	"kmsd/kms/api"
)

// More than a backup reads at a time, of keys and of data keys, with everything that
// belongs to them.
func TestBackupKeepsAllOfManyKeysAndDataKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 300 // a page has 256
		old := exporting(newRig(t, 2)).mustStart()
		n := old.fillShop(many)
		if err := old.DeleteNamedKey(t.Context(), "shop", "7"); err != nil {
			t.Fatal(err)
		}
		job := old.rekey(api.RekeyOptions{Retire: api.RetireDisable})
		old.wantJob(job.ID, api.JobDone)
		for i := range many {
			old.create(fmt.Sprint("key-", i))
		}
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 2))
		report := next.restored(fileOf(file, id))
		defer next.stop()
		if report.Keys != many+1 || report.Versions != many+2 || report.Databases != 1 || report.NamedKeys != n {
			t.Errorf("report %+v, want %d versions of data keys", report.Contents, n)
		}
		db, err := next.Database(t.Context(), "shop")
		if err != nil || db.Keys != many || db.Versions != n || db.Job != job.ID {
			t.Errorf("database %+v, %v", db, err)
		}
		if next.job(job.ID).State != api.JobDone {
			t.Errorf("job %+v", next.job(job.ID))
		}
		if k, err := next.DescribeNamedKey(t.Context(), "shop", "7"); err != nil || k.Deleted == nil {
			t.Errorf("data key 7 is %+v, %v; want it deleted", k, err)
		}
		for i := range many {
			if i != 7 {
				next.wantDataKey(fmt.Sprint(i), 2)
			}
		}
		next.wantVersions("shop", kms.StateDisabled, kms.StateEnabled)
		next.wantConsistent()
	})
}
