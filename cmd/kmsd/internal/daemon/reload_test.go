package daemon_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
)

// names returns the members of the only group, as the API tells them.
func (r *running) names(t *testing.T) string {
	t.Helper()
	st, err := r.client(t).Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range st.Groups[0].Members {
		name := m.Name
		if m.Role == api.RoleStandby {
			name += "(standby)"
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

// edit changes the configuration and has the daemon read it.
func (r *running) edit(t *testing.T, change func(text string) string) {
	t.Helper()
	text, err := os.ReadFile(r.site.Config)
	if err != nil {
		t.Fatal(err)
	}
	write(t, r.site.Config, change(string(text)))
	r.reload(t)
}

func TestMembersFollowTheFile(t *testing.T) {
	r := start(t)
	if got := r.names(t); got != "hsm-a hsm-b" {
		t.Fatalf("the members are %s", got)
	}
	two, err := os.ReadFile(r.site.Config)
	if err != nil {
		t.Fatal(err)
	}
	third := func(text string) string { // the groups are at its end, and hsm-b is the last in there
		at := strings.Index(text, "        - name: hsm-b\n")
		return text + strings.ReplaceAll(text[at:], "hsm-b", "hsm-c")
	}
	for _, name := range []string{"hsm-c.pin", "hsm-c.conf"} {
		write(t, filepath.Join(r.site.Dir, name), "1234\n")
	}
	r.edit(t, third)
	if got := r.names(t); got != "hsm-a hsm-b hsm-c" {
		t.Errorf("after hsm-c has come into the file the members are %s\n%s", got, r.log)
	}
	r.edit(t, func(text string) string {
		return strings.Replace(text, "name: hsm-c\n", "name: hsm-c\n          standby: true\n", 1)
	})
	if got := r.names(t); got != "hsm-a hsm-b hsm-c(standby)" {
		t.Errorf("after hsm-c has become a standby in the file the members are %s\n%s", got, r.log)
	}
	r.edit(t, func(string) string { return string(two) })
	if got := r.names(t); got != "hsm-a hsm-b" {
		t.Errorf("after hsm-c has left the file the members are %s\n%s", got, r.log)
	}
	r.wantReloads(t, "tokens and policies; the audit log; certificates; add hsm-c standby=false; the configuration; "+
		"tokens and policies; the audit log; certificates; change hsm-c standby=true; the configuration; "+
		"tokens and policies; the audit log; certificates; remove hsm-c standby=false; the configuration")
}

// wantReloads holds what the audit log says of signals against a list.
func (r *running) wantReloads(t *testing.T, want string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.site.Dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(b)) {
		var rec struct{ Remote, Action, Operation, Group, Member, Spec, Outcome string }
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Action != "reload" {
			continue
		}
		if rec.Member != "" {
			rec.Operation += fmt.Sprintf(" %s standby=%t", rec.Member, strings.Contains(rec.Spec, " standby=true pin.file="))
		}
		if rec.Remote != "signal" || rec.Outcome != "ok" || (rec.Member != "") != (rec.Group == "default") {
			t.Errorf("the audit log holds %s", line)
		}
		got = append(got, rec.Operation)
	}
	if got := strings.Join(got, "; "); got != want {
		t.Errorf("the audit log tells of\n%s\nwant\n%s", got, want)
	}
}

func TestAFileWithFaultsChangesNoMember(t *testing.T) {
	r := start(t)
	r.edit(t, func(text string) string {
		return strings.Replace(strings.Replace(text, "name: hsm-b", "name: hsm-c", 1), "driver_dir:", "driver_directory:", 1)
	})
	r.await(t, "the old stays in force")
	if got := r.names(t); got != "hsm-a hsm-b" {
		t.Errorf("the members are %s", got)
	}
}

func TestWhatNeedsARestartIsSaid(t *testing.T) {
	r := start(t)
	r.edit(t, func(text string) string {
		text = strings.Replace(text, "name: default\n", "name: default\n      min_copies: 1\n      balance: count\n", 1)
		return strings.Replace(text, "audit.jsonl", "other.jsonl", 1)
	})
	for _, want := range []string{"min_copies of group default has changed", "balance of group default has changed", "audit has changed: it needs a restart"} {
		r.await(t, want)
	}
	r.edit(t, func(text string) string { return strings.Replace(text, "other.jsonl", "audit.jsonl", 1) })
	if strings.Contains(r.log.String(), "audit has changed") {
		t.Error("a restart is asked for although the file says again what it said at the start")
	}
}

func TestMountsFollowTheFile(t *testing.T) {
	r := start(t)
	if _, err := r.client(t).Database(t.Context(), "shop"); !errors.Is(err, api.ErrNotFound) {
		t.Fatal(err)
	}
	r.edit(t, func(text string) string { return strings.Replace(text, "mariadb:", "oracle:", 1) })
	if strings.Contains(r.log.String(), "it needs a restart") {
		t.Errorf("a mount needs a restart:\n%s", r.log)
	}
	r.edit(t, func(text string) string { return strings.Replace(text, "format: mariadb", "format: oracle", 1) })
	r.await(t, `vault.mounts.oracle.format: \"oracle\" is not a format`)
	r.edit(t, func(text string) string {
		text = strings.Replace(text, "format: oracle", "format: mariadb", 1)
		return strings.Replace(text, r.site.VaultAddr, "https://127.0.0.1:1", 1)
	})
	r.await(t, "vault.listen has changed: it needs a restart")
}

// The listener for databases stays until a restart, and with it what MariaDB is protected
// from.
func TestMountsStayWhenTheyLeaveTheFileWithTheirListener(t *testing.T) {
	site := prepare(t)
	keepShop(t, filepath.Join(site.Dir, "catalog.db"))
	r := run(t, site)
	r.edit(t, func(text string) string {
		head, rest, _ := strings.Cut(text, "\nvault:\n")
		for strings.HasPrefix(rest, " ") {
			_, rest, _ = strings.Cut(rest, "\n")
		}
		return head + "\n" + rest
	})
	r.await(t, "vault.listen has changed: it needs a restart")
	if db, err := r.client(t).Database(t.Context(), "shop"); err != nil || db.Format != api.FormatMariaDB {
		t.Errorf("the database is %+v, %v; want format mariadb, as its mount is served still", db, err)
	}
}

// keepShop puts a database into a catalog, as an earlier kmsd has left it.
func keepShop(t *testing.T, path string) {
	t.Helper()
	store, err := boltcat.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	version := catalog.Version{Number: 1, State: catalog.Enabled, Identity: strings.Repeat("ab", 16), Created: time.Now()}
	key := catalog.Key{Name: "shop-db", Group: "default", Type: "aes-256", MinCopies: 1, Versions: []catalog.Version{version}, Databases: []string{"shop"}}
	if _, _, err := catalog.New(store).CreateDatabase(t.Context(), catalog.Database{Name: "shop", Key: "shop-db"}, key); err != nil {
		t.Fatal(err)
	}
}

func TestDatabasesFindNobodyWhileTheGroupIsLost(t *testing.T) {
	site := prepare(t)
	text, err := os.ReadFile(site.Config)
	if err != nil {
		t.Fatal(err)
	}
	databases := freeAddr(t)
	write(t, site.Config, strings.ReplaceAll(string(text), site.VaultAddr, "https://"+databases))
	r := run(t, site)
	if conn, err := net.Dial("tcp", databases); err == nil {
		conn.Close()
		t.Error("the listener for databases is open")
	}
	if !strings.Contains(r.log.String(), "databases cannot be served yet") {
		t.Errorf("the log does not say so:\n%s", r.log)
	}
}
