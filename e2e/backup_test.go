package e2e_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

var drillKeys = flag.Int("drill-keys", 200, "master keys of the restore drill")

// drill is a site that is backed up, erased and restored.
type drill struct {
	t       *testing.T
	s       *devserver.Server
	cfg     look.Config
	id      *age.X25519Identity
	secret  string            // file of the identity
	file    string            // the backup
	wrapped map[string][]byte // :: master key → envelope of its name
	data    map[string][]byte // :: data key → plaintext of its newest version
}

// TestRestoreDrill makes master keys, databases and data keys, backs them up, erases
// every token, and restores: nothing that was wrapped before is lost, and what was
// destroyed stays so.
func TestRestoreDrill(t *testing.T) {
	d := newDrill(t)
	d.fill()
	d.backUp()
	d.stop()
	d.verify()
	d.erase()
	d.refusals()
	d.restore()
	d.s = serve(t, d.s)
	awaitWhole(t, dial(t, d.s), recoveredIn)
	d.compare()
	if out, code := d.kmsd("backup", "restore", d.file, "--identity", d.secret, "-c", d.config()); code != 1 || !strings.Contains(out, "in use") {
		t.Errorf("restoring under a kmsd that runs: exit code %d, %s", code, out)
	}
	d.stop()
	if out, code := d.kmsd("backup", "restore", d.file, "--identity", d.secret, "-c", d.config()); code != 1 || !strings.Contains(out, "not empty") {
		t.Errorf("restoring over a catalog: exit code %d, %s", code, out)
	}
}

