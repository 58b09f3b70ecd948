package chaos

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"kmsd/kms/api"
)

// Grace is how long after its deadline a request may be answered.
const Grace = 50 * time.Millisecond

// Rule is a promise that a run has broken.
type Rule string

const (
	Late        Rule = "a request outlived its deadline"
	Failed      Rule = "an idempotent request failed"
	Refused     Rule = "a key operation was refused for a reason that no fault is"
	NotFound    Rule = "a key that is there was reported as absent"
	OtherBytes  Rule = "other bytes came back than had gone in"
	BadSig      Rule = "a good signature was refused"
	Resurrected Rule = "a destroyed key works or is on a token"
	Served      Rule = "a disabled key was used"
	Lost        Rule = "an acknowledged key or envelope is lost"
	Reused      Rule = "a version number was used twice"
	TooFew      Rule = "a version was acknowledged on too few members"
	Different   Rule = "members hold different keys under one identity"
	Stray       Rule = "a token holds a key that the catalog does not know"
	Missing     Rule = "a token lacks a key"
	Unfinished  Rule = "an operation is still open"
)

// Violation is one breach of a promise.
type Violation struct {
	Rule Rule
	Text string
}

func (v Violation) String() string { return string(v.Rule) + ": " + v.Text }

// Check returns every breach of what kmsd promises, in a history and in what was found
// at the end. Unwraps of all envelopes that should work belong at the end of the history.
func Check(requests []Request, final Final) []Violation {
	final.Stalls = merge(final.Stalls)
	c := &checker{lives: map[string]*life{}, plain: map[string]string{}, final: final}
	c.read(requests)
	for _, r := range requests {
		c.request(r)
	}
	c.numbers()
	c.envelopes(requests)
	c.ends()
	c.tokens()
	c.bytes()
	c.named(requests)
	return c.found
}

// life is what happened to one key.
type life struct {
	created   time.Time // when that was acknowledged; zero: never
	tried     time.Time // when a creation was first asked for
	changes   []change  // that make it unusable, or usable again
	destroyed time.Time // when that was acknowledged; zero: never
	doomed    bool      // a destruction was at least asked for
	versions  []Request // that were acknowledged
	named     bool      // it is a data key of a database
}

type change struct {
	op         Op
	start, end time.Time
	acked      bool
}

type checker struct {
	lives map[string]*life
	plain map[string]string // envelope → what is in it
	final Final
	found []Violation
}

func (c *checker) report(rule Rule, format string, args ...any) {
	c.found = append(c.found, Violation{rule, fmt.Sprintf(format, args...)})
}

func (c *checker) life(key string) *life {
	l := c.lives[key]
	if l == nil {
		l = &life{}
		c.lives[key] = l
	}
	return l
}

// read collects what the requests say of keys and envelopes.
func (c *checker) read(requests []Request) {
	for _, r := range requests {
		l := c.life(r.Key)
		switch r.Op {
		case Create:
			if l.tried.IsZero() || r.Start.Before(l.tried) {
				l.tried = r.Start
			}
			if r.acknowledged() {
				l.created = r.End
				l.versions = append(l.versions, r)
			}
		case Rotate, Rekey:
			if r.acknowledged() {
				l.versions = append(l.versions, r)
			}
		case PutNamed, RotateNamed:
			l.named = true
			if r.acknowledged() {
				if l.created.IsZero() || r.End.Before(l.created) {
					l.created = r.End
				}
				l.versions = append(l.versions, r)
			}
		case Destroy:
			l.doomed = true
			if r.acknowledged() && (l.destroyed.IsZero() || r.End.Before(l.destroyed)) {
				l.destroyed = r.End
			}
			l.changes = append(l.changes, change{r.Op, r.Start, r.End, r.acknowledged()})
		case Disable, Enable:
			l.changes = append(l.changes, change{r.Op, r.Start, r.End, r.acknowledged()})
		case Wrap, DataKey:
			if r.acknowledged() {
				c.plain[r.Envelope] = r.Plain
			}
		}
	}
	// By now every wrap is known; a rewrap follows the envelope it was given.
	for _, r := range requests {
		if r.Op == Rewrap && r.acknowledged() {
			c.plain[r.Envelope] = c.plain[r.From]
		}
	}
}

