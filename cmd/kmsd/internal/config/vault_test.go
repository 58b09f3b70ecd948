package config_test

import (
	"maps"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/config"
)

const mounts = `
vault:
  listen: "https://127.0.0.1:0"
  mounts:
    mariadb: {database: shop, format: mariadb}
    team/db.1: {database: erp}
    second: {database: shop, format: mariadb}
`

func TestMountsAreRead(t *testing.T) {
	f := newFixture(t)
	cfg, err := config.Load(f.file(t, sound+mounts), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]config.Mount{
		"mariadb":   {Database: "shop", Format: "mariadb"},
		"team/db.1": {Database: "erp"},
		"second":    {Database: "shop", Format: "mariadb"},
	}
	if !maps.Equal(cfg.Vault.Mounts, want) {
		t.Errorf("got %v", cfg.Vault.Mounts)
	}
	if got := cfg.KMS(nil, nil).Formats; !maps.Equal(got, map[string]string{"shop": "mariadb"}) {
		t.Errorf("formats: got %v", got)
	}
}

func TestTheVaultListenerCanBeSetFromOutside(t *testing.T) {
	f := newFixture(t)
	path := f.file(t, sound+mounts)
	cfg, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b", "KMSD_VAULT_LISTEN=https://127.0.0.1:8499"}})
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Vault.Listen != "https://127.0.0.1:8499" {
		t.Errorf("got %s", cfg.Vault.Listen)
	}
	cfg, err = config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b", "KMSD_VAULT_MOUNTS=shop"}})
	if err != nil || len(cfg.Vault.Mounts) != 3 || len(cfg.Warnings) != 1 {
		t.Errorf("mounts come from the file only: got %v, %v", cfg, err)
	}
	_, err = config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b", "KMSD_VAULT_LISTEN=https://127.0.0.1:8420"}})
	if err == nil || !strings.Contains(err.Error(), "KMSD_VAULT_LISTEN: vault.listen: https://127.0.0.1:8420 is served by listen too") {
		t.Errorf("got %v", err)
	}
}
