package p11_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/internal/drivertest"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// sealedBefore is what the compiler made, for each library that it stands before.
var sealedBefore struct {
	mu sync.Mutex // guards so
	so map[string][]byte
}

// sealedLibrary makes the library whose keys say that they stay, before another one, in a
// file of the test's own: one that is loaded twice from one file is loaded once.
func sealedLibrary(t testing.TB, real string) string {
	t.Helper()
	sealedBefore.mu.Lock()
	defer sealedBefore.mu.Unlock()
	path := filepath.Join(t.TempDir(), "sealed.so")
	if so := sealedBefore.so[real]; so != nil {
		if err := os.WriteFile(path, so, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("looking for the PKCS#11 headers: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-Wall", "-Wextra", "-Werror",
		"-I"+strings.TrimSpace(string(headers)), fmt.Sprintf("-DREAL=%q", real), "-o", path, "testdata/sealed.c", "-ldl")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compiling the library whose keys stay: %v\n%s", err, out)
	}
	so, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if sealedBefore.so == nil {
		sealedBefore.so = map[string][]byte{}
	}
	sealedBefore.so[real] = so
	return path
}

// ends is the two tokens that most tests of transfers use.
type ends struct {
	*world
	bench    *bench
	from, to *p11.Driver
}

func newEnds(t testing.TB) *ends {
	t.Helper()
	e := &ends{world: newWorld(), bench: newBench(t, "token-a", "token-b")}
	e.bench.settings["module"] = sealedLibrary(t, softhsmtest.Module(t))
	e.from, e.to = e.start(t, "token-a"), e.start(t, "token-b")
	return e
}

// start opens a driver with an extension until the test ends.
func (e *ends) start(t testing.TB, label string) *p11.Driver {
	t.Helper()
	d := p11.New(e.quirks(), p11.Options{})
	d.SetIdle(time.Hour) // a test that takes its time loses no transfer
	e.openOn(t, d, label)
	return d
}

func (e *ends) openOn(t testing.TB, d *p11.Driver, label string) {
	t.Helper()
	req := e.bench.request()
	req.Settings = maps.Clone(req.Settings)
	req.Settings["token_label"] = label
	if _, err := d.Open(t.Context(), req); err != nil {
		t.Fatalf("opening %s: %v", label, err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
}

// relay is a transfer that a test takes step by step.
type relay struct {
	from, to       *p11.Driver
	source, target pluginproto.CloneRequest
}

func (e *ends) relay(way string, ids ...pluginproto.KeyID) *relay {
	r := &relay{from: e.from, to: e.to}
	r.source = pluginproto.CloneRequest{Transfer: newID(), Role: pluginproto.CloneSource, Protocol: way, Keys: ids}
	r.target = r.source
	r.target.Role = pluginproto.CloneTarget
	return r
}

// give takes the source's next step.
func (r *relay) give(t testing.TB) (pluginproto.CloneReply, error) {
	t.Helper()
	out, err := r.from.CloneStep(t.Context(), r.source)
	r.source.Step++
	r.target.Blob = out.Blob
	return out, err
}

// take takes the target's.
func (r *relay) take(t testing.TB) (pluginproto.CloneReply, error) {
	t.Helper()
	out, err := r.to.CloneStep(t.Context(), r.target)
	r.target.Step++
	r.source.Blob = out.Blob
	return out, err
}

// run takes all steps, and ends the transfer as the core does.
func (r *relay) run(t testing.TB) ([]pluginproto.CloneResult, error) {
	t.Helper()
	defer r.end(t)
	for range 8 {
		if _, err := r.give(t); err != nil {
			return nil, fmt.Errorf("source step %d: %w", r.source.Step-1, err)
		}
		if out, err := r.take(t); err != nil || out.Done {
			return out.Keys, err
		}
	}
	return nil, errors.New("it does not end")
}

func (r *relay) end(t testing.TB) {
	t.Helper()
	for d, req := range map[*p11.Driver]pluginproto.CloneRequest{r.from: r.source, r.to: r.target} {
		req.Step, req.Blob, req.End = 0, nil, true
		if _, err := d.CloneStep(t.Context(), req); err != nil {
			t.Errorf("ending: %v", err)
		}
	}
}

// clean wants nothing left of any transfer: no objects under these identities, no sessions,
// nothing that waits.
func (e *ends) clean(t testing.TB, ids ...pluginproto.KeyID) {
	t.Helper()
	for _, id := range ids {
		if _, err := e.to.Inspect(t.Context(), id); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Errorf("the target has something of the key: %v", err)
		}
		if err := e.to.Destroy(t.Context(), id); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Errorf("the target has half of the key: %v", err)
		}
	}
	e.do(func() {
		if e.open != 0 {
			t.Errorf("%d ends of transfers are open", e.open)
		}
	})
	if n := e.sessions(); n != 0 {
		t.Errorf("%d sessions of transfers are open", n)
	}
	for name, d := range map[string]*p11.Driver{"source": e.from, "target": e.to} {
		if n := d.Transfers(); n != 0 {
			t.Errorf("the %s knows %d transfers", name, n)
		}
	}
}

// The contract, with keys that go by an extension's protocols: of one key in several steps,
// of many keys, and of blobs that stand alone.
func TestContractOfAnExtension(t *testing.T) {
	var labels []string
	for i := range 8 {
		labels = append(labels, fmt.Sprintf("token-%d", i))
	}
	for _, tc := range []struct {
		name    string
		onToken bool
		types   []pluginproto.KeyType
	}{
		{"keys made on the token", true, []pluginproto.KeyType{
			pluginproto.AES256, pluginproto.AES128, pluginproto.RSA2048, pluginproto.ECP256, pluginproto.HMACSHA256,
		}},
		{"keys copied to the token", false, []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, b, used := newWorld(), newBench(t, labels...), 0
			b.settings["module"] = sealedLibrary(t, softhsmtest.Module(t))
			q := w.quirks()
			q.OnToken, q.FindsByID = tc.onToken, tc.onToken
			t.Run("the contract", func(t *testing.T) {
				drivertest.Run(t, drivertest.Config{Types: tc.types, NewToken: func(*testing.T) drivertest.Token {
					settings := maps.Clone(b.settings)
					settings["token_label"] = labels[used]
					used++
					return drivertest.Token{
						Start:    func(*testing.T) pluginproto.Driver { return p11.New(q, p11.Options{}) },
						Settings: settings,
						PIN:      []byte(softhsmtest.PIN),
					}
				}})
			})
			if w.open != 0 {
				t.Errorf("%d ends of transfers are open after all drivers were closed", w.open)
			}
		})
	}
}