// request checks one request by itself.
func (c *checker) request(r Request) {
	l := c.life(r.Key)
	name := fmt.Sprintf("%s %s at %s", r.Op, r.Key, r.Start.Format("15:04:05.000"))
	if late := c.late(r); late > Grace {
		c.report(Late, "%s was answered %v after its deadline of %v, %v of which count: %s: %s", name, r.End.Sub(r.Deadline), r.Deadline.Sub(r.Start), late, r.Code, r.Message)
	}
	if r.Code == api.CodeNotFound && !l.created.IsZero() && l.created.Before(r.Start) {
		c.report(NotFound, "%s: %s", name, r.Message)
	}
	if !r.acknowledged() {
		switch {
		case l.excuses(r):
		case r.Op.idempotent():
			c.report(Failed, "%s after %v: %s: %s", name, r.End.Sub(r.Start), r.Code, r.Message)
		case !passing(r.Code):
			c.report(Refused, "%s after %v: %s: %s", name, r.End.Sub(r.Start), r.Code, r.Message)
		}
		return
	}
	if !l.destroyed.IsZero() && r.Start.After(l.destroyed) && r.Op != Destroy {
		c.report(Resurrected, "%s was answered after the destruction of %s was", name, l.destroyed.Format("15:04:05.000"))
	}
	if r.Op.idempotent() && l.disabledDuring(r) {
		c.report(Served, "%s", name)
	}
	switch want, known := c.plain[r.Envelope]; {
	case r.Op == Unwrap && !known:
		c.report(OtherBytes, "%s opened an envelope that nobody was given", name)
	case r.Op == Unwrap && r.Plain != want:
		c.report(OtherBytes, "%s returned %s for %s", name, r.Plain, want)
	case r.Op == VerifySignature && !r.Valid:
		c.report(BadSig, "%s", name)
	}
	if (r.Op == Create || r.Op == Rotate) && len(r.Copies) < r.Least {
		c.report(TooFew, "%s: version %d is on %v, of which there must be %d", name, r.Version, r.Copies, r.Least)
	}
}

// late is how long after its deadline a request was answered, without the time in which
// nobody was looking.
func (c *checker) late(r Request) time.Duration {
	over := latest(r.Deadline, r.Expired)
	late := r.End.Sub(over)
	for _, s := range c.final.Stalls {
		from, to := latest(s.From, over), earliest(s.To, r.End)
		late -= max(0, to.Sub(from))
	}
	return late
}

