package p11_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"testing"

	"kmsd/internal/leaktest"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// quirks are those of the driver for SoftHSM.
func quirks() p11.Quirks {
	return p11.Quirks{
		Driver:        "softhsm",
		Env:           map[string]string{"softhsm_conf": "SOFTHSM2_CONF"},
		Apart:         "softhsm_conf",
		SessionCopies: true,
		GCMTagFault:   pluginproto.CKRGeneralError,
		RawOAEP:       true,
		SlowWorkers:   2,
	}
}

// bench is one token for a test, and what it is opened with.
type bench struct {
	store    *softhsmtest.Store
	settings map[string]string
	domain   []byte
}

// newBench makes a store with one token. SoftHSM reads its configuration from the
// environment of the process, so there is one store at a time and no test of this
// package is parallel.
func newBench(t testing.TB, labels ...string) *bench {
	t.Helper()
	if len(labels) == 0 {
		labels = []string{"token-a"}
	}
	b := &bench{store: softhsmtest.NewStore(t), domain: bytes.Repeat([]byte{7}, 32)}
	for _, label := range labels {
		b.store.Add(t, label)
	}
	b.settings = map[string]string{
		"module": softhsmtest.Module(t), "softhsm_conf": b.store.Conf, "token_label": labels[0],
	}
	return b
}

func (b *bench) request() pluginproto.OpenRequest {
	return pluginproto.OpenRequest{Settings: b.settings, PIN: []byte(softhsmtest.PIN), Domain: b.domain}
}

// open opens a driver on the bench's token until the test ends.
func (b *bench) open(t testing.TB) *p11.Driver {
	t.Helper()
	d := p11.New(quirks(), p11.Options{Version: "test"})
	if _, err := d.Open(t.Context(), b.request()); err != nil {
		t.Fatalf("opening: %v", err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return d
}

func newID() (id pluginproto.KeyID) {
	rand.Read(id[:]) // never fails
	return id
}

func generate(t testing.TB, d *p11.Driver, typ pluginproto.KeyType) pluginproto.Object {
	t.Helper()
	o, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: newID(), Type: typ, Label: "a " + string(typ)})
	if err != nil {
		t.Fatalf("generating %s: %v", typ, err)
	}
	return o
}

// roundTrip encrypts and decrypts under a key.
func roundTrip(ctx context.Context, d *p11.Driver, id pluginproto.KeyID) error {
	text, iv := []byte("32 bytes of somebody's table key"), make([]byte, 12)
	rand.Read(iv) // never fails
	cmd := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, Input: text, IV: iv, AAD: []byte("aad")}
	sealed, err := d.Do(ctx, cmd)
	if err != nil {
		return fmt.Errorf("encrypting: %w", err)
	}
	cmd.Op, cmd.Input, cmd.IV = pluginproto.OpDecrypt, sealed.Output, sealed.IV
	opened, err := d.Do(ctx, cmd)
	if err != nil {
		return fmt.Errorf("decrypting: %w", err)
	}
	if !bytes.Equal(opened.Output, text) {
		return fmt.Errorf("%q came back", opened.Output)
	}
	return nil
}

func TestRoundTrip(t *testing.T) {
	d := newBench(t).open(t)
	if err := roundTrip(t.Context(), d, generate(t, d, pluginproto.AES256).ID); err != nil {
		t.Error(err)
	}
}
