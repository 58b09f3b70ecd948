package kms_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// In a storm of members tokens join and leave the group at random, by force and under
// other names, while keys are made, rotated, destroyed, adopted and used, drivers and
// kmsd itself crash at any line, and the file is edited in between. After each life of
// kmsd, every key that was acknowledged must be on some token in the world, and no token
// that serves may have a destroyed one. When all tokens are in one group again, each of
// them holds exactly what the catalog says.
func TestStormOfMembers(t *testing.T) {
	for seed := range stormSeeds {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newMemberStorm(t, seed).rage() })
		})
	}
}

// stormSeeds is how many storms there are.
var stormSeeds = uint64(4)

type memberStorm struct {
	*reserve
	random *rand.Rand // the main goroutine's
	tokens []string   // labels, sorted
	gentle bool       // nobody uses force, or takes a member's token or entry away
	store  *catalogtest.Crasher

	mu        sync.Mutex          // guards what follows
	n         int                 // names given so far
	kept      map[string][][]byte // :: acknowledged key that nobody has tried to destroy → envelopes
	doomed    map[string]bool     // keys that somebody has tried to destroy, with true once that was acknowledged
	strangers map[string]string   // :: label of an object that nobody knows → its token
	corrupt   map[string]string   // :: identity → the token that has a wrong copy
}

func newMemberStorm(t *testing.T, seed uint64) *memberStorm {
	s := &memberStorm{
		reserve: newReserve(t, 3, "t-4", "t-5", "t-6"), random: rand.New(rand.NewPCG(seed, 0)), gentle: seed%2 == 0,
		kept: make(map[string][][]byte), doomed: make(map[string]bool), strangers: make(map[string]string), corrupt: make(map[string]string),
	}
	for _, h := range s.hsms {
		s.spare[h.name] = h
	}
	s.tokens = slices.Sorted(maps.Keys(s.spare))
	s.hsms = nil
	for _, label := range s.tokens {
		s.hsms = append(s.hsms, s.spare[label])
	}
	s.group.Members = nil
	for _, label := range s.tokens[:3] {
		s.group.Members = append(s.group.Members, s.entry(label, label))
	}
	return s
}