// merge returns the same times without those that are told twice.
func merge(stalls []Stall) (merged []Stall) {
	for _, s := range slices.SortedFunc(slices.Values(stalls), func(a, b Stall) int { return a.From.Compare(b.From) }) {
		if last := len(merged) - 1; last >= 0 && !s.From.After(merged[last].To) {
			merged[last].To = latest(merged[last].To, s.To)
		} else {
			merged = append(merged, s)
		}
	}
	return merged
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// excuses says whether a failed request had to be expected: the key was not there for
// certain yet, was made before, or may have been disabled or destroyed.
func (l *life) excuses(r Request) bool {
	if (r.Hurried || r.Vault) && passing(r.Code) {
		return true
	}
	switch r.Code {
	case api.CodeNotFound:
		return l.created.IsZero() || !l.created.Before(r.Start)
	case api.CodeExists:
		return r.Op == Create && l.tried.Before(r.Start)
	case api.CodeState:
		if r.Op == Rekey { // one that was not acknowledged may be under way
			return true
		}
		// It may be until a later change is known to have taken it back.
		return slices.ContainsFunc(l.changes, func(ch change) bool { return ch.op != Enable && ch.start.Before(r.End) })
	default:
		return false
	}
}

// passing says whether a failure is one that may pass, as every fault of a run does.
func passing(code api.Code) bool { return api.NewError(code, "", nil).Retryable }

// disabledDuring says whether the key was disabled for certain all the time.
func (l *life) disabledDuring(r Request) bool {
	disabled := false
	for _, ch := range l.changes { // in the order of their starts
		switch {
		case ch.op == Disable && ch.acked && ch.end.Before(r.Start):
			disabled = true
		case ch.op == Enable && ch.start.Before(r.End):
			disabled = false
		}
	}
	return disabled
}

// numbers checks that versions count up and that no number was given twice.
func (c *checker) numbers() {
	for _, key := range slices.Sorted(maps.Keys(c.lives)) {
		given := map[int]Request{}
		for _, v := range c.lives[key].versions {
			if before, ok := given[v.Version]; ok {
				c.report(Reused, "version %d of %s was acknowledged at %s and at %s", v.Version, key,
					before.End.Format("15:04:05.000"), v.End.Format("15:04:05.000"))
			}
			for number, before := range given {
				if number > v.Version && before.End.Before(v.Start) {
					c.report(Reused, "version %d of %s was made after version %d", v.Version, key, number)
				}
			}
			given[v.Version] = v
		}
	}
}

// envelopes checks that each that was handed out was opened once more at the end,
// unless its key has been, or may have been, destroyed.
func (c *checker) envelopes(requests []Request) {
	last := map[string]Request{}
	for _, r := range requests {
		if r.Op == Unwrap {
			last[r.Envelope] = r
		}
	}
	for _, r := range requests {
		if !r.acknowledged() || r.Envelope == "" || r.Op == Unwrap || c.life(r.Key).doomed {
			continue
		}
		switch end, ok := last[r.Envelope]; {
		case !ok:
			c.report(Lost, "an envelope of %s, %s, was not opened at the end", r.Key, r.Envelope)
		case !end.acknowledged():
			c.report(Lost, "an envelope of %s, %s, does not open at the end: %s: %s", r.Key, r.Envelope, end.Code, end.Message)
		}
	}
}

// ends checks what kmsd says of each key.
func (c *checker) ends() {
	for _, key := range slices.Sorted(maps.Keys(c.lives)) {
		l := c.lives[key]
		state, there := c.final.States[key]
		switch {
		case l.named: // see dataKeys
		case !l.created.IsZero() && !there:
			c.report(Lost, "key %s is not there any more", key)
		case !l.destroyed.IsZero() && state != api.StateDestroyed:
			c.report(Resurrected, "key %s was destroyed and is %s", key, state)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(c.final.Unverified)) {
		c.report(Different, "verifying %s: %s", key, c.final.Unverified[key])
	}
	for _, what := range c.final.Open {
		c.report(Unfinished, "%s", what)
	}
}

// tokens compares what is on the tokens with the catalog.
func (c *checker) tokens() {
	for _, member := range slices.Sorted(maps.Keys(c.final.Tokens)) {
		held := c.final.Tokens[member]
		for _, id := range slices.Sorted(maps.Keys(held)) {
			want, living := c.final.Living[id]
			switch {
			case c.final.Known[id]:
			case living && held[id] != want:
				c.report(Different, "%s holds %s with check value %s, the catalog has %s", member, id, held[id], want)
			case c.final.Gone[id]:
				c.report(Resurrected, "%s holds %s, which was destroyed", member, id)
			case !living:
				c.report(Stray, "%s holds %s", member, id)
			}
		}
		for _, id := range slices.Sorted(maps.Keys(c.final.Living)) {
			if _, ok := held[id]; !ok {
				c.report(Missing, "%s does not hold %s", member, id)
			}
		}
	}
}

// bytes compares what the keys on the tokens are, whatever their drivers say of them.
func (c *checker) bytes() {
	first := map[string]string{} // :: identity → the member that showed it
	for _, member := range slices.Sorted(maps.Keys(c.final.Bytes)) {
		held := c.final.Bytes[member]
		for _, id := range slices.Sorted(maps.Keys(held)) {
			other, seen := first[id]
			_, living := c.final.Living[id]
			switch {
			case c.final.Known[id]:
			case seen && c.final.Bytes[other][id] != held[id]:
				c.report(Different, "the bytes of %s on %s are not those on %s", id, member, other)
			case c.final.Gone[id]:
				c.report(Resurrected, "%s keeps %s, which was destroyed", member, id)
			case !living:
				c.report(Stray, "%s keeps %s", member, id)
			}
			if !seen {
				first[id] = member
			}
		}
		for _, id := range slices.Sorted(maps.Keys(c.final.Living)) {
			if _, ok := held[id]; !ok {
				c.report(Missing, "%s does not keep %s", member, id)
			}
		}
	}
}
