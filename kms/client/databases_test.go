package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// databases are the calls about databases, each with what it puts on the wire.
func databases() []wire {
	two := 2
	named := func(id string) func(context.Context, *client.Client) error {
		return func(ctx context.Context, c *client.Client) error { _, err := c.NamedKey(ctx, "erp", id, 0); return err }
	}
	version := func(change api.VersionChange) func(context.Context, *client.Client) error {
		return func(ctx context.Context, c *client.Client) error {
			_, err := c.ChangeVersion(ctx, "shop", 3, change)
			return err
		}
	}
	return []wire{
		{"make a database", "POST", "/v1/databases", `{"name":"erp"}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.CreateDatabase(ctx, "erp", api.DatabaseOptions{})
			return err
		}},
		{"make one with choices", "POST", "/v1/databases", `{"name":"erp","key":"master","group":"g","type":"aes-128"}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.CreateDatabase(ctx, "erp", api.DatabaseOptions{Key: "master", KeyOptions: api.KeyOptions{Group: "g", Type: "aes-128"}})
			return err
		}},
		{"show a database", "GET", "/v1/databases/erp", "", func(ctx context.Context, c *client.Client) error { _, err := c.Database(ctx, "erp"); return err }},
		{"list databases", "GET", "/v1/databases?after=b&limit=5&prefix=a", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.Databases(ctx, api.ListOptions{Prefix: "a", After: "b", Limit: 5})
			return err
		}},
		{"put", "PUT", "/v1/databases/erp/keys/1", `{"plaintext":"cA==","object":true,"cas":2}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.PutNamedKey(ctx, "erp", "1", api.NamedKeyPut{Plaintext: []byte("p"), Object: true, CAS: &two})
			return err
		}},
		{"put what is empty", "PUT", "/v1/databases/erp/keys/1", `{"plaintext":""}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.PutNamedKey(ctx, "erp", "1", api.NamedKeyPut{Plaintext: []byte{}})
			return err
		}},
		{"let an HSM make it", "PUT", "/v1/databases/erp/keys/1", `{"bytes":16}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.PutNamedKey(ctx, "erp", "1", api.NamedKeyPut{Bytes: 16})
			return err
		}},
		{"rotate", "POST", "/v1/databases/erp/keys/a%2Fb/rotate", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.RotateNamedKey(ctx, "erp", "a/b")
			return err
		}},
		{"get", "GET", "/v1/databases/erp/keys/1", "", named("1")},
		{"get a step in a path", "GET", "/v1/databases/erp/keys/%2E%2E", "", named("..")},
		{"get another", "GET", "/v1/databases/erp/keys/%2E", "", named(".")},
		{"get three dots", "GET", "/v1/databases/erp/keys/...", "", named("...")},
		{"get a slash", "GET", "/v1/databases/erp/keys/%2F", "", named("/")},
		{"get any bytes", "GET", "/v1/databases/erp/keys/%00%FF%3F%23%25+%20", "", named("\x00\xff?#%+ ")},
		{"describe", "GET", "/v1/databases/erp/keys/1/metadata", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.DescribeNamedKey(ctx, "erp", "1")
			return err
		}},
		{"list data keys", "GET", "/v1/databases/erp/keys?after=bmV4dA&prefix=%FF%2F", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.NamedKeys(ctx, "erp", api.ListOptions{Prefix: "\xff/", After: "bmV4dA"})
			return err
		}},
		{"delete", "DELETE", "/v1/databases/erp/keys/1", "", func(ctx context.Context, c *client.Client) error { return c.DeleteNamedKey(ctx, "erp", "1") }},
		{"rekey", "POST", "/v1/databases/erp/rekey", `{"allow_degraded":true,"retire":"disable"}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.Rekey(ctx, "erp", api.RekeyOptions{AllowDegraded: true, Retire: api.RetireDisable})
			return err
		}},
		{"show a job", "GET", "/v1/jobs/a%2Fb", "", func(ctx context.Context, c *client.Client) error { _, err := c.Job(ctx, "a/b"); return err }},
		{"disable a version", "POST", "/v1/keys/shop/disable?version=3", "", version(api.VersionChange{Action: api.ActionDisable})},
		{"enable a version", "POST", "/v1/keys/shop/enable?version=3", "", version(api.VersionChange{Action: api.ActionEnable})},
		{"restore a version", "POST", "/v1/keys/shop/restore?version=3", "", version(api.VersionChange{Action: api.ActionRestore})},
		{"destroy a version", "DELETE", "/v1/keys/shop?version=3&window=1h0m0s", "", version(api.VersionChange{Action: api.ActionDestroy, Window: time.Hour})},
		{"destroy a version later", "DELETE", "/v1/keys/shop?version=3", "", version(api.VersionChange{Action: api.ActionDestroy, Window: -1})},
	}
}

func TestDatabasesOnTheWire(t *testing.T) {
	var got string
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = r.Method + " " + r.RequestURI + " " + string(body)
		fmt.Fprint(w, `{"version":1,"plaintext":"cA=="}`)
	})
	for _, ask := range databases() {
		if err := ask.call(t.Context(), c); err != nil {
			t.Errorf("%s: %v", ask.name, err)
		}
		if want := ask.method + " " + ask.path + " " + ask.body; got != want {
			t.Errorf("%s: asked %s, want %s", ask.name, got, want)
		}
	}
}

