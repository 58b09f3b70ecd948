package luna_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/internal/softhsmtest"
	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// A member in trouble is shown as what it is, while the others serve.
func TestTroubleIsOneMembersAndHasAName(t *testing.T) {
	tests := []struct {
		name    string
		options lunasim.Options
		spoil   func(t *testing.T, m *member)
		state   func(api.Member) bool
		ckr     string // "": whatever
		says    []string
		mend    func(m *member) // nil: nobody can
	}{
		{
			name:  "there is no library",
			spoil: set("module", "/nowhere/libCryptoki2_64.so"),
			state: away, says: []string{"/nowhere/libCryptoki2_64.so"},
		},
		{
			name: "the library is none of PKCS#11",
			spoil: func(t *testing.T, m *member) {
				m.settings["module"] = filepath.Join(bin, "kmsd-driver-luna")
			},
			state: away, says: []string{"kmsd-driver-luna"},
		},
		{
			name:  "there is no Chrystoki.conf",
			spoil: set("chrystoki_conf", "/nowhere/Chrystoki.conf"),
			state: away, says: []string{"/nowhere/Chrystoki.conf"},
		},
		{
			name:  "the label is an HA group's",
			spoil: set("token_label", "ha-group"), options: lunasim.Options{Switches: map[string]string{"ha_slot": "yes"}},
			state: away, says: []string{"HA group"},
		},
		{
			name:  "the partition is deactivated",
			spoil: turn("activated", "no"), mend: func(m *member) { m.partition.Set("activated", "yes") },
			state: down, ckr: "CKR_PARTITION_DISABLED", says: []string{"activate"},
		},
		{
			name:  "the partition is deactivated and says that nobody is logged in",
			spoil: turn("activated", "no"), options: lunasim.Options{Switches: map[string]string{"deactivated_code": "0x101"}},
			mend:  func(m *member) { m.partition.Set("activated", "yes") },
			state: down, ckr: "CKR_USER_NOT_LOGGED_IN",
		},
		{
			name:  "the HSM was tampered with",
			spoil: turn("tampered", "yes"),
			state: failed, ckr: "CKR_HSM_TAMPERED", says: []string{"tamper"},
		},
		{
			name: "the library hangs as soon as it is called",
			spoil: func(t *testing.T, m *member) {
				m.partition.Arm(lunasim.Fault{What: lunasim.Hang, Function: "C_Initialize", Times: lunasim.Forever})
			},
			state: away,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			s.group["command_timeout"] = "1s" // a third of the time that a driver has for opening a token
			bad := on("bad", lunasim.New(t, tt.options))
			s.members = []member{on("good", lunasim.New(t, lunasim.Options{})), bad, on("fine", lunasim.New(t, lunasim.Options{}))}
			s.members[1].settings = maps.Clone(bad.settings)
			tt.spoil(t, &s.members[1])
			s.serve()
			s.create("shop", "")
			s.works("shop")
			m := s.await("bad", "in trouble", func(m api.Member) bool { return tt.state(m) && m.Reason != "" })
			t.Logf("%s, %s: %s", m.State, m.CKR, m.Reason)
			shows(t, s, m, tt.ckr, tt.says)
			if tt.mend == nil {
				return
			}
			tt.mend(&s.members[1])
			s.awaitWhole()
			s.sameKeys(1)
		})
	}
}

// A member of another kind that is put into kmsd.yaml is failed, with the reason.
func TestAnHSMOfAnotherKindIsNoMember(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{})
	s.create("shop", "")
	store := softhsmtest.NewStore(t)
	store.Add(t, "soft")
	if err := s.server.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.members = append(s.members, member{
		name: "bad", driver: "softhsm", pin: softhsmtest.PIN,
		settings: map[string]string{"token_label": "soft", "softhsm_conf": store.Conf},
	})
	s.serve()
	m := s.await("bad", "failed", failed)
	shows(t, s, m, "", []string{`its driver is "softhsm`, `"luna`, "keys cannot be cloned between them"})
	s.works("shop")
}

func away(m api.Member) bool { return down(m) || failed(m) }

func set(setting, value string) func(*testing.T, *member) {
	return func(_ *testing.T, m *member) {
		m.settings[setting] = value
		if setting == "token_label" {
			delete(m.settings, "token_serial")
		}
	}
}

func turn(name, value string) func(*testing.T, *member) {
	return func(_ *testing.T, m *member) { m.partition.Set(name, value) }
}

// shows checks what kmsd status and kmsd group check come to say of a member in trouble: an
// attempt that a busy machine was too slow for has another reason, and another one follows.
func shows(t *testing.T, s *site, m api.Member, ckr string, says []string) {
	t.Helper()
	if ckr != "" && failed(m) && m.CKR != ckr { // one that is down shows CKR_TOKEN_NOT_PRESENT after a while
		t.Errorf("it shows %s, want %s", m.CKR, ckr)
	}
	says = append([]string{"bad"}, says...)
	s.comesToSay(1, says, "group", "check")
	if ckr != "" {
		says = append(says, ckr)
	}
	s.comesToSay(0, says, "status")
}

