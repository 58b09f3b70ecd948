package apitest_test

import (
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestMemory(t *testing.T) {
	apitest.Run(t, apitest.Plainly, func(*testing.T) api.Service { return new(apitest.Memory) })
}

func TestMemoryIsOperated(t *testing.T) {
	apitest.RunAdmin(t, apitest.Plainly, func(*testing.T) (apitest.Operated, func(string) api.MemberSpec) {
		return new(apitest.Memory), apitest.MemorySpare
	})
}

func TestMemoryKeepsDataKeys(t *testing.T) {
	apitest.RunDatabases(t, apitest.Plainly, func(*testing.T) apitest.DatabaseService {
		return &apitest.Memory{Formats: map[string]string{apitest.MariaDB: api.FormatMariaDB}}
	})
}

func TestMemoryRekeys(t *testing.T) {
	apitest.RunRekeys(t, apitest.Plainly, func(*testing.T) apitest.DatabaseService { return new(apitest.Memory) })
}
