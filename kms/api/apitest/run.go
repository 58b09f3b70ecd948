package apitest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/kms/api"
)

// Open returns a service without keys for one test, and closes it with t.Cleanup.
type Open func(t *testing.T) api.Service

// Around makes what a test needs around itself, and runs it there: [Plainly], or synctest.Test
// for a service without a network, whose promises then hang on nobody's clock.
type Around func(t *testing.T, test func(t *testing.T))

// Plainly just runs a test.
func Plainly(t *testing.T, test func(t *testing.T)) { test(t) }

// Run tests the promises of api.Service.
func Run(t *testing.T, around Around, open Open) {
	for _, c := range []struct {
		promise string
		test    func(*testing.T, api.Service)
	}{
		{"a key that is made can be shown", madeIsShown},
		{"a name is taken once", takenOnce},
		{"of many who take a name at once one gets it", oneGetsIt},
		{"keys are listed by name in pages", listed},
		{"a name that is not well formed is refused everywhere", badNames},
		{"a key that does not exist is not found anywhere", notFound},
		{"wrong choices at creation are refused", badOptions},
		{"an owner can change what may be changed", updated},
		{"every version unwraps and the newest wraps", rotated},
		{"a disabled key is of no use until it is enabled", disabled},
		{"a scheduled destruction can be taken back", restored},
		{"a destroyed key stays destroyed", destroyed},
		{"every copy is verified", verified},
		{"what was wrapped unwraps with its aad only", unwrapped},
		{"a plaintext has 1 byte to 64 KiB", plaintextLimits},
		{"an altered envelope never gives a plaintext", altered},
		{"an envelope of another key is told from an altered one", foreign},
		{"a data key is of the length asked for", dataKeyLengths},
		{"a batch answers each item in its place", batches},
		{"a batch is limited", batchLimits},
		{"a signature is verified with its digest only", signatures},
		{"RSA-OAEP is undone", oaep},
		{"a MAC depends on key and message", macs},
		{"a key does only what its type can", wrongTypes},
		{"random bytes differ", randoms},
		{"the status shows groups and their members", status},
		{"making a key is an event", events},
		{"a request whose time is over says so", deadlines},
		{"many may use a key at once", concurrent},
	} {
		t.Run(c.promise, func(t *testing.T) {
			around(t, func(t *testing.T) { c.test(t, open(t)) })
		})
	}
}

// patience is how long is waited for what happens in a moment. A machine may be slow.
const patience = 2 * time.Minute

// make1 makes a key for a test.
func make1(t *testing.T, s api.Service, name, kind string) api.Key {
	t.Helper()
	k, err := s.CreateMasterKey(t.Context(), name, api.KeyOptions{Type: kind})
	if err != nil {
		t.Fatalf("making key %s: %v", name, err)
	}
	return k
}

// wants fails the test unless err is an *api.Error of the code, with a message.
func wants(t *testing.T, err error, want error, doing string) {
	t.Helper()
	var e *api.Error
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v (code %v), want code %v", doing, err, codeOf(err), codeOf(want))
	} else if !errors.As(err, &e) || e.Message == "" {
		t.Errorf("%s: the error %#v has no message", doing, err)
	}
}

func codeOf(err error) api.Code {
	var e *api.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Code
}

// ok ends the test if a step that must work does not.
func ok(t *testing.T, err error, doing string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", doing, err)
	}
}

func madeIsShown(t *testing.T, s api.Service) {
	made := make1(t, s, "shop", "")
	if made.Type != "aes-256" || made.State != api.StateEnabled || made.Primary != 1 || len(made.Versions) != 1 || made.Group == "" || made.Created.IsZero() {
		t.Errorf("made %+v", made)
	}
	v := made.Versions[0]
	if v.Number != 1 || v.State != api.StateEnabled || v.CheckValue == "" || len(v.Copies) == 0 {
		t.Errorf("its version is %+v", v)
	}
	shown, err := s.Key(t.Context(), "shop")
	ok(t, err, "showing the key")
	if shown.Name != "shop" || shown.Versions[0].CheckValue != v.CheckValue || !shown.Created.Equal(made.Created) {
		t.Errorf("shown %+v, made %+v", shown, made)
	}
}

