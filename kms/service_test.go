package kms_test

import (
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestServiceKeepsItsPromises(t *testing.T) {
	apitest.Run(t, func(t *testing.T) api.Service {
		r := newRig(t, 3).mustStart()
		t.Cleanup(r.stop)
		return r.KMS
	})
}