// entry is a member of the file.
func (s *memberStorm) entry(name, label string) kms.MemberConfig {
	m, err := s.enlist("", s.spec(name, label))
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

func (s *memberStorm) rage() {
	for range 5 {
		s.live()
		for _, h := range s.hsms {
			h.come()
		}
		s.check()
		s.edit()
	}
	s.reunite()
}

// live is one life of kmsd.
func (s *memberStorm) live() {
	s.store = catalogtest.NewCrasher(s.disk.Reopen(), s.random.IntN(2)*s.random.IntN(400))
	if err := s.start(s.store); err != nil {
		if !s.store.Crashed() {
			s.t.Fatal(err)
		}
		return
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Duration(10+s.random.IntN(50))*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, work := range []func(*rand.Rand){s.useKeys, s.useKeys, s.operate, s.operate, s.weather} {
		random := rand.New(rand.NewPCG(s.random.Uint64(), 0))
		all.Go(func() {
			for ctx.Err() == nil && !s.store.Crashed() {
				work(random)
				<-time.After(time.Duration(random.IntN(1000)) * time.Millisecond)
			}
		})
	}
	all.Wait()
	if s.random.IntN(2) == 0 {
		s.calm()
	}
	if s.random.IntN(2) == 0 {
		s.store.Crash() // what is taken back at a clean end is not
	}
	s.stop()
}

// calm waits for the end of a storm, after which those that serve hold what any of them
// does, and nothing that is destroyed.
func (s *memberStorm) calm() {
	for _, h := range s.hsms {
		h.come()
		if d := h.driver(); d != nil {
			d.Clear()
		}
	}
	s.eventually(func() error {
		if s.store.Crashed() {
			return nil
		}
		living, held := s.living(), make(map[pluginproto.KeyID]bool)
		var serving []*hsm
		for _, m := range s.Status().Groups[0].Members {
			if m.State == active || m.State == standby {
				serving = append(serving, s.spare[m.Token.Label])
			}
		}
		for _, h := range serving {
			for _, o := range s.objects(h) {
				v, ok := living[o.ID]
				if ok && bytes.Equal(v.CheckValue, o.CheckValue) {
					held[o.ID] = true
				}
				if !ok && s.strangers[o.Label] == "" && o.Label != "kmsd canary" {
					return fmt.Errorf("%s serves and holds object %s (%s), which the catalog does not know", h.name, o.ID, o.Label)
				}
			}
		}
		for _, h := range serving {
			for id := range held {
				if !h.holds(id) {
					return fmt.Errorf("%s serves without %s, which others have", h.name, living[id].Identity)
				}
			}
		}
		return nil
	})
	if s.gentle && !s.store.Crashed() {
		s.wantAllAmongMembers()
	}
}

// wantAllAmongMembers checks that nobody has taken the last copy of a key out of the
// group, when nobody has used force.
func (s *memberStorm) wantAllAmongMembers() {
	held := make(map[pluginproto.KeyID]bool)
	for m, err := range catalog.New(s.disk.Reopen()).Members(s.t.Context(), "default") {
		if err != nil {
			s.t.Fatal(err)
		}
		if m.Removed || m.Token == nil {
			continue
		}
		for _, id := range s.spare[m.Token.Label].token.Keys() {
			held[id] = true
		}
	}
	for id, v := range s.living() {
		if !held[id] {
			s.t.Errorf("%s, known to be on %v, has left the group", v.Identity, v.Copies)
		}
	}
}

// briefly is how long somebody waits for an operation.
func (s *memberStorm) briefly(random *rand.Rand) (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.t.Context(), time.Duration(1+random.IntN(30000))*time.Millisecond)
}

func (s *memberStorm) weather(random *rand.Rand) {
	h := s.hsms[random.IntN(len(s.hsms))]
	d := h.driver()
	switch what := random.IntN(8); {
	case what == 0:
		h.leave()
	case d == nil || what > 4:
		h.come()
	case what == 1:
		d.Crash()
	case what == 2:
		f := noRoom
		f.Times = 1 + random.IntN(100)
		d.Script(f)
	default: // slow at first, and hanging for good at last
		calls := []memdriver.Call{memdriver.CallList, memdriver.CallGenerate, memdriver.CallDestroy, memdriver.CallCloneStep, memdriver.CallDo}
		d.Script(memdriver.Fault{
			Call: calls[random.IntN(len(calls))], Times: 1 + random.IntN(3), Delay: time.Duration(1<<random.IntN(15)) * time.Millisecond,
		})
	}
}

// operate does what operators do, whatever comes of it.
func (s *memberStorm) operate(random *rand.Rand) {
	ctx, cancel := s.briefly(random)
	defer cancel()
	members := s.Status().Groups[0].Members
	name := members[random.IntN(len(members))].Name
	token := s.tokens[random.IntN(len(s.tokens))]
	force := !s.gentle && random.IntN(4) == 0
	what := random.IntN(12)
	if s.gentle && what == 5 {
		what = 0
	}
	switch what {
	case 0, 1, 2:
		fresh := []string{token, "m-1", "m-2"}[random.IntN(3)]
		s.AddMember(ctx, "", s.spec(fresh, token))
	case 3, 4:
		s.RemoveMember(ctx, "", name, force)
	case 5:
		spec := s.spec(name, token)
		s.ReplaceMember(ctx, "", name, &spec)
	case 6:
		s.ReplaceMember(ctx, "", name, nil)
	case 7:
		s.Drain(ctx, "", name, force)
	case 8:
		s.SetRole(ctx, "", name, []string{api.RoleActive, api.RoleStandby}[random.IntN(2)], force)
	case 9:
		s.Recover(ctx, "", name)
	case 10:
		s.Reconfigure(ctx, []kms.GroupConfig{s.group})
	case 11:
		report, _ := s.Sync(ctx, "", api.SyncOptions{Adopt: random.IntN(2) == 0})
		for _, name := range report.Adopted {
			s.mu.Lock()
			delete(s.strangers, name)
			s.mu.Unlock()
			s.keep(name)
		}
	}
}

// useKeys does what the users of keys do.
func (s *memberStorm) useKeys(random *rand.Rand) {
	ctx, cancel := s.briefly(random)
	defer cancel()
	s.mu.Lock()
	names := slices.Sorted(maps.Keys(s.kept))
	s.n++
	fresh := fmt.Sprint("key-", s.n)
	s.mu.Unlock()
	what := random.IntN(10)
	if len(names) == 0 {
		what = 0
	}
	degraded := random.IntN(2) == 0
	switch {
	case what < 3:
		if _, err := s.CreateMasterKey(ctx, fresh, kms.KeyOptions{AllowDegraded: degraded, MinCopies: random.IntN(2)}); err == nil {
			s.keep(fresh)
		}
		return
	case what < 5:
		name := names[random.IntN(len(names))]
		if _, err := s.RotateWith(ctx, name, api.RotateOptions{AllowDegraded: degraded}); err == nil {
			s.keep(name)
		} else {
			s.known(err)
		}
	case what == 5:
		name := names[random.IntN(len(names))]
		s.mu.Lock()
		delete(s.kept, name)
		if !s.doomed[name] {
			s.doomed[name] = false // and no more is known
		}
		s.mu.Unlock()
		_, err := s.Destroy(ctx, name, 0)
		s.known(err)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.doomed[name] = s.doomed[name] || err == nil
	default:
		s.use(ctx, names[random.IntN(len(names))])
	}
}

// keep takes down that a key is acknowledged, with an envelope under its newest version
// when one is to be had.
func (s *memberStorm) keep(name string) {
	wrapped, err := s.Wrap(s.t.Context(), name, plaintextOf(name), nil)
	s.known(err)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, doomed := s.doomed[name]; doomed {
		return
	}
	if err != nil {
		wrapped = nil
	}
	s.kept[name] = append(s.kept[name], wrapped)
}

// use unwraps all that was wrapped under a key.
func (s *memberStorm) use(ctx context.Context, name string) {
	s.mu.Lock()
	envelopes := slices.Clone(s.kept[name])
	s.mu.Unlock()
	for _, wrapped := range envelopes {
		if wrapped == nil {
			continue
		}
		got, err := s.Unwrap(ctx, name, wrapped, nil)
		if err == nil && !bytes.Equal(got, plaintextOf(name)) {
			s.t.Errorf("key %s unwrapped %q", name, got)
		}
		s.known(err)
	}
}

// known fails the test for an error that says that a key is not there, or that its
// envelope is no good.
func (s *memberStorm) known(err error) {
	if errors.Is(err, kms.ErrNotFound) || errors.Is(err, api.ErrCorrupt) {
		s.t.Errorf("%v", err)
	}
}