// A second attempt at what changes something could make another version.
func TestOnlyReadingIsRepeated(t *testing.T) {
	var asked atomic.Int32
	c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		fail(w, 503, api.CodeGroupLost, true)
	})
	for _, ask := range databases() {
		want := int32(1)
		if ask.method == http.MethodGet {
			want = 4
		}
		asked.Store(0)
		if err := ask.call(t.Context(), c); !errors.Is(err, api.ErrGroupLost) || asked.Load() != want {
			t.Errorf("%s: asked %d times, want %d; %v", ask.name, asked.Load(), want, err)
		}
	}
}

// What makes no path is refused before anybody is asked.
func TestNamesAndIDsThatMakeNoPath(t *testing.T) {
	c, _ := serve(t, nil, func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked for %s", r.URL) })
	ctx := t.Context()
	calls := map[string]func(database, id string) error{
		"put":      func(db, id string) error { _, err := c.PutNamedKey(ctx, db, id, api.NamedKeyPut{}); return err },
		"rotate":   func(db, id string) error { _, err := c.RotateNamedKey(ctx, db, id); return err },
		"get":      func(db, id string) error { _, err := c.NamedKey(ctx, db, id, 1); return err },
		"describe": func(db, id string) error { _, err := c.DescribeNamedKey(ctx, db, id); return err },
		"delete":   func(db, id string) error { return c.DeleteNamedKey(ctx, db, id) },
	}
	for name, call := range calls {
		for _, bad := range [][2]string{{"erp", ""}, {"erp", strings.Repeat("x", 256)}, {"", "1"}, {"..", "1"}, {"a/b", "1"}} {
			if err := call(bad[0], bad[1]); !errors.Is(err, api.ErrBadRequest) {
				t.Errorf("%s of %.10q in %q: %v", name, bad[1], bad[0], err)
			}
		}
	}
	for _, id := range []string{"", ".", ".."} {
		if _, err := c.Job(ctx, id); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("job %q: %v", id, err)
		}
	}
	// Without a version it would be done to all of them.
	for _, change := range []api.VersionChange{{Action: api.ActionDestroy}, {Action: api.ActionDisable}} {
		if _, err := c.ChangeVersion(ctx, "shop", 0, change); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("%s of version 0: %v", change.Action, err)
		}
	}
	if _, err := c.ChangeVersion(ctx, "shop", 1, api.VersionChange{Action: "wrap"}); !errors.Is(err, api.ErrBadRequest) {
		t.Errorf("an unknown change: %v", err)
	}
}

// A database that is given no key, or another one than it asked for, would lose its data.
func TestADataKeyIsTheOneAskedFor(t *testing.T) {
	for _, body := range []string{`{}`, `null`, `{"version":1}`, `{"version":1,"plaintext":""}`, `{"plaintext":"cA=="}`, `{"version":3,"plaintext":"cA=="}`} {
		c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) })
		if k, err := c.NamedKey(t.Context(), "erp", "1", 2); !errors.Is(err, api.ErrInternal) || k.Plaintext != nil {
			t.Errorf("%s became %+v, %v", body, k, err)
		}
	}
}

// A backup is whole when the trailer says so, and never else.
func TestABackupIsWholeOrAnError(t *testing.T) {
	const report = `{"keys":1,"versions":2,"databases":3,"named_keys":4}`
	for _, c := range []struct {
		name   string
		answer func(w http.ResponseWriter)
		err    error
		says   string
	}{
		{"a trailer", func(w http.ResponseWriter) { w.Header().Set(api.BackupReportHeader, report) }, nil, ""},
		{"no trailer", func(http.ResponseWriter) {}, api.ErrInternal, "without its end"},
		{"a trailer that is none", func(w http.ResponseWriter) { w.Header().Set(api.BackupReportHeader, "all") }, api.ErrInternal, "without its end"},
		{"a connection that breaks", func(w http.ResponseWriter) { flush(w); panic(http.ErrAbortHandler) }, api.ErrUnavailable, "asking kmsd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			cl, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				if body, _ := io.ReadAll(r.Body); string(body) != `{"recipients":["age1x"]}` || r.Header.Get(api.TimeoutHeader) != "" {
					t.Errorf("asked with %q, timeout %q", body, r.Header.Get(api.TimeoutHeader))
				}
				w.Header().Set("Trailer", api.BackupReportHeader)
				io.WriteString(w, "some of it")
				c.answer(w)
			})
			var got bytes.Buffer
			r, err := cl.Backup(t.Context(), &got, []string{"age1x"})
			if c.err == nil {
				if err != nil || r != (api.BackupReport{Keys: 1, Versions: 2, Databases: 3, NamedKeys: 4}) || got.String() != "some of it" {
					t.Errorf("%+v, %q, %v", r, &got, err)
				}
				return
			}
			if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.says) || r != (api.BackupReport{}) || asked.Load() != 1 {
				t.Errorf("%+v, %v after %d requests", r, err, asked.Load())
			}
		})
	}
}
