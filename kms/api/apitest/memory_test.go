package apitest_test

import (
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestMemory(t *testing.T) {
	apitest.Run(t, func(*testing.T) api.Service { return new(apitest.Memory) })
}
