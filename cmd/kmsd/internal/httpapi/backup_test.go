package httpapi_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/client"
)

// backups is a Memory whose backups are f's.
type backups struct {
	*apitest.Memory
	f func(ctx context.Context, w io.Writer) (api.BackupReport, error)
}

func (b backups) Backup(ctx context.Context, w io.Writer, _ []string) (api.BackupReport, error) {
	return b.f(ctx, w)
}

func startBackups(t *testing.T, f func(ctx context.Context, w io.Writer) (api.BackupReport, error)) *kmsd {
	t.Helper()
	m := new(apitest.Memory)
	return start(t, m, func(c *httpapi.Config) { c.Service = backups{m, f} })
}

var recipients = []string{"age1reader", "AGE-SECRET-KEY-1"}

func TestABackupArrivesWhole(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	k := startBackups(t, func(_ context.Context, w io.Writer) (api.BackupReport, error) {
		for b := content; len(b) > 0; b = b[1<<14:] {
			if _, err := w.Write(b[:1<<14]); err != nil {
				return api.BackupReport{}, err
			}
		}
		return api.BackupReport{Keys: 1, Versions: 2, Databases: 3, NamedKeys: 4}, nil
	})
	var got bytes.Buffer
	report, err := k.client(t, nil).Backup(t.Context(), &got, recipients)
	if err != nil || report != (api.BackupReport{Keys: 1, Versions: 2, Databases: 3, NamedKeys: 4}) || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("%d bytes, %+v, %v", got.Len(), report, err)
	}
	records := k.audit.take()
	if len(records) != 2 || records[0].Operation != "begin" || records[1].Operation != "end" || records[1].Outcome != "ok" ||
		records[1].Spec != "recipients=age1reader,(not recorded)" || records[0].RequestID != records[1].RequestID {
		t.Errorf("recorded %+v", records)
	}
}

// A part of a backup is never taken for one.
func TestABackupThatBreaksOff(t *testing.T) {
	for name, fails := range map[string]func() (api.BackupReport, error){
		"an error": func() (api.BackupReport, error) {
			return api.BackupReport{}, api.NewError(api.CodeGroupLost, "the group is lost", nil)
		},
		"a panic": func() (api.BackupReport, error) { panic("a bug") },
	} {
		t.Run(name, func(t *testing.T) {
			k := startBackups(t, func(_ context.Context, w io.Writer) (api.BackupReport, error) {
				if _, err := w.Write(make([]byte, 100_000)); err != nil {
					t.Error(err)
				}
				return fails()
			})
			var got bytes.Buffer
			_, err := k.client(t, nil).Backup(t.Context(), &got, recipients)
			var e *api.Error
			if !errors.As(err, &e) || e.Code != api.CodeUnavailable || !strings.Contains(e.Hint, "not a backup") {
				t.Errorf("%d bytes and %#v", got.Len(), err)
			}
			if r := k.audit.take(); len(r) != 2 || r[0].Operation != "begin" || r[1].Operation != "end" || r[1].Outcome == "ok" {
				t.Errorf("recorded %+v", r)
			}
		})
	}
}

// Before the first byte an error is answered like any other.
func TestABackupThatDoesNotBegin(t *testing.T) {
	k := startBackups(t, func(context.Context, io.Writer) (api.BackupReport, error) {
		return api.BackupReport{}, api.NewError(api.CodeBadRequest, "no recipient", nil)
	})
	var got bytes.Buffer
	_, err := k.client(t, nil).Backup(t.Context(), &got, nil)
	if !errors.Is(err, api.ErrBadRequest) || err.Error() != "no recipient" || got.Len() != 0 {
		t.Errorf("%q, %v", &got, err)
	}
	if r := k.audit.take(); len(r) != 1 || r[0].Outcome != "bad_request" {
		t.Errorf("recorded %+v", r)
	}
}

// What cannot be written down is not released, and what was not written down at its end
// is not whole.
func TestABackupIsAudited(t *testing.T) {
	var k *kmsd
	k = startBackups(t, func(_ context.Context, w io.Writer) (api.BackupReport, error) {
		if _, err := w.Write(make([]byte, 100_000)); err != nil {
			return api.BackupReport{}, err
		}
		k.audit.setBroken(true) // in the middle
		return api.BackupReport{}, nil
	})
	c := k.client(t, nil)
	if _, err := c.Backup(t.Context(), io.Discard, recipients); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("a backup whose end is not written down: %v", err)
	}
	var got bytes.Buffer
	if _, err := c.Backup(t.Context(), &got, recipients); !errors.Is(err, api.ErrInternal) || got.Len() != 0 {
		t.Errorf("a backup whose beginning is not written down: %d bytes, %v", got.Len(), err)
	}
}

// full is a disk without room.
type full struct{ after int }

func (f *full) Write(b []byte) (int, error) {
	if f.after -= len(b); f.after < 0 {
		return 0, errors.New("no space left on device")
	}
	return len(b), nil
}

// Whoever cannot take a backup hears why, and kmsd writes down that it did not go through.
func TestABackupThatIsNotTaken(t *testing.T) {
	ended := make(chan error, 1)
	k := startBackups(t, func(_ context.Context, w io.Writer) (api.BackupReport, error) {
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return api.BackupReport{}, api.NewError(api.CodeInternal, "writing the backup", err)
			}
		}
	})
	_, err := k.client(t, nil).Backup(t.Context(), &full{after: 1 << 20}, recipients)
	if err == nil || err.Error() != "writing what kmsd has sent: no space left on device" {
		t.Errorf("got %v", err)
	}
	<-ended
	if err := k.server.Shutdown(t.Context()); err != nil { // when the record is written
		t.Fatal(err)
	}
	if r := k.audit.take(); len(r) != 2 || r[1].Outcome != "unavailable" {
		t.Errorf("recorded %+v", r)
	}
}

// A backup has no end but that of kmsd.
func TestAShutdownEndsABackup(t *testing.T) {
	begun := make(chan struct{})
	k := startBackups(t, func(ctx context.Context, w io.Writer) (api.BackupReport, error) {
		_, limited := ctx.Deadline()
		if _, err := w.Write([]byte("beginning")); err != nil || limited && ctx.Err() != nil {
			t.Error(err, limited)
		}
		close(begun)
		<-ctx.Done()
		return api.BackupReport{}, ctx.Err()
	})
	done := make(chan error, 1)
	c := k.client(t, func(o *client.Options) { o.Attempts = 1 })
	go func() { _, err := c.Backup(t.Context(), io.Discard, recipients); done <- err }()
	<-begun
	if err := k.server.Shutdown(t.Context()); err != nil {
		t.Errorf("shutting down: %v", err)
	}
	if err := <-done; !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("the client hears %v", err)
	}
}

// A trailer makes a backup whole over HTTP/2 too.
func TestABackupOverHTTP2(t *testing.T) {
	k := startBackups(t, func(_ context.Context, w io.Writer) (api.BackupReport, error) {
		_, err := io.WriteString(w, "all")
		return api.BackupReport{Keys: 1}, err
	})
	transport := k.http.Transport.(*http.Transport)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP2(true)
	req, err := http.NewRequestWithContext(t.Context(), "POST", k.addr+"/v1/backup", strings.NewReader(`{"recipients":["age1x"]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	resp, err := k.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if got := resp.Trailer.Get(api.BackupReportHeader); err != nil || resp.ProtoMajor != 2 || string(b) != "all" ||
		got != `{"keys":1,"versions":0,"databases":0,"named_keys":0}` {
		t.Errorf("%s %q, trailer %q, %v", resp.Proto, b, got, err)
	}
}
