package client_test

import (
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

// wire is a call of the client, and what it puts on the wire.
type wire struct {
	name, method, path, body string
	call                     func(context.Context, *client.Client) error
}

func administration() []wire {
	spec := api.MemberSpec{Name: "hsm-b", Driver: "softhsm", PIN: api.PINSource{File: "/b.pin"}}
	const specBody = `{"name":"hsm-b","driver":"softhsm","pin":{"file":"/b.pin"}}`
	return []wire{
		{"recover", "POST", "/v1/groups/g/members/a%2Fb/recover", "", func(ctx context.Context, c *client.Client) error { return c.Recover(ctx, "g", "a/b") }},
		{"add", "POST", "/v1/groups/g/members", specBody, func(ctx context.Context, c *client.Client) error { _, err := c.AddMember(ctx, "g", spec); return err }},
		{"remove", "DELETE", "/v1/groups/g/members/m", "", func(ctx context.Context, c *client.Client) error { return c.RemoveMember(ctx, "g", "m", false) }},
		{"remove by force", "DELETE", "/v1/groups/g/members/m?force=true", "", func(ctx context.Context, c *client.Client) error { return c.RemoveMember(ctx, "g", "m", true) }},
		{"replace", "POST", "/v1/groups/g/members/m/replace", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.ReplaceMember(ctx, "g", "m", nil)
			return err
		}},
		{"replace with another", "POST", "/v1/groups/g/members/hsm-b/replace", specBody, func(ctx context.Context, c *client.Client) error {
			_, err := c.ReplaceMember(ctx, "g", "hsm-b", &spec)
			return err
		}},
		{"set a role", "PATCH", "/v1/groups/g/members/m", `{"role":"standby"}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.SetRole(ctx, "g", "m", api.RoleStandby, false)
			return err
		}},
		{"drain by force", "POST", "/v1/groups/g/members/m/drain?force=true", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.Drain(ctx, "g", "m", true)
			return err
		}},
		{"sync", "POST", "/v1/groups/g/sync", `{"adopt":true}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.Sync(ctx, "g", api.SyncOptions{Adopt: true})
			return err
		}},
		{"reinitialize", "POST", "/v1/groups/g/reinitialize", "", func(ctx context.Context, c *client.Client) error {
			_, err := c.Reinitialize(ctx, "g")
			return err
		}},
		{"check", "POST", "/v1/groups/g/check", "", func(ctx context.Context, c *client.Client) error { _, err := c.Check(ctx, "g"); return err }},
		{"log", "GET", "/v1/log", "", func(ctx context.Context, c *client.Client) error { _, err := c.Log(ctx, 0); return err }},
		{"the end of the log", "GET", "/v1/log?last=7", "", func(ctx context.Context, c *client.Client) error { _, err := c.Log(ctx, 7); return err }},
		{"rotate with few copies", "POST", "/v1/keys/shop/rotate", `{"allow_degraded":true}`, func(ctx context.Context, c *client.Client) error {
			_, err := c.RotateWith(ctx, "shop", api.RotateOptions{AllowDegraded: true})
			return err
		}},
	}
}

func TestAdministrationOnTheWire(t *testing.T) {
	var got string
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = r.Method + " " + r.URL.RequestURI() + " " + string(body)
		fmt.Fprint(w, `{}`)
	})
	for _, ask := range administration() {
		if err := ask.call(t.Context(), c); err != nil {
			t.Errorf("%s: %v", ask.name, err)
		}
		if want := ask.method + " " + ask.path + " " + ask.body; got != want {
			t.Errorf("%s: asked %s, want %s", ask.name, got, want)
		}
	}
}

// A second attempt would be another attempt on an HSM, so there is none.
func TestAdministrationIsAskedOnce(t *testing.T) {
	var asked atomic.Int32
	c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		fail(w, 502, api.CodeMemberFailed, true)
	})
	for _, ask := range administration() {
		if ask.method == http.MethodGet {
			continue
		}
		asked.Store(0)
		if err := ask.call(t.Context(), c); !errors.Is(err, api.ErrMemberFailed) || asked.Load() != 1 {
			t.Errorf("%s: asked %d times, %v", ask.name, asked.Load(), err)
		}
	}
}

// Only a sync may take longer than the client's time without being told so.
func TestOnlyASyncHasNoEnd(t *testing.T) {
	var timeout string
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		timeout = r.Header.Get(api.TimeoutHeader)
		fmt.Fprint(w, `{}`)
	})
	for _, ask := range administration() {
		if err := ask.call(t.Context(), c); err != nil || (timeout == "") != (ask.name == "sync") {
			t.Errorf("%s: timeout %q, %v", ask.name, timeout, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	for _, ask := range administration() {
		err := ask.call(ctx, c)
		if d, _ := time.ParseDuration(timeout); err != nil || d < 50*time.Minute || d > time.Hour {
			t.Errorf("%s: timeout %q, want that of the context; %v", ask.name, timeout, err)
		}
	}
}

// A name that is none of a path never becomes another path.
func TestNamesThatMakeNoPath(t *testing.T) {
	c, _ := serve(t, nil, func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked for %s", r.URL) })
	for _, name := range []string{"", ".", ".."} {
		if err := c.RemoveMember(t.Context(), "g", name, true); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("removing %q: %v", name, err)
		}
		if _, err := c.Sync(t.Context(), name, api.SyncOptions{}); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("synchronizing %q: %v", name, err)
		}
	}
	for _, last := range []int{-1, api.MaxLog + 1} {
		if _, err := c.Log(t.Context(), last); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("the last %d events: %v", last, err)
		}
	}
}

// The past is asked for once: a stream that breaks goes on with what is new.
func TestEventsAfterAsksForThePastOnce(t *testing.T) {
	var asked []string
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RequestURI())
		fmt.Fprintf(w, "data: {\"type\":\"member\"}\n\n")
	})
	n := 0
	for range c.EventsAfter(t.Context(), 5) {
		if n++; n == 3 { // an event, that the stream broke, an event
			break
		}
	}
	if got := strings.Join(asked, " "); got != "/v1/events?last=5 /v1/events" {
		t.Errorf("asked for %s", got)
	}
}

// An HSM joins while the group serves. It may take a while: every key is cloned to it.
func ExampleClient_AddMember() {
	c, err := client.New("unix:///run/kmsd/kmsd.sock", client.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	member, err := c.AddMember(ctx, "default", api.MemberSpec{
		Name: "hsm-d", Driver: "softhsm", PIN: api.PINSource{File: "/etc/kmsd/hsm-d.pin"},
		Settings: map[string]string{"token_label": "hsm-d"},
	})
	if err != nil {
		fmt.Println(err) // says what differs; the group is as it was
		return
	}
	fmt.Println(member.Name, member.State, member.Keys)
}
