package e2e_test

import (
	"os"
	"path/filepath"
	"testing"

	"go.yaml.in/yaml/v3"

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

// changeConfig changes the group in the kmsd.yaml of a server that has been stopped.
func changeConfig(t *testing.T, s *devserver.Server, change func(group map[string]any)) {
	t.Helper()
	path := filepath.Join(s.Dir, "kmsd.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		t.Fatal(err)
	}
	change(cfg["groups"].([]any)[0].(map[string]any))
	if b, err = yaml.Marshal(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
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
