package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"kmsd/pluginproto"
)

// clonesAtOnce is how many copies are relayed to one member at a time, each in a transfer
// of its own. A token does one thing at a time, so more only fill the wait between the two
// ends. Of transfers that carry many copies there is one at a time: whoever changes keys on
// the member besides waits for its steps, and not for several.
const clonesAtOnce = 4

// cloneAll brings copies over, in transfers of as many as the tokens can. What has not come
// so goes alone, as if nothing had been tried: from another source, or past what was wrong
// with one of the others. So each copy is refused on its own account, and a transfer costs
// nothing but itself.
func (s *Sync) cloneAll(ctx context.Context, copies []Copy, from Sources) error {
	var alone []Copy
	for len(copies) > 0 {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		source := s.pick(copies[0], from)
		if source == nil || Together(source, s.token) < 2 {
			alone, copies = append(alone, copies[0]), copies[1:]
			continue
		}
		batch, rest := s.gather(copies, source.Name(), s.pace.atMost(Together(source, s.token)), from)
		began := time.Now()
		left, err := s.fetchTogether(ctx, source, batch)
		s.pace.took(len(batch), time.Since(began), err != nil)
		s.recall(ctx, batch, from)
		if err == nil {
			err = s.fetchEach(ctx, left, from)
		}
		if err != nil {
			return err
		}
		copies = rest
	}
	return s.fetchEach(ctx, alone, from)
}

// pick returns the source that is asked for a copy first, of those that share a protocol
// with the member: the best that is known to hold it, or else the best. Nil when there is
// none.
func (s *Sync) pick(c Copy, from Sources) (first Token) {
	for _, t := range from.Of(c) {
		if t.Name() == s.token.Name() || Together(t, s.token) == 0 {
			continue
		}
		if slices.Contains(c.Members, t.Name()) {
			return t
		}
		if first == nil {
			first = t
		}
	}
	return first
}

// gather returns the first copies that one source is asked for first, at most so many, and
// all others. It looks no further than it has to.
func (s *Sync) gather(copies []Copy, source string, most int, from Sources) (batch, rest []Copy) {
	for i, c := range copies {
		if len(batch) == most {
			return batch, append(rest, copies[i:]...)
		}
		if t := s.pick(c, from); t != nil && t.Name() == source {
			batch = append(batch, c)
		} else {
			rest = append(rest, c)
		}
	}
	return batch, rest
}

// fetchTogether clones copies in one transfer, and returns those that have not come. What
// ends all of it is an error, as in refuse.
func (s *Sync) fetchTogether(ctx context.Context, source Token, batch []Copy) (left []Copy, err error) {
	if len(batch) < 2 || s.refusesAll() {
		return batch, nil
	}
	for i, got := range CloneTogether(ctx, source, s.token, batch) {
		switch {
		case got.Err == nil, errors.Is(got.Err, ErrDifferent):
			if err := s.note(ctx, batch[i], got.Object, got.Err); err != nil {
				return nil, err
			}
		case ctx.Err() != nil || pluginproto.ClassOf(got.Err) == pluginproto.ClassMember:
			return nil, got.Err
		default:
			left = append(left, batch[i])
		}
	}
	return left, nil
}

// fetchEach clones copies one by one, several at a time.
func (s *Sync) fetchEach(ctx context.Context, copies []Copy, from Sources) error {
	tasks, each := errgroup.WithContext(ctx)
	tasks.SetLimit(clonesAtOnce)
	for _, c := range copies {
		if each.Err() != nil {
			break
		}
		tasks.Go(func() error { return s.fetch(each, c, from) })
	}
	if err := tasks.Wait(); err != nil {
		return err
	}
	return ctx.Err() // the rest was not begun, and nothing that was may have noticed
}

// fetch clones one copy from the first source that has it.
func (s *Sync) fetch(ctx context.Context, c Copy, from Sources) error {
	if s.refusesAll() {
		return s.refuse(ctx, c.ID, fmt.Errorf("cloning %s to member %s: %w", c, s.token.Name(), errNotTried))
	}
	defer s.recall(ctx, []Copy{c}, from)
	object, found, err := Fetch(ctx, s.token, c, from.Of(c), from.Wrong)
	if err == nil && !found {
		return nil
	}
	return s.note(ctx, c, object, err)
}

// recallTimeout is how long the member may take to destroy what it should not have got.
const recallTimeout = 10 * time.Second

// recall destroys what came, or may have come without an answer, while its key was destroyed:
// whoever did that has not found it on the member. A key that is destroyed from now on is
// found. What cannot be destroyed now is when the member is compared the next time.
func (s *Sync) recall(ctx context.Context, copies []Copy, from Sources) {
	for _, c := range copies {
		if from.Gone == nil || !from.Gone(c) {
			continue
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recallTimeout)
		err := s.token.Destroy(ctx, c.ID)
		cancel()
		if err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			continue
		}
		s.mu.Lock()
		delete(s.held, c.ID)
		if err == nil {
			s.destroyed = append(s.destroyed, c.ID)
		}
		s.mu.Unlock()
	}
}

// note takes down what has become of a copy.
func (s *Sync) note(ctx context.Context, c Copy, object pluginproto.Object, err error) error {
	switch {
	case errors.Is(err, ErrDifferent) && object.ID == c.ID:
		// What the target made of it is not what the source gave: left for a person.
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held[c.ID] = object
		return nil
	case err != nil:
		return s.refuse(ctx, c.ID, err)
	}
	s.mu.Lock()
	s.held[c.ID] = object
	s.cloned++
	s.inARow = 0
	s.mu.Unlock()
	s.meter.done()
	if object.Label != c.Label() {
		return s.label(ctx, c)
	}
	return nil
}

func (s *Sync) refusesAll() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inARow >= enoughRefusals
}
