package dev_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/internal/devserver"
)

func TestADatabaseFindsItsMount(t *testing.T) {
	s := prepare(t, newOptions(t))
	defer closeSite(t, s)
	cfg, err := config.Load(s.Config, config.Options{Environ: []string{}})
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Vault.Listen != s.VaultAddr || s.VaultAddr == s.Addr {
		t.Errorf("kmsd listens at %s, databases are told %s", cfg.Vault.Listen, s.VaultAddr)
	}
	if got := cfg.Vault.Mounts["mariadb"]; got != (config.Mount{Database: "shop", Format: "mariadb"}) || len(cfg.Vault.Mounts) != 1 {
		t.Errorf("got %+v", cfg.Vault.Mounts)
	}
	if key := s.Databases()["shop"]; key == "" || key == "shop" {
		t.Errorf("the master key is called %q: somebody may want to make that one", key)
	}
	if err := s.Announce(); err != nil {
		t.Fatal(err)
	}
	env, err := devserver.ReadEnv(filepath.Join(s.Dir, "env.sh"))
	if err != nil {
		t.Fatal(err)
	}
	if env.VaultAddr != s.VaultAddr || env.VaultToken == env.Token {
		t.Errorf("got %+v", env)
	}
	// pg_tde has 256 bytes for the header.
	if n := len(env.VaultToken); n == 0 || n >= 240 {
		t.Errorf("the token has %d bytes", n)
	}
	a, err := auth.New(auth.Config{Tokens: cfg.Auth.Tokens, Policies: cfg.Auth.Policies})
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Authenticate(t.Context(), auth.Credentials{Token: env.VaultToken})
	if err != nil {
		t.Fatal(err)
	}
	for _, action := range auth.Actions() {
		want := action == auth.ActionNamedGet || action == auth.ActionNamedPut || action == auth.ActionNamedList
		if p.May(action, "shop") != want || p.May(action, "other") || p.May(action, "") {
			t.Errorf("%s: the database's token may do the wrong thing", action)
		}
	}
}

func TestThePortOfDatabasesStaysTheSame(t *testing.T) {
	opts := newOptions(t)
	opts.Listen = devserver.OwnHost() + ":0" // where nobody takes it between two starts
	start := func() string {
		t.Helper()
		s := prepare(t, opts)
		defer closeSite(t, s)
		return s.VaultAddr
	}
	first := start()
	if again := start(); again != first {
		t.Errorf("%s, then %s", first, again)
	}
	other, err := net.Listen("tcp", strings.TrimPrefix(first, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if next := start(); next == first {
		t.Errorf("%s is taken", next)
	}
	if err := os.WriteFile(filepath.Join(opts.Dir, "kmsd.yaml"), []byte("vault: {listen: ["), 0o600); err != nil {
		t.Fatal(err)
	}
	start() // it is written anew
}

func TestDatabasesOfAllHostsAreToldOneTheyReach(t *testing.T) {
	opts := newOptions(t)
	opts.Listen = "0.0.0.0:0"
	s := prepare(t, opts)
	defer closeSite(t, s)
	if !strings.HasPrefix(s.VaultAddr, "https://127.0.0.1:") {
		t.Errorf("databases are told %s", s.VaultAddr)
	}
}
