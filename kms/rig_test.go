package kms_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/internal/leaktest"
	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// cloneKeys is how many keys one transfer between members carries: more than one, as with
// the newest HSMs, and few enough for tests to need several.
const cloneKeys = 4

// hsm is one member: a token, and the driver that has it open at the moment.
type hsm struct {
	name  string
	token *memdriver.Token
	ownIV int // bytes of the IVs that the token chooses; 0: it takes those it is given

	hidden bool // its domain check value proves nothing

	mu      sync.Mutex // guards what follows
	pin     string
	absent  error             // why no driver starts; nil: one does
	faults  []memdriver.Fault // what every new driver begins with
	current *memdriver.Driver
	step    func(*hsm) // called before and after each call that reads or changes keys; nil: nothing
}

func (h *hsm) open(context.Context) (pluginproto.Driver, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.absent != nil {
		return nil, h.absent
	}
	h.current = memdriver.New(memdriver.Options{Token: h.token, OwnIV: h.ownIV, CloneKeys: cloneKeys, HiddenDomain: h.hidden})
	for _, f := range h.faults {
		h.current.Script(f)
	}
	return &stepped{Driver: h.current, h: h}, nil
}

// stepped is a driver whose key operations can be interrupted on either side of
// their effect.
type stepped struct {
	*memdriver.Driver
	h *hsm
}

func (s *stepped) mark() {
	s.h.mu.Lock()
	step := s.h.step
	s.h.mu.Unlock()
	if step != nil {
		step(s.h)
	}
}

// marked runs a call between two steps. When the driver has crashed in the second
// one, the effect is there and the answer is not.
func marked[T any](s *stepped, call func() (T, error)) (T, error) {
	s.mark()
	v, err := call()
	s.mark()
	select {
	case <-s.Done():
		var none T
		return none, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "calling a driver that has crashed"}
	default:
		return v, err
	}
}

func (s *stepped) List(ctx context.Context) ([]pluginproto.Object, error) {
	return marked(s, func() ([]pluginproto.Object, error) { return s.Driver.List(ctx) })
}

func (s *stepped) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	return marked(s, func() (pluginproto.Object, error) { return s.Driver.Generate(ctx, spec) })
}

func (s *stepped) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	_, err := marked(s, func() (struct{}, error) { return struct{}{}, s.Driver.Destroy(ctx, id) })
	return err
}

func (s *stepped) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	return marked(s, func() (pluginproto.CloneReply, error) { return s.Driver.CloneStep(ctx, req) })
}

func (h *hsm) driver() *memdriver.Driver {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current
}

// leave takes the member away until come.
func (h *hsm) leave() {
	h.mu.Lock()
	h.absent = &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRTokenNotPresent, Op: "starting the driver"}
	d := h.current
	h.mu.Unlock()
	if d != nil {
		d.Crash()
	}
}

func (h *hsm) come() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.absent = nil
}

// rig is a service over tokens of memory, which may be opened again and again.
type rig struct {
	t     testing.TB
	disk  *catalogtest.Memory
	hsms  []*hsm
	group kms.GroupConfig
	log   *logBuffer
	// enlist is the service's; nil: nobody joins at run time.
	enlist  func(string, api.MemberSpec) (kms.MemberConfig, error)
	formats map[string]string // :: database → what its data keys must be
	level   hclog.Level       // of what is logged; 0: Debug
	*kms.KMS
}

// newRig makes a group of n members, hsm-a, hsm-b and so on, not opened yet.
func newRig(t testing.TB, n int) *rig {
	r := &rig{t: t, disk: catalogtest.NewMemory(), log: new(logBuffer)}
	r.group = kms.GroupConfig{
		Domain: func(context.Context) ([]byte, error) { return bytes.Repeat([]byte{7}, 32), nil },
	}
	for i := range n {
		name := fmt.Sprintf("hsm-%c", 'a'+i)
		h := &hsm{name: name, token: memdriver.NewToken(name), pin: memdriver.PIN}
		r.hsms = append(r.hsms, h)
		r.group.Members = append(r.group.Members, kms.MemberConfig{
			Name: name, Driver: "memory", Open: h.open,
			PIN: func(context.Context) ([]byte, error) {
				h.mu.Lock()
				defer h.mu.Unlock()
				return []byte(h.pin), nil
			},
		})
	}
	return r
}

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text.Bytes())
}

func (b *logBuffer) String() string { return string(b.Bytes()) }

// start opens the service on a store, or on the rig's own when that is nil.
func (r *rig) start(store catalog.Store) error {
	if store == nil {
		store = r.disk.Reopen()
	}
	k, err := kms.Open(r.t.Context(), kms.Config{
		Catalog: store, Groups: []kms.GroupConfig{r.group}, Enlist: r.enlist, Formats: r.formats,
		Logger: hclog.New(&hclog.LoggerOptions{Output: r.log, Level: cmp.Or(r.level, hclog.Debug)}),
	})
	r.KMS = k
	return err
}