func takenOnce(t *testing.T, s api.Service) {
	first := make1(t, s, "shop", "")
	_, err := s.CreateMasterKey(t.Context(), "shop", api.KeyOptions{})
	wants(t, err, api.ErrExists, "making it again")
	k, err := s.Key(t.Context(), "shop")
	ok(t, err, "showing the key")
	if k.Versions[0].CheckValue != first.Versions[0].CheckValue {
		t.Error("the second attempt has replaced the key")
	}
}

func oneGetsIt(t *testing.T, s api.Service) {
	const many = 8
	errs := make([]error, many)
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() { _, errs[i] = s.CreateMasterKey(t.Context(), "shop", api.KeyOptions{}) })
	}
	wg.Wait()
	got := 0
	for _, err := range errs {
		if err == nil {
			got++
			continue
		}
		wants(t, err, api.ErrExists, "making it too")
	}
	if got != 1 {
		t.Errorf("%d of %d made the key", got, many)
	}
}

func listed(t *testing.T, s api.Service) {
	for _, name := range []string{"shop-b", "shop-a", "bank", "shop-c"} {
		make1(t, s, name, "aes-128")
	}
	var names []string
	opts := api.ListOptions{Prefix: "shop-", Limit: 2}
	for pages := 1; ; pages++ {
		page, err := s.Keys(t.Context(), opts)
		ok(t, err, "listing keys")
		for _, k := range page.Keys {
			names = append(names, k.Name)
		}
		if opts.After = page.Next; page.Next == "" {
			break
		}
		if pages > 3 {
			t.Fatal("the pages do not end")
		}
	}
	if got := strings.Join(names, " "); got != "shop-a shop-b shop-c" {
		t.Errorf("listed %q", got)
	}
	for _, limit := range []int{-1, api.MaxPage + 1} {
		_, err := s.Keys(t.Context(), api.ListOptions{Limit: limit})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("listing %d keys", limit))
	}
	none, err := s.Keys(t.Context(), api.ListOptions{Prefix: "x"})
	ok(t, err, "listing no keys")
	if len(none.Keys) != 0 || none.Next != "" {
		t.Errorf("nothing was to be listed, got %+v", none)
	}
}

// methods calls everything that takes the name of a key that exists.
func methods(ctx context.Context, s api.Service, name string) map[string]error {
	failed := make(map[string]error)
	did := func(method string, err error) { failed[method] = err }
	_, err := s.Key(ctx, name)
	did("Key", err)
	_, err = s.UpdateKey(ctx, name, api.KeyUpdate{})
	did("UpdateKey", err)
	_, err = s.Rotate(ctx, name)
	did("Rotate", err)
	_, err = s.Disable(ctx, name)
	did("Disable", err)
	_, err = s.Enable(ctx, name)
	did("Enable", err)
	_, err = s.Destroy(ctx, name, time.Hour)
	did("Destroy", err)
	_, err = s.Restore(ctx, name)
	did("Restore", err)
	_, err = s.Verify(ctx, name)
	did("Verify", err)
	for method, err := range uses(ctx, s, name) {
		did(method, err)
	}
	return failed
}

// uses calls everything that uses a key.
func uses(ctx context.Context, s api.Service, name string) map[string]error {
	failed := make(map[string]error)
	digest := make([]byte, 32)
	_, failed["Wrap"] = s.Wrap(ctx, name, []byte("p"), nil)
	_, failed["Unwrap"] = s.Unwrap(ctx, name, make([]byte, 100), nil)
	_, failed["Rewrap"] = s.Rewrap(ctx, name, make([]byte, 100), nil)
	_, failed["DataKey"] = s.DataKey(ctx, name, 32, nil)
	_, failed["Batch"] = s.Batch(ctx, api.OpWrap, name, []api.Item{{Plaintext: []byte("p")}})
	_, failed["Sign"] = s.Sign(ctx, name, api.SignRequest{Digest: digest})
	_, failed["VerifySignature"] = s.VerifySignature(ctx, name, api.VerifyRequest{SignRequest: api.SignRequest{Digest: digest}, Signature: []byte("s")})
	_, failed["Decrypt"] = s.Decrypt(ctx, name, api.DecryptRequest{Ciphertext: make([]byte, 256)})
	_, failed["MAC"] = s.MAC(ctx, name, api.MACRequest{Message: []byte("m")})
	return failed
}

