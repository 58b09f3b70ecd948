package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"kmsd/pluginproto"
)

// clonesAtOnce is how many copies are relayed to one member at a time. A token
// does one thing at a time, so more only fill the wait between the two ends.
const clonesAtOnce = 4

// Sync brings one member in step. It lists the token once; after that only what a
// newer plan changes costs anything.
type Sync struct {
	token Token

	mu   sync.Mutex                               // guards held
	held map[pluginproto.KeyID]pluginproto.Object // :: identity → the key as the token says
}

// NewSync asks a member what it holds.
func NewSync(ctx context.Context, token Token) (*Sync, error) {
	objects, err := token.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the keys of member %s: %w", token.Name(), err)
	}
	s := &Sync{token: token, held: make(map[pluginproto.KeyID]pluginproto.Object, len(objects))}
	for _, o := range objects {
		s.held[o.ID] = o
	}
	return s, nil
}

// Holds reports whether the member has the right copy.
func (s *Sync) Holds(c Copy) bool {
	o, ok := s.object(c.ID)
	return ok && c.matches(o) == nil
}

// Apply makes the member hold what plan says: it destroys what is gone and clones
// what is missing from the first of its sources that can supply it. A key with
// another check value is an error, with [ErrDifferent], before anything is
// changed. A copy that no source holds is reported as missing; a copy that a
// source holds but that could not be brought over is an error.
func (s *Sync) Apply(ctx context.Context, plan Plan, sources func(Copy) []Token) (Report, error) {
	missing, err := s.compare(plan)
	if err != nil {
		return Report{}, err
	}
	var report Report
	if report.Destroyed, err = s.destroyGone(ctx, plan); err != nil {
		return Report{}, err
	}
	if report.Missing, err = s.cloneAll(ctx, missing, sources); err != nil {
		return Report{}, err
	}
	report.Cloned = len(missing) - len(report.Missing)

	known := 0
	for _, c := range plan.Copies {
		if _, ok := s.object(c.ID); ok {
			report.Held = append(report.Held, c)
			known++
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.held {
		if plan.Open[id] || plan.Gone[id] {
			known++
		}
	}
	report.Foreign = len(s.held) - known
	return report, nil
}

// compare returns the copies that are missing, or an error that names the wrong
// ones.
func (s *Sync) compare(plan Plan) (missing []Copy, err error) {
	var faults []error
	for _, c := range plan.Copies {
		o, ok := s.object(c.ID)
		if !ok {
			missing = append(missing, c)
		} else if fault := c.matches(o); fault != nil {
			faults = append(faults, fault)
		}
	}
	if faults != nil {
		return nil, different(s.token.Name(), faults)
	}
	return missing, nil
}

// destroyGone destroys what the plan says is gone and the member still holds.
func (s *Sync) destroyGone(ctx context.Context, plan Plan) ([]pluginproto.KeyID, error) {
	wanted := make(map[pluginproto.KeyID]bool, len(plan.Copies))
	for _, c := range plan.Copies {
		wanted[c.ID] = true
	}
	var doomed []pluginproto.KeyID
	s.mu.Lock()
	for id := range s.held {
		if plan.Gone[id] && !wanted[id] { // when in doubt a key lives
			doomed = append(doomed, id)
		}
	}
	s.mu.Unlock()
	for _, id := range doomed {
		if err := s.token.Destroy(ctx, id); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			return nil, fmt.Errorf("destroying %s on member %s: %w", id, s.token.Name(), err)
		}
		s.mu.Lock()
		delete(s.held, id)
		s.mu.Unlock()
	}
	return doomed, nil
}

// cloneAll brings copies over and returns those that no source holds.
func (s *Sync) cloneAll(ctx context.Context, copies []Copy, sources func(Copy) []Token) ([]Copy, error) {
	orphan := make([]bool, len(copies)) // by index in copies
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.SetLimit(clonesAtOnce)
	for i, c := range copies {
		tasks.Go(func() error {
			found, err := s.fetch(ctx, c, sources(c))
			orphan[i] = !found
			return err
		})
	}
	if err := tasks.Wait(); err != nil {
		return nil, err
	}
	var orphans []Copy
	for i, c := range copies {
		if orphan[i] {
			orphans = append(orphans, c)
		}
	}
	return orphans, nil
}

// fetch clones one copy from the first source that has it.
func (s *Sync) fetch(ctx context.Context, c Copy, sources []Token) (found bool, err error) {
	object, found, err := Fetch(ctx, s.token, c, sources)
	if found {
		s.mu.Lock()
		s.held[c.ID] = object
		s.mu.Unlock()
	}
	return found, err
}

// Fetch clones a copy to a member from the first source that can supply it. It
// answers not found, without an error, when no source holds it.
func Fetch(ctx context.Context, to Token, c Copy, sources []Token) (_ pluginproto.Object, found bool, err error) {
	var failures []error
	for _, from := range sources {
		if from.Name() == to.Name() {
			continue
		}
		object, err := Clone(ctx, from, to, c)
		if err == nil {
			return object, true, nil
		}
		source, atSource := errors.AsType[*SourceError](err)
		if !atSource {
			return pluginproto.Object{}, false, err
		}
		if pluginproto.ClassOf(source.Err) != pluginproto.ClassNotFound {
			failures = append(failures, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return pluginproto.Object{}, false, errors.Join(failures...)
}

func (s *Sync) object(id pluginproto.KeyID) (pluginproto.Object, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.held[id]
	return o, ok
}
