package kms_test

import (
	"testing"
	"testing/synctest"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestServiceKeepsItsPromises(t *testing.T) {
	apitest.Run(t, synctest.Test, func(t *testing.T) api.Service {
		r := newRig(t, 3).mustStart()
		t.Cleanup(r.stop)
		return r.KMS
	})
}
