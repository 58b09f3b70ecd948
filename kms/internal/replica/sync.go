package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"kmsd/pluginproto"
)

// enoughRefusals is after how many refusals in a row, with nothing done in between,
// the rest is not tried: the token is full, perhaps.
const enoughRefusals = 16

var errNotTried = errors.New("it was not tried, because the member had refused one after the other")

// Sync brings one member in step. It lists the token once; after that only what a
// newer plan changes costs anything. What the member refuses is not tried again by the
// same Sync. All methods may be called concurrently, but for Apply.
type Sync struct {
	token Token
	meter meter
	pace  *pace

	mu        sync.Mutex                               // guards the rest
	held      map[pluginproto.KeyID]pluginproto.Object // :: identity → the key as the token says
	refused   map[pluginproto.KeyID]error              // :: identity → what could not be done, and why
	inARow    int                                      // refusals since something was done
	cloned    int
	changed   int
	destroyed []pluginproto.KeyID
}

// NewSync asks a member what it holds.
func NewSync(ctx context.Context, token Token) (*Sync, error) {
	objects, err := token.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the keys of member %s: %w", token.Name(), err)
	}
	s := &Sync{
		token:   token,
		pace:    new(pace),
		held:    make(map[pluginproto.KeyID]pluginproto.Object, len(objects)),
		refused: make(map[pluginproto.KeyID]error),
	}
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

// Compare tells what the member holds of a plan, and changes nothing.
func (s *Sync) Compare(plan Plan) Report {
	report, _ := s.compare(plan)
	return report
}

// Sources are the members that may supply a copy, the best first.
type Sources struct {
	Of func(Copy) []Token
	// Wrong is told of a source that turns out to have another key. It may be nil.
	Wrong func(source string, err error)
	// Gone reports whether a copy is wanted no more, because its key was destroyed since the
	// plan was made. Nil: all are wanted.
	Gone func(Copy) bool
}

// Apply makes the member hold what plan says: it destroys what is gone, sets labels
// right and clones what is missing from the first of its sources that can supply it.
// A copy that no source holds is reported as missing. What the member or every source
// refuses is reported too, and does not keep the rest from being done; only a member
// that is lost, and the end of ctx, are errors. A key with another value is left as it
// is and reported.
func (s *Sync) Apply(ctx context.Context, plan Plan, from Sources) (Report, error) {
	_, todo := s.compare(plan)
	s.meter.add(len(todo.gone) + len(todo.labels) + len(todo.missing))
	if err := s.destroyAll(ctx, todo.gone); err != nil {
		return Report{}, err
	}
	for _, c := range todo.labels {
		if err := s.label(ctx, c); err != nil {
			return Report{}, err
		}
		s.meter.done()
	}
	if err := s.cloneAll(ctx, todo.missing, from); err != nil {
		return Report{}, err
	}
	return s.Compare(plan), nil
}

// work is what is to be done to a member, but for what it has refused already.
type work struct {
	gone    []pluginproto.KeyID
	labels  []Copy
	missing []Copy
}

// compare holds what the token has said against a plan.
func (s *Sync) compare(plan Plan) (r Report, todo work) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := make(map[pluginproto.KeyID]bool, len(plan.Copies))
	add := func(list []Copy, c Copy) []Copy {
		if s.refused[c.ID] != nil {
			return list
		}
		return append(list, c)
	}
	for _, c := range plan.Copies {
		wanted[c.ID] = true
		o, ok := s.held[c.ID]
		switch {
		case !ok:
			r.Missing = append(r.Missing, c)
			todo.missing = add(todo.missing, c)
		case c.matches(o) != nil:
			r.Quarantined = append(r.Quarantined, Wrong{c, o})
		default:
			r.Held = append(r.Held, c)
			if o.Label != c.Label() {
				todo.labels = add(todo.labels, c)
			}
		}
	}
	for id, o := range s.held {
		switch {
		case wanted[id], plan.Open[id]: // when in doubt a key lives
		case !plan.Gone[id]:
			r.Foreign = append(r.Foreign, o)
		case s.refused[id] == nil:
			todo.gone = append(todo.gone, id)
		}
	}
	for id, err := range s.refused {
		if wanted[id] || plan.Gone[id] {
			r.Refused = append(r.Refused, Refusal{id, err})
		}
	}
	slices.SortFunc(r.Foreign, func(a, b pluginproto.Object) int { return compareIDs(a.ID, b.ID) })
	slices.SortFunc(r.Refused, func(a, b Refusal) int { return compareIDs(a.ID, b.ID) })
	r.Cloned, r.Changed, r.Destroyed = s.cloned, s.changed, slices.Clone(s.destroyed)
	return r, todo
}

func compareIDs(a, b pluginproto.KeyID) int { return slices.Compare(a[:], b[:]) }

// destroyAll destroys what is gone and the member still holds.
func (s *Sync) destroyAll(ctx context.Context, gone []pluginproto.KeyID) error {
	for _, id := range gone {
		err := s.token.Destroy(ctx, id)
		if err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			if err := s.refuse(ctx, id, fmt.Errorf("destroying %s on member %s: %w", id, s.token.Name(), err)); err != nil {
				return err
			}
			continue
		}
		s.mu.Lock()
		delete(s.held, id)
		s.destroyed = append(s.destroyed, id)
		s.inARow = 0
		s.mu.Unlock()
		s.meter.done()
	}
	return nil
}

// label sets the label of a copy right.
func (s *Sync) label(ctx context.Context, c Copy) error {
	want := c.Label()
	if err := s.token.SetAttributes(ctx, c.ID, pluginproto.Attributes{Label: &want}); err != nil {
		return s.refuse(ctx, c.ID, fmt.Errorf("setting the label of %s on member %s: %w", c, s.token.Name(), err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.held[c.ID]
	o.Label = want
	s.held[c.ID] = o
	s.changed++
	s.inARow = 0
	return nil
}

// refuse takes down what could not be done, so that the rest can go on. It returns the
// error when nothing can: the member is lost, or there is no time left.
func (s *Sync) refuse(ctx context.Context, id pluginproto.KeyID, err error) error {
	if ctx.Err() != nil || pluginproto.ClassOf(err) == pluginproto.ClassMember {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused[id] = err
	s.inARow++
	return nil
}

// emptied is the permanent failure of a member that holds none of the copies that it is
// known to have held: somebody has re-initialised its token. Filling it again would
// hide that, and whatever else has become of it.
func (s *Sync) emptied(copies []Copy) error {
	name, expected := s.token.Name(), 0
	for _, c := range copies {
		if !slices.Contains(c.Members, name) {
			continue
		}
		if _, ok := s.object(c.ID); ok {
			return nil
		}
		expected++
	}
	if expected == 0 {
		return nil
	}
	e := pluginproto.Errorf(pluginproto.ClassMember, "comparing member "+name+" with the catalog",
		"it holds none of its %d keys any more, so its token was re-initialised or is another one; it is not filled by itself:"+
			" bring the right token back, or accept this one with: kmsd member replace %s", expected, name)
	e.Permanent = true
	return e
}

func (s *Sync) object(id pluginproto.KeyID) (pluginproto.Object, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.held[id]
	return o, ok
}
