package e2e_test

import (
	"path/filepath"
	"testing"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/pluginproto"
)

// configOf reads the kmsd.yaml that "kmsd dev" has written.
func configOf(t *testing.T, s *devserver.Server) look.Config {
	t.Helper()
	cfg, err := look.ReadConfig(filepath.Join(s.Dir, "kmsd.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// readSecret reads a secret as kmsd does.
func readSecret(t *testing.T, path string) []byte {
	t.Helper()
	b, err := look.Secret(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// openToken runs a driver of the test's own on a member's token, past kmsd.
func openToken(t *testing.T, cfg look.Config, name string) pluginproto.Driver {
	t.Helper()
	d, end, err := look.OpenToken(t.Context(), bin, cfg, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(end)
	return d
}

// readCatalog reads a catalog, and fails the test if an operation is still open.
func readCatalog(t *testing.T, path string) look.Catalog {
	t.Helper()
	cat, err := look.ReadCatalog(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	for _, open := range cat.Open {
		t.Error(open)
	}
	return cat
}