func badNames(t *testing.T, s api.Service) {
	for _, name := range []string{"", ".", "..", "-x", "a/b", "a b", "é", "%2e", strings.Repeat("n", api.MaxNameLen+1)} {
		_, err := s.CreateMasterKey(t.Context(), name, api.KeyOptions{})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("CreateMasterKey of %q", name))
		for method, err := range methods(t.Context(), s, name) {
			wants(t, err, api.ErrBadRequest, fmt.Sprintf("%s of %q", method, name))
		}
	}
}

func notFound(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	for method, err := range methods(t.Context(), s, "shop2") {
		wants(t, err, api.ErrNotFound, method)
	}
}

func badOptions(t *testing.T, s api.Service) {
	_, err := s.CreateMasterKey(t.Context(), "shop", api.KeyOptions{Type: "des"})
	wants(t, err, api.ErrBadRequest, "making a key of an unknown type")
	_, err = s.CreateMasterKey(t.Context(), "shop", api.KeyOptions{Group: "nowhere"})
	if !errors.Is(err, api.ErrBadRequest) && !errors.Is(err, api.ErrNotFound) {
		t.Errorf("making a key in an unknown group: %v", err)
	}
	_, err = s.Key(t.Context(), "shop")
	wants(t, err, api.ErrNotFound, "showing what was refused")
}

func randoms(t *testing.T, s api.Service) {
	seen := make(map[string]bool)
	for _, n := range []int{1, 16, 32, 1000} {
		b, err := s.Random(t.Context(), "", n)
		ok(t, err, "asking for random bytes")
		if len(b) != n {
			t.Errorf("%d random bytes instead of %d", len(b), n)
		}
		if n > 1 && seen[string(b[:16])] {
			t.Error("the same bytes came twice")
		}
		if n > 1 {
			seen[string(b[:16])] = true
		}
	}
	for _, n := range []int{0, -1} {
		_, err := s.Random(t.Context(), "", n)
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("asking for %d random bytes", n))
	}
	if _, err := s.Random(t.Context(), "nowhere", 1); !errors.Is(err, api.ErrBadRequest) && !errors.Is(err, api.ErrNotFound) {
		t.Errorf("random bytes of an unknown group: %v", err)
	}
}

func status(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	st := s.Status()
	if st.Error != "" || len(st.Groups) == 0 {
		t.Fatalf("status %+v", st)
	}
	g := st.Groups[0]
	if g.Name == "" || g.State != api.GroupNormal || g.Primary == "" || g.Keys != 1 || len(g.Members) == 0 {
		t.Errorf("group %+v", g)
	}
	for _, m := range g.Members {
		if m.Name == "" || m.State == "" || m.Role == "" || m.CKR != "CKR_OK" {
			t.Errorf("member %+v", m)
		}
	}
}

// events makes keys until one is seen: over HTTP nobody knows when the stream is
// open.
func events(t *testing.T, s api.Service) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			if _, err := s.CreateMasterKey(ctx, fmt.Sprintf("shop-%d", i), api.KeyOptions{}); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	for e := range s.Events(ctx) {
		if e.Type == "key" && strings.HasPrefix(e.Key, "shop-") && !e.Time.IsZero() {
			return
		}
	}
	t.Error("the events have ended without that of a key")
}

func deadlines(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	for cause, ctx := range map[error]context.Context{
		context.Canceled:         canceled(t),
		context.DeadlineExceeded: expired(t),
	} {
		_, err := s.Wrap(ctx, "shop", []byte("p"), nil)
		wants(t, err, api.ErrDeadline, "wrapping when the time is over")
		if !errors.Is(err, cause) {
			t.Errorf("the error %v does not tell %v", err, cause)
		}
	}
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func expired(t *testing.T) context.Context {
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	t.Cleanup(cancel)
	return ctx
}