// stop ends kmsd, which lets go of the catalog and the tokens.
func (d *drill) stop() {
	d.t.Helper()
	if err := d.s.Stop(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
}

func newDrill(t *testing.T) *drill {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	s, err := devserver.Start(ctx, devserver.Config{Bin: bin, Dir: filepath.Join(dir, "kmsd"), Members: 2, Env: environment()})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, s)
	awaitWhole(t, dial(t, s), recoveredIn)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	d := &drill{
		t: t, s: s, cfg: configOf(t, s), id: id, secret: filepath.Join(dir, "identity"), file: filepath.Join(dir, "shop.backup"),
		wrapped: map[string][]byte{}, data: map[string][]byte{},
	}
	if err := os.WriteFile(d.secret, []byte("# an identity\n"+id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *drill) config() string { return filepath.Join(d.s.Dir, "kmsd.yaml") }

// kmsd runs the command line program, as long as its keys need, and says how long that
// was.
func (d *drill) kmsd(args ...string) (out string, code int) {
	d.t.Helper()
	began := time.Now()
	cmd := exec.CommandContext(d.t.Context(), filepath.Join(bin, "kmsd"), args...)
	cmd.Env = append(environment(), "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME"),
		"KMSD_ADDR="+d.s.Env.Addr, "KMSD_CACERT="+d.s.Env.CACert, "KMSD_TOKEN="+d.s.Env.Token)
	b, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	d.t.Logf("%s %s: exit code %d after %v", args[0], args[1], cmd.ProcessState.ExitCode(), time.Since(began).Round(time.Millisecond))
	return string(b), cmd.ProcessState.ExitCode()
}

func (d *drill) mustRun(args ...string) string {
	d.t.Helper()
	out, code := d.kmsd(args...)
	if code != 0 {
		d.t.Fatalf("kmsd %v: exit code %d, %s", args, code, out)
	}
	return out
}

func keyName(i int) string { return fmt.Sprintf("key-%05d", i) }

func (d *drill) fill() {
	d.t.Helper()
	c := dial(d.t, d.s)
	ctx := d.t.Context()
	envelopes := make([][]byte, *drillKeys) // by number of the key
	began := time.Now()
	tasks, tctx := errgroup.WithContext(ctx)
	tasks.SetLimit(8)
	for i := range envelopes {
		tasks.Go(func() (err error) {
			if err = makeKey(tctx, c, keyName(i)); err == nil {
				envelopes[i], err = c.Wrap(tctx, keyName(i), []byte("the plaintext of "+keyName(i)), nil)
			}
			return err
		})
	}
	if err := tasks.Wait(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Logf("made %d keys in %v", len(envelopes), time.Since(began).Round(time.Millisecond))
	for i, e := range envelopes {
		d.wrapped[keyName(i)] = e
	}
	d.must(c.Rotate(ctx, keyName(0)))
	d.must(c.Disable(ctx, keyName(1)))
	d.must(c.Destroy(ctx, keyName(2), 0))
	d.must(c.CreateDatabase(ctx, "orders", api.DatabaseOptions{}))
	for i := range 10 {
		id := fmt.Sprintf("table/%d", i)
		plain := random(32)
		d.must(c.PutNamedKey(ctx, "orders", id, api.NamedKeyPut{Plaintext: random(32)}))
		d.must(c.PutNamedKey(ctx, "orders", id, api.NamedKeyPut{Plaintext: plain}))
		d.data[id] = plain
	}
}

// makeKey asks again while a member is away: a token of thousands of keys can be too slow
// for its probe on a busy machine.
func makeKey(ctx context.Context, c *client.Client, name string) error {
	return devserver.Poll(ctx, func() error {
		_, err := c.CreateMasterKey(ctx, name, api.KeyOptions{})
		if err != nil && !api.AsError(err).Retryable {
			return devserver.Final(err)
		}
		return err
	})
}

func (d *drill) must(_ any, err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// backUp makes the backup, and looks for secrets in what it decrypts to.
func (d *drill) backUp() {
	d.t.Helper()
	out := d.mustRun("backup", "create", d.file, "--recipient", d.id.Recipient().String(), "-o", "json")
	var report api.BackupReport
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		d.t.Fatal(err)
	}
	// One key is destroyed and one has two versions; kmsd dev has made a database too, and
	// each has a key of its own.
	if want := (api.BackupReport{Keys: *drillKeys + 2, Versions: *drillKeys + 2, Databases: 2, NamedKeys: 20}); report != want {
		d.t.Errorf("report %+v, want %+v", report, want)
	}
	if out, code := d.kmsd("backup", "create", d.file, "--recipient", d.id.Recipient().String()); code != 1 || !strings.Contains(out, "not overwritten") {
		d.t.Errorf("over a file: exit code %d, %s", code, out)
	}
	f, err := os.Open(d.file)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	r, err := age.Decrypt(f, d.id)
	if err != nil {
		d.t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		d.t.Fatal(err)
	}
	secrets := map[string][]byte{"the domain secret": readSecret(d.t, d.cfg.Groups[0].Domain.File), "the plaintext of a key": []byte("the plaintext of ")}
	for _, m := range d.cfg.Groups[0].Members {
		secrets["the PIN of "+m.Name] = readSecret(d.t, m.PIN.File)
	}
	for id, plain := range d.data {
		secrets["data key "+id] = plain
	}
	for what, secret := range secrets {
		for _, form := range []string{string(secret), hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret)} {
			if bytes.Contains(text, []byte(form)) {
				d.t.Errorf("%s is in the backup", what)
			}
		}
	}
}

// verify has the backup checked and proved, which leaves the tokens as they are.
func (d *drill) verify() {
	d.t.Helper()
	if out := d.mustRun("backup", "verify", d.file, "--identity", d.secret); !strings.Contains(out, "no HSM has proved") {
		d.t.Errorf("verified: %s", out)
	}
	before := d.objects()
	if out := d.mustRun("backup", "verify", d.file, "--identity", d.secret, "-c", d.config()); !strings.Contains(out, "every key was proved") {
		d.t.Errorf("proved: %s", out)
	}
	if after := d.objects(); after != before {
		d.t.Errorf("the tokens had %v files, and %v after the proof", before, after)
	}
}

// objects counts the files of each token.
func (d *drill) objects() (n [2]int) {
	d.t.Helper()
	for i, m := range d.cfg.Groups[0].Members {
		files, err := filepath.Glob(filepath.Join(d.s.Dir, "tokens", m.Name, "*", "*.object"))
		if err != nil {
			d.t.Fatal(err)
		}
		n[i] = len(files)
	}
	return n
}

// erase makes new tokens in place of the old ones, and takes the catalog away.
func (d *drill) erase() {
	d.t.Helper()
	for _, m := range d.cfg.Groups[0].Members {
		tokens := filepath.Join(d.s.Dir, "tokens", m.Name)
		if err := errors.Join(os.RemoveAll(tokens), os.Mkdir(tokens, 0o700)); err != nil {
			d.t.Fatal(err)
		}
		request, err := json.Marshal(map[string]string{
			"softhsm_conf": m.Settings["softhsm_conf"], "label": m.Settings["token_label"],
			"pin": string(readSecret(d.t, m.PIN.File)), "so_pin": "87654321",
		})
		if err != nil {
			d.t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, "kmsd-driver-softhsm"), "init-token")
		cmd.Stdin = bytes.NewReader(request)
		if out, err := cmd.CombinedOutput(); err != nil {
			d.t.Fatalf("making a token: %v, %s", err, out)
		}
	}
	if err := os.Rename(d.cfg.Catalog.Bolt.Path, filepath.Join(d.t.TempDir(), "old.db")); err != nil {
		d.t.Fatal(err)
	}
}

