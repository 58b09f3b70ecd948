package kms_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"filippo.io/age"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/backup"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// exporting makes the members of a rig such that their keys can be put in a file.
func exporting(r *rig) *rig {
	for i, h := range r.hsms {
		r.group.Members[i].Open = func(context.Context) (pluginproto.Driver, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.absent != nil {
				return nil, h.absent
			}
			h.current = memdriver.New(memdriver.Options{Token: h.token, OneStepClones: true})
			for _, f := range h.faults {
				h.current.Script(f)
			}
			return &stepped{Driver: h.current, h: h}, nil
		}
	}
	return r
}

func newIdentity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// fileOf is a backup in memory.
func fileOf(b []byte, id age.Identity) kms.BackupFile {
	return kms.BackupFile{
		Open:       func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
		Identities: []age.Identity{id},
	}
}

// backedUp makes a backup that must succeed.
func (r *rig) backedUp(id *age.X25519Identity) []byte {
	r.t.Helper()
	var b bytes.Buffer
	if _, err := r.Backup(r.t.Context(), &b, []string{id.Recipient().String()}); err != nil {
		r.t.Fatal(err)
	}
	return b.Bytes()
}

// restored brings a backup to the tokens of a rig that has not started, and starts it.
func (r *rig) restored(file kms.BackupFile) kms.RestoreReport {
	r.t.Helper()
	report, err := r.restore(file)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mustStart()
	return report
}

func (r *rig) restore(file kms.BackupFile) (kms.RestoreReport, error) {
	return kms.Restore(r.t.Context(), kms.Config{Catalog: r.disk.Reopen(), Groups: []kms.GroupConfig{r.group}}, file)
}

// small fills a rig with a key of each kind of fate, and returns what was wrapped.
func small(r *rig) map[string][][]byte {
	r.t.Helper()
	wrapped := map[string][][]byte{}
	for _, name := range []string{"rotated", "disabled", "scheduled", "destroyed", "shop"} {
		r.create(name)
		wrapped[name] = append(wrapped[name], r.wrap(name))
	}
	ctx := r.t.Context()
	must := func(_ any, err error) {
		r.t.Helper()
		if err != nil {
			r.t.Fatal(err)
		}
	}
	must(r.Rotate(ctx, "rotated"))
	wrapped["rotated"] = append(wrapped["rotated"], r.wrap("rotated"))
	must(r.Disable(ctx, "disabled"))
	must(r.Destroy(ctx, "scheduled", 24*time.Hour))
	must(r.Destroy(ctx, "destroyed", 0))
	must(r.CreateMasterKey(ctx, "pair", kms.KeyOptions{Type: "ec-p256"}))
	must(r.CreateMasterKey(ctx, "mac", kms.KeyOptions{Type: "hmac-sha256"}))
	return wrapped
}

func TestBackupRestoresToEmptyTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 3)).mustStart()
		wrapped := small(old)
		mac, err := old.MAC(t.Context(), "mac", kms.MACRequest{Message: []byte("message")})
		if err != nil {
			t.Fatal(err)
		}
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 3))
		next.group.Members[2].Standby = true
		report := next.restored(fileOf(file, id))
		defer next.stop()
		if report.Versions != 7 || report.Keys != 7 || len(report.Members) != 3 {
			t.Errorf("report %+v", report)
		}
		for _, m := range report.Members {
			if m.Keys != 7 || m.Error != "" {
				t.Errorf("member %+v", m)
			}
		}
		next.wantStates(api.MemberActive, api.MemberActive, api.MemberStandby)
		next.wantConsistent()
		for _, name := range []string{"rotated", "shop"} {
			for _, w := range wrapped[name] {
				next.wantUnwrap(name, w)
			}
			next.wantVerified(name)
		}
		for _, name := range []string{"disabled", "scheduled", "destroyed"} {
			if _, err := next.Unwrap(t.Context(), name, wrapped[name][0], []byte("aad")); !errors.Is(err, kms.ErrState) {
				t.Errorf("%s: %v, want ErrState", name, err)
			}
		}
		if _, err := next.Enable(t.Context(), "disabled"); err != nil {
			t.Fatal(err)
		}
		next.wantUnwrap("disabled", wrapped["disabled"][0])
		if got, err := next.MAC(t.Context(), "mac", kms.MACRequest{Message: []byte("message")}); err != nil || !bytes.Equal(got.MAC, mac.MAC) {
			t.Errorf("another MAC: %v", err)
		}
		next.create("new")
		next.wantConsistent()
	})
}

