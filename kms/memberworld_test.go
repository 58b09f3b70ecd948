package kms_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"kmsd/internal/memdriver"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// check holds the tokens of the world against the catalog, while kmsd does not run.
func (s *memberStorm) check() {
	s.t.Helper()
	living := s.living()
	c := catalog.New(s.disk.Reopen())
	for name := range s.kept {
		rec, err := c.Key(s.t.Context(), name)
		if err != nil {
			s.t.Errorf("key %s was acknowledged: %v", name, err)
		}
		if n := len(rec.Versions); n < len(s.kept[name]) {
			s.t.Errorf("key %s has %d versions, and %d were acknowledged", name, n, len(s.kept[name]))
		}
		for _, v := range rec.Versions {
			if v.State == catalog.Destroyed {
				s.t.Errorf("key %s version %d is destroyed", name, v.Number)
			}
		}
	}
	for name, sure := range s.doomed {
		if !sure {
			continue
		}
		if rec, err := c.Key(s.t.Context(), name); err != nil || rec.Versions[0].State != catalog.Destroyed {
			s.t.Errorf("key %s lives again: %+v, %v", name, rec, err)
		}
	}
	values := make(map[pluginproto.KeyID][]string) // :: identity → tokens with the right value
	for _, h := range s.hsms {
		for _, o := range s.objects(h) {
			v, ok := living[o.ID]
			switch {
			case ok && bytes.Equal(o.CheckValue, v.CheckValue):
				values[o.ID] = append(values[o.ID], h.name)
			case ok && s.corrupt[v.Identity] != h.name:
				s.t.Errorf("%s holds another key under identity %s", h.name, o.ID)
			}
		}
	}
	for id, v := range living {
		if len(values[id]) == 0 {
			s.t.Errorf("%s, known to be on %v, is nowhere in the world", v.Identity, v.Copies)
		}
	}
	for label, token := range s.strangers {
		if !slices.ContainsFunc(s.objects(s.spare[token]), func(o pluginproto.Object) bool { return o.Label == label }) {
			if _, err := c.Key(s.t.Context(), label); err != nil { // it may be adopted
				s.t.Errorf("object %s of %s is gone", label, token)
			}
		}
	}
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// living returns the versions that the catalog says are not destroyed.
func (s *memberStorm) living() map[pluginproto.KeyID]catalog.Version {
	all := make(map[pluginproto.KeyID]catalog.Version)
	for rec, err := range catalog.New(s.disk.Reopen()).Keys(s.t.Context(), "", "", 0) {
		if err != nil {
			s.t.Fatal(err)
		}
		for _, v := range rec.Versions {
			if id, err := pluginproto.ParseKeyID(v.Identity); err == nil && v.State != catalog.Destroyed {
				all[id] = v
			}
		}
	}
	return all
}

func (s *memberStorm) objects(h *hsm) []pluginproto.Object {
	d := memdriver.New(memdriver.Options{Token: h.token})
	defer d.Kill()
	objects, err := openAs(s.t, d).List(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return objects
}

// edit changes the file and the tokens while kmsd does not run.
func (s *memberStorm) edit() {
	random := s.random
	what := random.IntN(4)
	if s.gentle && what == 0 {
		what = 1
	}
	switch what {
	case 0: // others, in another order, some under another name
		s.group.Members = nil
		for _, i := range random.Perm(len(s.tokens))[:1+random.IntN(4)] {
			name := s.tokens[i]
			if random.IntN(4) == 0 {
				name = fmt.Sprint("f-", random.IntN(3), i)
			}
			s.group.Members = append(s.group.Members, s.entry(name, s.tokens[i]))
		}
	case 1: // the names stay, and the tokens change places
		for i, j := range random.Perm(len(s.group.Members)) {
			s.group.Members[i].Source = fmt.Sprint("file:", random.IntN(3))
			s.group.Members[i].Standby = j == 0
		}
	}
	h := s.hsms[random.IntN(len(s.hsms))]
	if random.IntN(2) == 0 {
		s.n++
		label := fmt.Sprint("stranger-", s.n)
		d := memdriver.New(memdriver.Options{Token: h.token})
		defer d.Kill()
		id := pluginproto.KeyID{0xFF, byte(s.n >> 8), byte(s.n)}
		if _, err := openAs(s.t, d).Generate(s.t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256, Label: label}); err != nil {
			s.t.Fatal(err)
		}
		s.strangers[label] = h.name
	}
	if random.IntN(2) == 0 {
		s.damage(h)
	}
}

// damage takes a copy off a token, or puts another key in its place, when another token
// has it too.
func (s *memberStorm) damage(h *hsm) {
	living := s.living()
	for _, id := range h.token.Keys() {
		v, ok := living[id]
		if !ok || s.corrupt[v.Identity] != "" {
			continue
		}
		for _, other := range s.hsms {
			if other != h && other.holds(id) {
				if s.random.IntN(2) == 0 {
					h.token.Lose(id)
				} else {
					h.token.Corrupt(id)
					s.corrupt[v.Identity] = h.name
				}
				return
			}
		}
	}
}

// reunite puts all tokens into one group and checks that each holds what it should.
func (s *memberStorm) reunite() {
	c := catalog.New(s.disk.Reopen())
	for m, err := range c.Members(s.t.Context(), "default") {
		if err != nil {
			s.t.Fatal(err)
		}
		if err := c.ForgetMember(s.t.Context(), "default", m.Name); err != nil {
			s.t.Fatal(err)
		}
	}
	s.group.Members = nil
	for _, label := range s.tokens {
		s.group.Members = append(s.group.Members, s.entry("last-"+label, label))
	}
	s.mustStart()
	defer s.stop()
	s.wantStates(active, active, active, active, active, active)
	s.eventually(s.together)
	for name := range s.kept {
		s.use(s.t.Context(), name)
	}
	s.t.Logf("%d keys are left, %d are destroyed, %d objects are nobody's", len(s.kept), len(s.doomed), len(s.strangers))
}

func (s *memberStorm) together() error {
	living := s.living()
	for _, h := range s.hsms {
		right := 0
		for _, o := range s.objects(h) {
			v, ok := living[o.ID]
			switch {
			case ok && (s.corrupt[v.Identity] == h.name || bytes.Equal(o.CheckValue, v.CheckValue)):
				right++
			case ok:
				return fmt.Errorf("%s holds another key under identity %s", h.name, o.ID)
			case s.strangers[o.Label] == "" && o.Label != "kmsd canary": // one may be left where another token has the name now
				return fmt.Errorf("%s holds object %s (%s), which the catalog does not know", h.name, o.ID, o.Label)
			}
		}
		if right != len(living) {
			return fmt.Errorf("%s holds %d of %d keys", h.name, right, len(living))
		}
	}
	c := catalog.New(s.disk.Reopen())
	for t, err := range c.Tombstones(s.t.Context()) {
		if err != nil || len(t.Pending) > 0 && !t.IsCanary() { // those may name a member that was
			return errors.Join(err, fmt.Errorf("the tombstone of key %s version %d is pending on %v", t.Key, t.Version, t.Pending))
		}
	}
	for in, err := range c.Intents(s.t.Context()) {
		return errors.Join(err, fmt.Errorf("an intent for key %s is left", in.Key))
	}
	return nil
}