// refusals restores what must not be restored: nothing changes.
func (d *drill) refusals() {
	d.t.Helper()
	whole, err := os.ReadFile(d.file)
	if err != nil {
		d.t.Fatal(err)
	}
	altered := bytes.Clone(whole)
	altered[len(altered)/2] ^= 1
	before := d.objects()
	refused := func(what, says string, args ...string) {
		d.t.Helper()
		out, code := d.kmsd(append([]string{"backup", "restore"}, args...)...)
		if code != 1 || !strings.Contains(out, says) {
			d.t.Errorf("%s: exit code %d, %s", what, code, out)
		}
		if after := d.objects(); after != before {
			d.t.Errorf("%s: the tokens had %v files, and have %v", what, before, after)
		}
		if files, _ := filepath.Glob(d.cfg.Catalog.Bolt.Path + "*"); len(files) > 0 {
			d.t.Errorf("%s: there is %v", what, files)
		}
	}
	bad := filepath.Join(d.t.TempDir(), "bad.backup")
	for what, b := range map[string][]byte{"an altered file": altered, "a file that is cut": whole[:len(whole)-100]} {
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			d.t.Fatal(err)
		}
		refused(what, "no whole backup", bad, "--identity", d.secret, "-c", d.config())
	}
	domain := d.cfg.Groups[0].Domain.File
	good, err := os.ReadFile(domain)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(domain, []byte(hex.EncodeToString(random(32))), 0o600); err != nil {
		d.t.Fatal(err)
	}
	refused("another domain", "the domain of group default is another one", d.file, "--identity", d.secret, "-c", d.config())
	if err := os.WriteFile(domain, good, 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (d *drill) restore() {
	d.t.Helper()
	out := d.mustRun("backup", "restore", d.file, "--identity", d.secret, "-c", d.config(), "-o", "json")
	var report struct {
		Groups []api.Group `json:"groups_now"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		d.t.Fatal(err)
	}
	for _, m := range report.Groups[0].Members {
		if m.State != api.MemberActive || m.Keys != *drillKeys+2 || m.Missing != 0 {
			d.t.Errorf("member %s is %s with %d keys, %d missing: %s", m.Name, m.State, m.Keys, m.Missing, m.Reason)
		}
	}
}

// compare asks for everything that was there before.
func (d *drill) compare() {
	d.t.Helper()
	c := dial(d.t, d.s)
	ctx := d.t.Context()
	for i, want := range []error{1: api.ErrState, 2: api.ErrState} {
		if _, err := c.Unwrap(ctx, keyName(i), d.wrapped[keyName(i)], nil); !errors.Is(err, want) {
			d.t.Errorf("unwrapping with %s: %v, want %v", keyName(i), err, want)
		}
	}
	if k, err := c.Key(ctx, keyName(2)); err != nil || k.State != api.StateDestroyed {
		d.t.Errorf("the destroyed key: %v, %v", k.State, err)
	}
	d.must(c.Enable(ctx, keyName(1)))
	delete(d.wrapped, keyName(2))
	tasks, tctx := errgroup.WithContext(ctx)
	tasks.SetLimit(8)
	for name, e := range d.wrapped {
		tasks.Go(func() error { return unwraps(tctx, c, name, e) })
	}
	if err := tasks.Wait(); err != nil {
		d.t.Error(err)
	}
	for id, want := range d.data {
		k, err := c.NamedKey(ctx, "orders", id, 0)
		if err != nil || k.Version != 2 || !bytes.Equal(k.Plaintext, want) {
			d.t.Errorf("data key %s: version %d, %v", id, k.Version, err)
		}
	}
	createKey(d.t, c, "new")
	d.must(c.RotateNamedKey(ctx, "orders", "table/0"))
}

func unwraps(ctx context.Context, c *client.Client, name string, envelope []byte) error {
	plain, err := c.Unwrap(ctx, name, envelope, nil)
	if err == nil && string(plain) != "the plaintext of "+name {
		err = errors.New("another plaintext")
	}
	if err != nil {
		return fmt.Errorf("unwrapping with %s: %w", name, err)
	}
	return nil
}