func (r *rig) mustStart() *rig {
	r.t.Helper()
	if err := r.start(nil); err != nil {
		r.t.Fatal(err)
	}
	return r
}

func (r *rig) stop() {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Fatal(err)
	}
	if r.t.Failed() && os.Getenv("KMS_TEST_LOG") != "" {
		r.t.Log(r.log.String())
	}
}

func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.mustStart()
}

// create makes a key that must succeed.
func (r *rig) create(name string) kms.Key {
	r.t.Helper()
	key, err := r.CreateMasterKey(r.t.Context(), name, kms.KeyOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	return key
}

// wrap wraps a plaintext made of the key's name.
func (r *rig) wrap(name string) []byte {
	r.t.Helper()
	wrapped, err := r.Wrap(r.t.Context(), name, plaintextOf(name), []byte("aad"))
	if err != nil {
		r.t.Fatal(err)
	}
	return wrapped
}

func (r *rig) wantUnwrap(name string, wrapped []byte) {
	r.t.Helper()
	got, err := r.Unwrap(r.t.Context(), name, wrapped, []byte("aad"))
	if err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, plaintextOf(name)) {
		r.t.Fatalf("unwrapped %q, want %q", got, plaintextOf(name))
	}
}

func plaintextOf(name string) []byte { return []byte("the data key of " + name) }

// wantStates waits until the members are in the given states; in a synctest bubble
// that takes no time.
func (r *rig) wantStates(states ...api.MemberState) {
	r.t.Helper()
	r.eventually(func() error {
		members := r.Status().Groups[0].Members
		for i, want := range states {
			if members[i].State != want {
				return fmt.Errorf("member %s is %s (%s), want %s", members[i].Name, members[i].State, members[i].Reason, want)
			}
		}
		return nil
	})
}

// eventually waits up to five minutes of the bubble's time for a condition that
// holds when all that happens at one moment has happened: a member that is down
// may be tried again at that very moment.
func (r *rig) eventually(condition func() error) {
	r.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var err error
	for range 6000 {
		synctest.Wait()
		if err = condition(); err == nil {
			return
		}
		<-tick.C
	}
	r.t.Fatal(err)
}

// wantConsistent checks what must hold whenever the group is whole: every member
// holds exactly the living versions, and what the catalog says of copies is true.
func (r *rig) wantConsistent() {
	r.t.Helper()
	r.eventually(r.consistent)
}

func (r *rig) consistent() error {
	want := make(map[pluginproto.KeyID]bool)
	c := catalog.New(r.disk.Reopen())
	for rec, err := range c.Keys(context.Background(), "", "", 0) {
		if err != nil {
			return err
		}
		for _, v := range rec.Versions {
			if v.State == catalog.Destroyed {
				continue
			}
			id, err := pluginproto.ParseKeyID(v.Identity)
			if err != nil {
				return err
			}
			want[id] = true
			if len(v.Copies) != len(r.hsms) {
				return fmt.Errorf("key %s version %d has copies on %v only", rec.Name, v.Number, v.Copies)
			}
		}
	}
	for t, err := range c.Tombstones(context.Background()) {
		if err != nil {
			return err
		}
		if len(t.Pending) > 0 {
			return fmt.Errorf("the tombstone of key %s version %d is pending on %v", t.Key, t.Version, t.Pending)
		}
	}
	for in, err := range c.Intents(context.Background()) {
		return errors.Join(err, fmt.Errorf("an intent for key %s is left", in.Key))
	}
	for _, h := range r.hsms {
		ids := h.token.Keys()
		if len(ids) != len(want) {
			return fmt.Errorf("%s holds %d keys, want %d", h.name, len(ids), len(want))
		}
		for _, id := range ids {
			if !want[id] {
				return fmt.Errorf("%s holds %s, which the catalog does not know", h.name, id)
			}
		}
	}
	return nil
}

// wantVerified checks that every member holds every version with the right value.
func (r *rig) wantVerified(name string) {
	r.t.Helper()
	v, err := r.Verify(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	if !v.OK {
		r.t.Fatalf("key %s does not verify: %+v", name, v.Copies)
	}
}

func wantError(t testing.TB, err error, sentinel error, text string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error is %v, want %v", err, sentinel)
	}
	if _, ok := errors.AsType[*api.Error](err); !ok {
		t.Fatalf("error %v is a %T, want an *api.Error", err, err)
	}
	if !bytes.Contains([]byte(err.Error()), []byte(text)) {
		t.Fatalf("error says %q, want %q in it", err, text)
	}
}