// comesToSay runs the command line program until it ends with that code and prints all of
// these texts.
func (s *site) comesToSay(code int, says []string, args ...string) {
	s.t.Helper()
	s.poll(func() error {
		out, errs, got := s.cli(args...)
		if got != code {
			return fmt.Errorf("%q ends with %d, want %d:\n%s%s", args, got, code, out, errs)
		}
		for _, text := range says {
			if !strings.Contains(flat(out), text) {
				return fmt.Errorf("%q does not say %q:\n%s", args, text, out)
			}
		}
		return nil
	})
}

// flat is a text without its line breaks.
func flat(s string) string { return strings.Join(strings.Fields(s), " ") }

// A wrong PIN is tried as seldom as can be, and a right one as soon as it is there.
func TestAWrongPINLocksNoPartition(t *testing.T) {
	s := newSite(t)
	bad := on("bad", lunasim.New(t, lunasim.Options{}))
	bad.pin = "7342-wrong"
	s.members = []member{on("good", lunasim.New(t, lunasim.Options{})), bad}
	s.group["min_copies"] = 1
	s.serve()
	m := s.await("bad", "failed", failed)
	shows(t, s, m, "CKR_PIN_INCORRECT", []string{"PIN"})
	for range 5 {
		_ = s.c.Recover(t.Context(), "default", "bad") // in vain
	}
	s.server.Kill()
	s.serve() // which has to find out once more
	s.await("bad", "failed", failed)
	if n := bad.partition.FailedLogins(); n < 1 || n > 2 {
		t.Errorf("%d wrong PINs were tried, want 1 for each start of kmsd", n)
	}
	s.create("shop", "")

	bad.pin = bad.partition.PIN
	s.writePIN(bad)
	if err := s.c.Recover(t.Context(), "default", "bad"); err != nil {
		t.Errorf("recovering with the right PIN: %v", err)
	}
	s.awaitWhole()
	if n := bad.partition.FailedLogins(); n != 0 {
		t.Errorf("%d wrong PINs are counted after a right one", n)
	}
	s.sameKeys(1)
	log, err := os.ReadFile(s.server.Log)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range []string{"7342-wrong", bad.partition.PIN} {
		if strings.Contains(string(log), pin) {
			t.Error("a PIN is in the log")
		}
	}
}

// What there is to know of a partition is in the status: what may become trouble as a
// warning, which goes when it is mended.
func TestWarningsComeAndGo(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{Policies: map[int]int{23: 0}, Without: []string{"CA_MigrationStartSessionNegotiation"}})
	s.create("shop", "") // by CPv3, which is left
	s.sameKeys(1)
	facts := s.now("hsm-b").Token.Facts
	for _, want := range []struct{ fact, text string }{{"activation", "policy 23"}, {"lacks", "CA_MigrationStartSessionNegotiation"}, {"cloning", "cpv3"}} {
		if !said(facts, want.fact, want.text) {
			t.Errorf("%+v does not say %q", facts, want.text)
		}
	}
	if status, _, _ := s.cli("status"); !strings.Contains(flat(status), "policy 23") {
		t.Errorf("status does not warn of the activation:\n%s", status)
	}

	for i := range 20 {
		s.create(fmt.Sprintf("key-%d", i), "")
	}
	partition := s.members[1].partition
	const room = 1 << 20
	partition.Set("limit_bytes", fmt.Sprint(room))
	var objects, free int
	s.factsAre(func(facts []api.Fact) bool {
		_, err := fmt.Sscanf(valueOf(facts, "storage"), "%d objects, %d of 1048576 bytes free", &objects, &free)
		return err == nil
	})
	used := room - free
	partition.Set("limit_bytes", fmt.Sprint(used+used/11)) // a twelfth of it is free
	const full = "make the partition larger"
	s.factsAre(func(facts []api.Fact) bool { return said(facts, "storage", full) })
	if status, _, _ := s.cli("status"); !strings.Contains(flat(status), full) {
		t.Errorf("status does not warn of a partition that is nearly full:\n%s", status)
	}
	partition.Set("limit_bytes", "0")
	s.factsAre(func(facts []api.Fact) bool { return valueOf(facts, "storage") != "" && !said(facts, "storage", full) })
}

// factsAre waits until hsm-b tells of itself what it should. A group check asks anew, and
// with nothing but warnings finds all well.
func (s *site) factsAre(ok func([]api.Fact) bool) {
	s.t.Helper()
	if out, _, code := s.cli("group", "check"); code != 0 {
		s.t.Errorf("group check ends with %d:\n%s", code, out)
	}
	s.await("hsm-b", "telling what it should", func(m api.Member) bool { return ok(m.Token.Facts) })
}

func valueOf(facts []api.Fact, name string) string {
	for _, f := range facts {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// When a partition is full a key that is made says so; what is there goes on.
func TestAFullPartitionRefusesNewKeysOnly(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{})
	s.create("shop", "")
	full := s.members[1].partition
	full.Set("limit_objects", "1")
	_, err := s.c.CreateMasterKey(t.Context(), "one-more", api.KeyOptions{})
	e := api.AsError(err)
	if err == nil || !strings.Contains(e.Message, "CKR_CONTAINER_OBJECT_STORAGE_FULL") || !strings.Contains(e.Message, "hsm-b") {
		t.Errorf("creating a key on a full partition: %+v", e)
	}
	s.works("shop")
	full.Set("limit_objects", "0")
	s.create("again", "")
	s.awaitWhole()
	s.sameKeys(2)
}