func TestRestoreIsRefusedBeforeItChangesAnything(t *testing.T) {
	id := newIdentity(t)
	var file []byte
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 2)).mustStart()
		small(old)
		file = old.backedUp(id)
		old.stop()
	})

	for _, c := range []struct {
		name  string
		alter func(*rig)
		file  kms.BackupFile
		is    error
		says  string
	}{
		{"a file that is cut", nil, fileOf(file[:len(file)-1], id), backup.ErrDamaged, "no whole backup"},
		{"an identity of another", nil, fileOf(file, newIdentity(t)), backup.ErrIdentity, "other recipients"},
		{"another domain", func(r *rig) {
			r.group.Domain = func(context.Context) ([]byte, error) { return bytes.Repeat([]byte{8}, 32), nil }
		}, fileOf(file, id), kms.ErrState, "the backup was made under"},
		{"too few members", func(r *rig) { r.hsms[1].leave() }, fileOf(file, id), kms.ErrInsufficientCopies, "1 of 2 members there and needs 2 (min_copies): hsm-b"},
		{"no member", func(r *rig) { r.hsms[0].leave(); r.hsms[1].leave() }, fileOf(file, id), kms.ErrGroupLost, "hsm-a"},
		{"another group", func(r *rig) { r.group.Name = "other" }, fileOf(file, id), kms.ErrBadRequest, "not configured"},
		{"one token for two", func(r *rig) { r.group.Members[1].Open = r.group.Members[0].Open }, fileOf(file, id), kms.ErrBadRequest, "same token"},
		{"a group without members", func(r *rig) { r.group.Members = nil; r.group.MinCopies = 1 }, fileOf(file, id), kms.ErrBadRequest, "min_copies"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				next := exporting(newRig(t, 2))
				if c.alter != nil {
					c.alter(next)
				}
				_, err := next.restore(c.file)
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("error %v, want %v and %q", err, c.is, c.says)
				}
				for _, h := range next.hsms {
					if n := len(h.token.Keys()); n > 0 {
						t.Errorf("%s has %d keys", h.name, n)
					}
				}
				if rev, err := next.disk.Reopen().Rev(t.Context()); err != nil || rev != 0 {
					t.Errorf("the catalog is at %d, %v", rev, err)
				}
			})
		})
	}
}

func TestRestoreIsRunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 2)).mustStart()
		wrapped := small(old)
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 2))
		lost := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "cloning"}
		next.hsms[1].faults = []memdriver.Fault{{Call: memdriver.CallCloneStep, Times: 1}, {Call: memdriver.CallCloneStep, Times: 2}, {Call: memdriver.CallCloneStep, Err: lost}}
		_, err := next.restore(fileOf(file, id))
		if !errors.Is(err, kms.ErrInsufficientCopies) || !strings.Contains(err.Error(), "hsm-b") {
			t.Fatalf("error %v", err)
		}
		if len(next.hsms[0].token.Keys()) != 7 {
			t.Errorf("hsm-a has %d keys", len(next.hsms[0].token.Keys()))
		}
		next.hsms[1].faults = nil
		next.disk = catalogtest.NewMemory()
		next.restored(fileOf(file, id))
		defer next.stop()
		next.wantConsistent()
		next.wantUnwrap("shop", wrapped["shop"][0])
	})
}

func TestRestoreDoesWithoutAMemberThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 3)).mustStart()
		wrapped := small(old)
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 3))
		full := pluginproto.Errorf(pluginproto.ClassCaller, "cloning", "the token is full")
		next.hsms[0].faults = []memdriver.Fault{{Call: memdriver.CallCloneStep, Times: 3}, {Call: memdriver.CallCloneStep, Err: full}}
		report, err := next.restore(fileOf(file, id))
		if err != nil {
			t.Fatal(err)
		}
		if m := report.Members[0]; m.Keys != 2 || !strings.Contains(m.Error, "full") {
			t.Errorf("member %+v", m)
		}
		next.hsms[0].faults = nil
		next.mustStart()
		defer next.stop()
		next.wantConsistent() // it is brought in step as any other
		next.wantUnwrap("shop", wrapped["shop"][0])
	})
}

func TestRestoreDoesWithoutAMemberThatIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 3)).mustStart()
		wrapped := small(old)
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 3))
		calls := 0
		next.hsms[1].step = func(h *hsm) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if calls++; calls == 9 { // the proof and three keys are two calls each
				h.current.Crash()
			}
		}
		report, err := next.restore(fileOf(file, id))
		if err != nil {
			t.Fatal(err)
		}
		if m := report.Members[1]; m.Keys == 7 || !strings.Contains(m.Error, "hsm-b") {
			t.Errorf("member %+v", m)
		}
		next.mustStart()
		defer next.stop()
		next.wantConsistent()
		next.wantUnwrap("shop", wrapped["shop"][0])
	})
}

func TestAKeyInTheWayIsNotOverwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 2)).mustStart()
		old.create("shop")
		id := newIdentity(t)
		file := old.backedUp(id)
		ids := old.hsms[0].token.Keys()
		old.stop()

		next := exporting(newRig(t, 2))
		d := memdriver.New(memdriver.Options{Token: next.hsms[1].token})
		if _, err := d.Open(t.Context(), pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, 32)}); err != nil {
			t.Fatal(err)
		}
		there, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: ids[0], Type: pluginproto.AES256})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := next.restore(fileOf(file, id)); !errors.Is(err, kms.ErrInsufficientCopies) {
			t.Errorf("error %v", err)
		}
		if o, err := d.Inspect(t.Context(), ids[0]); err != nil || !bytes.Equal(o.CheckValue, there.CheckValue) {
			t.Errorf("the key that was in the way: %+v, %v", o, err)
		}
	})
}

func TestBackupMovesOnWhenAMemberDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := exporting(newRig(t, 2)).mustStart()
		defer r.stop()
		small(r)
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Times: 1, Err: &pluginproto.Error{
			Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "cloning",
		}})
		id := newIdentity(t)
		if _, err := backup.Verify(bytes.NewReader(r.backedUp(id)), id); err != nil {
			t.Error(err)
		}
	})
}

func TestBackupNamesTheMemberWhoseKeysStayOnTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		var b bytes.Buffer
		_, err := r.Backup(t.Context(), &b, []string{newIdentity(t).Recipient().String()})
		wantError(t, err, kms.ErrState, "go from token to token only and cannot be put in a file: it clones by memory, which needs both tokens")
		if e := (*api.Error)(nil); !errors.As(err, &e) || !strings.HasPrefix(e.Member, "hsm-") {
			t.Errorf("error %+v names no member", e)
		}
		if b.Len() > 0 {
			t.Errorf("%d bytes are written, after which nobody can be told why", b.Len())
		}
	})
}

func TestBackupRefusesRecipientsThatAreNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := exporting(newRig(t, 1)).mustStart()
		defer r.stop()
		for _, recipients := range [][]string{nil, {"age1nobody"}, {newIdentity(t).String()}} {
			var b bytes.Buffer
			_, err := r.Backup(t.Context(), &b, recipients)
			wantError(t, err, kms.ErrBadRequest, "making a backup")
			if b.Len() > 0 {
				t.Errorf("%d bytes are written", b.Len())
			}
		}
	})
}

func TestADestructionMeanwhileSpoilsABackup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := exporting(newRig(t, 1)).mustStart()
		defer r.stop()
		for i := range 20 {
			r.create(fmt.Sprintf("key-%02d", i))
		}
		hold := make(chan struct{})
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Hang: hold})
		var b bytes.Buffer
		id := newIdentity(t)
		made := make(chan error)
		go func() {
			_, err := r.Backup(t.Context(), &b, []string{id.Recipient().String()})
			made <- err
		}()
		synctest.Wait() // the records are written, and the first keys are being given away
		if _, err := r.Destroy(t.Context(), "key-19", 0); err != nil {
			t.Error(err)
		}
		r.hsms[0].driver().Clear()
		close(hold)
		wantError(t, <-made, kms.ErrUnavailable, "make it again")
		if _, err := backup.Verify(bytes.NewReader(b.Bytes()), id); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("what was written is a backup: %v", err)
		}
		r.backedUp(id)
	})
}

func TestProvingABackupLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := exporting(newRig(t, 2)).mustStart()
		small(old)
		id := newIdentity(t)
		file := old.backedUp(id)
		old.stop()

		next := exporting(newRig(t, 2))
		next.hsms[1].leave() // one of the group is enough
		told := 0
		f := fileOf(file, id)
		var mu sync.Mutex // guards told
		f.Progress = func(done, total int) {
			mu.Lock()
			defer mu.Unlock()
			told = max(told, done)
		}
		cfg := kms.Config{Groups: []kms.GroupConfig{next.group}}
		contents, err := kms.ProveBackup(t.Context(), cfg, f)
		if err != nil || contents.Versions != 7 || told != 7 {
			t.Errorf("%+v, told of %d, %v", contents, told, err)
		}
		if n := len(next.hsms[0].token.Keys()); n > 0 {
			t.Errorf("%d keys are left behind", n)
		}
		cfg.Groups[0].Domain = func(context.Context) ([]byte, error) { return bytes.Repeat([]byte{8}, 32), nil }
		if _, err := kms.ProveBackup(t.Context(), cfg, f); !errors.Is(err, kms.ErrState) {
			t.Errorf("of another domain: %v", err)
		}
	})
}

// firstWrite is a file to which something happens when it is first written to.
type firstWrite struct {
	bytes.Buffer
	once    sync.Once
	happens func()
}

func (w *firstWrite) Write(p []byte) (int, error) {
	w.once.Do(w.happens)
	return w.Buffer.Write(p)
}

// Its header says which groups have keys, before the keys are read.
func TestABackupMayMissTheFirstKeyOfAGroupThatIsMadeMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := exporting(newRig(t, 1)).mustStart()
		defer r.stop()
		id := newIdentity(t)
		file := &firstWrite{happens: func() {
			r.create("key")
			if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
				t.Error(err)
			}
			r.put("shop", "0")
		}}
		if _, err := r.Backup(t.Context(), file, []string{id.Recipient().String()}); err != nil {
			t.Fatal(err)
		}
		if _, err := backup.Verify(bytes.NewReader(file.Bytes()), id); err != nil {
			t.Error(err)
		}
		var all bytes.Buffer
		report, err := r.Backup(t.Context(), &all, []string{id.Recipient().String()})
		if err != nil || report.Keys != 2 || report.Databases != 1 {
			t.Errorf("the next backup has %+v, %v", report, err)
		}
	})
}
