package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// defaultPatience is how long a member that lacks copies waits for others to come
// that may have them, when none that is connected has.
const defaultPatience = 2 * time.Second

// Book says what members should hold and remembers what they do hold.
type Book interface {
	// Plan returns what members should hold at this moment.
	Plan(ctx context.Context) (Plan, error)
	// Learn writes down which copies a member holds after the bulk of the work, without
	// the group's lease, so that little is left for Note.
	Learn(ctx context.Context, member string, report Report) error
	// Note writes down what a member holds: it is called under the group's lease,
	// with the plan that the member was compared with, just before the member is
	// admitted.
	Note(ctx context.Context, member string, plan Plan, report Report) error
}

// Admission decides when a member that has connected may serve.
//
// A member is admitted when it holds every copy that any connected member can
// supply, and nothing that is gone. Copies that nobody connected can supply do not
// keep it out: then the choice is between a member that serves all other keys and
// none at all. They are in the report as missing, and are brought over as soon as a
// holder is there. When members start together and each lacks something that
// another has, they supply each other, since a copy is as good as its check value
// on a member that is not in step yet, too.
//
// What a member refuses fails its attempt once, when all else is done: a new driver
// often mends it, and has only that left to do. When it does not, the member is
// admitted without, with an alarm: one key that does not fit on a token must not take
// all others away from it. A copy with another value is quarantined and keeps nobody
// out either. A member that has lost every key is not filled again by itself.
type Admission struct {
	book     Book
	inStep   func() []Token
	members  func() int
	distrust func(member string, why error)
	bar      func(member string, ids []pluginproto.KeyID)
	gone     func(Copy) bool
	patience time.Duration
	log      hclog.Logger
	events   func(api.Event)

	mu       sync.Mutex
	waiting  map[string]*Sync  // :: member → what it holds, while it is being admitted
	found    map[string]Report // :: member → how its last admission found it; without what it holds
	balked   map[string]bool   // members whose last attempt failed because of what they refused
	paces    map[string]*pace  // :: member → how many keys it takes at a time
	observed chan struct{}     // closed and replaced when waiting changes
}

// Config is what NewAdmission needs.
type Config struct {
	Book Book
	// InStep returns the members that serve or stand by; they are preferred as
	// sources, in this order.
	InStep func() []Token
	// Members returns how many members the group has.
	Members func() int
	// Distrust takes a member out whose copy turns out to be another key. Nil: nobody
	// does.
	Distrust func(member string, why error)
	// Bar has the copies of a member used no more that turn out to be other keys, while
	// its admission goes on: it may be in step already. Nil: nobody does.
	Bar func(member string, ids []pluginproto.KeyID)
	// Gone reports whether the key of a copy that a plan had was destroyed since. Nil: none is.
	Gone func(Copy) bool
	// Patience is how long a member waits for others that may supply what it lacks.
	// Zero means 2 s.
	Patience time.Duration
	Logger   hclog.Logger // nil means silence
	// Events gets the progress of each member, at most twice a second and at its end,
	// and alarms. The group's name is left to be filled in. Nil: nobody listens.
	Events func(api.Event)
}

// NewAdmission returns the door of a group.
func NewAdmission(cfg Config) *Admission {
	if cfg.Patience == 0 {
		cfg.Patience = defaultPatience
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.Bar == nil {
		cfg.Bar = func(string, []pluginproto.KeyID) {}
	}
	if cfg.Events == nil {
		cfg.Events = func(api.Event) {}
	}
	return &Admission{
		book: cfg.Book, inStep: cfg.InStep, members: cfg.Members, distrust: cfg.Distrust, bar: cfg.Bar, gone: cfg.Gone,
		patience: cfg.Patience, log: cfg.Logger, events: cfg.Events,
		waiting:  make(map[string]*Sync),
		found:    make(map[string]Report),
		balked:   make(map[string]bool),
		paces:    make(map[string]*pace),
		observed: make(chan struct{}),
	}
}

// Admit brings a member in step. It is called first with last false, while keys
// may still be made and destroyed, and does the bulk; then with last true, under
// the group's lease, when it does what has changed since. An error keeps the member
// out. The report is complete when last is true.
func (a *Admission) Admit(ctx context.Context, member Token, last bool) (_ Report, err error) {
	defer func() {
		if last || err != nil {
			a.Moved(member.Name())
		}
	}()
	if !last {
		return Report{}, a.bulk(ctx, member)
	}
	s := a.enrolled(member)
	if s == nil {
		if s, err = a.list(ctx, member); err != nil {
			return Report{}, err
		}
	}
	plan, err := a.plan(ctx, member)
	if err != nil {
		return Report{}, err
	}
	report, err := s.Apply(ctx, plan, a.sources())
	if err != nil {
		return Report{}, err
	}
	if err := a.book.Note(ctx, member.Name(), plan, report); err != nil {
		return Report{}, noting(member, err)
	}
	a.conclude(member.Name(), s, report)
	return report, nil
}

// bulk lists the member and brings over what others have, and waits a little for
// others when it lacks what nobody has yet.
func (a *Admission) bulk(ctx context.Context, member Token) (err error) {
	s, err := a.list(ctx, member)
	if err != nil {
		return err
	}
	plan, err := a.plan(ctx, member)
	if err != nil {
		return err
	}
	if s, plan, err = a.checkEmptied(ctx, member, s, plan); err != nil {
		return err
	}
	if wrong := s.Compare(plan).Quarantined; len(wrong) > 0 {
		a.bar(member.Name(), identities(wrong))
	}
	a.enrol(member.Name(), s)
	defer func() { a.tellEnd(member.Name(), s, err) }()
	patience := time.NewTimer(a.patience)
	defer patience.Stop()
	for {
		changed := a.change()
		report, err := s.Apply(ctx, plan, a.sources())
		if err != nil {
			return err
		}
		if len(report.Missing) <= len(report.Refused) || a.complete() {
			return a.settle(ctx, member, report)
		}
		select {
		case <-changed:
		case <-patience.C:
			return a.settle(ctx, member, report)
		case <-ctx.Done():
			return ctx.Err()
		}
		if plan, err = a.plan(ctx, member); err != nil {
			return err
		}
	}
}

// checkEmptied returns a permanent failure for a member that has lost every key. A member
// in step was listed before the plan was read, and its first key may have been made in
// between. So a suspicion is looked into with another list and plan, which are the ones
// to go on with when it was wrong: lost is what both plans knew the member to hold.
func (a *Admission) checkEmptied(ctx context.Context, member Token, s *Sync, before Plan) (*Sync, Plan, error) {
	if s.emptied(before.Copies) == nil {
		return s, before, nil
	}
	s, err := a.list(ctx, member)
	if err != nil {
		return nil, Plan{}, err
	}
	plan, err := a.plan(ctx, member)
	if err != nil {
		return nil, Plan{}, err
	}
	known := make(map[pluginproto.KeyID]bool)
	for _, c := range plan.Copies {
		known[c.ID] = slices.Contains(c.Members, member.Name())
	}
	return s, plan, s.emptied(slices.DeleteFunc(slices.Clone(before.Copies), func(c Copy) bool { return !known[c.ID] }))
}

// settle writes down what the bulk has come to, and decides whether it is enough.
func (a *Admission) settle(ctx context.Context, member Token, r Report) error {
	if err := a.book.Learn(ctx, member.Name(), r); err != nil {
		return noting(member, err)
	}
	return a.endure(member.Name(), r)
}

func noting(member Token, err error) error {
	return fmt.Errorf("noting what member %s holds: %w", member.Name(), err)
}

// endure decides whether a member is admitted in spite of what it has refused: not at
// the first attempt.
func (a *Admission) endure(member string, r Report) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.balked[member]
	a.balked[member] = len(r.Refused) > 0
	if len(r.Refused) == 0 || before {
		return nil
	}
	return fmt.Errorf("bringing member %s in step: %w", member, refusals(r.Refused))
}

// Compare asks a member what it holds and compares that with the catalog. It changes
// nothing, and remembers nothing.
func (a *Admission) Compare(ctx context.Context, member Token) (Report, error) {
	s, err := NewSync(ctx, member)
	if err != nil {
		return Report{}, err
	}
	plan, err := a.plan(ctx, member)
	if err != nil {
		return Report{}, err
	}
	return s.Compare(plan), nil
}

// Found returns how the last admission of a member found it, but for the list of what
// it holds. It reports false when there was none yet.
func (a *Admission) Found(member string) (Report, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r, ok := a.found[member]
	return r, ok
}

// Quarantined reports whether the copy of an identity on a member was found to be
// another key when the member was admitted.
func (a *Admission) Quarantined(member string, id pluginproto.KeyID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.quarantinedLocked(member, id)
}

func (a *Admission) quarantinedLocked(member string, id pluginproto.KeyID) bool {
	for _, w := range a.found[member].Quarantined {
		if w.ID == id {
			return true
		}
	}
	return false
}

// Progress returns how far the admission of a member has come; nil when it is not
// being admitted, or nothing was to be done.
func (a *Admission) Progress(member string) *api.Progress {
	a.mu.Lock()
	s := a.waiting[member]
	a.mu.Unlock()
	if s == nil {
		return nil
	}
	if p, any := s.meter.progress(); any {
		return &p
	}
	return nil
}

// Moved says that a member has come into step or has been lost. Either way it is
// not being admitted any more, and those who wait for a source look again.
func (a *Admission) Moved(member string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, member)
	a.changedLocked()
}

// Forget says that a member has left the group, or is another HSM now.
func (a *Admission) Forget(member string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, member)
	delete(a.found, member)
	delete(a.balked, member)
	delete(a.paces, member)
	a.changedLocked()
}

func (a *Admission) list(ctx context.Context, member Token) (*Sync, error) {
	s, err := NewSync(ctx, member)
	if err != nil {
		return nil, err
	}
	s.meter.tell = func(p api.Progress) { a.tellProgress(member.Name(), p) }
	s.pace = a.paceOf(member.Name())
	return s, nil
}

func (a *Admission) paceOf(member string) *pace {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paces[member] == nil {
		a.paces[member] = new(pace)
	}
	return a.paces[member]
}

func (a *Admission) plan(ctx context.Context, member Token) (Plan, error) {
	plan, err := a.book.Plan(ctx)
	if err != nil {
		return Plan{}, fmt.Errorf("reading what member %s should hold: %w", member.Name(), err)
	}
	return plan, nil
}

// conclude remembers how an admission found a member, and tells of it.
func (a *Admission) conclude(member string, s *Sync, r Report) {
	held := len(r.Held)
	r.Held = nil
	a.mu.Lock()
	before := a.found[member]
	a.found[member] = r
	a.mu.Unlock()
	a.tellFound(member, held, before, r)
}

func (a *Admission) sources() Sources { return Sources{Of: a.holders, Wrong: a.distrust, Gone: a.gone} }

// holders returns who may supply a copy: the members in step, then those that are
// being admitted and say that they hold it.
func (a *Admission) holders(c Copy) []Token {
	inStep := a.inStep()
	a.mu.Lock()
	defer a.mu.Unlock()
	var tokens []Token
	for _, t := range inStep {
		if !a.quarantinedLocked(t.Name(), c.ID) {
			tokens = append(tokens, t)
		}
	}
	for _, s := range a.waiting {
		if s.Holds(c) {
			tokens = append(tokens, s.token)
		}
	}
	return tokens
}

// complete reports whether no other member can be hoped for.
func (a *Admission) complete() bool {
	here := make(map[string]bool)
	for _, t := range a.inStep() {
		here[t.Name()] = true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for name := range a.waiting {
		here[name] = true
	}
	return len(here) >= a.members()
}

func (a *Admission) enrol(member string, s *Sync) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting[member] = s
	a.changedLocked()
}

// enrolled returns what was listed for this member, unless that was on another
// connection.
func (a *Admission) enrolled(member Token) *Sync {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.waiting[member.Name()]; s != nil && s.token == member {
		return s
	}
	return nil
}

func (a *Admission) change() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.observed
}

func (a *Admission) changedLocked() {
	close(a.observed)
	a.observed = make(chan struct{})
}

func identities(wrong []Wrong) []pluginproto.KeyID {
	ids := make([]pluginproto.KeyID, len(wrong))
	for i, w := range wrong {
		ids[i] = w.ID
	}
	return ids
}

// refusals makes one error of many, that names the first few.
func refusals(all []Refusal) error {
	const named = 3
	var errs []error
	for _, r := range all[:min(named, len(all))] {
		errs = append(errs, r.Err)
	}
	if more := len(all) - named; more > 0 {
		errs = append(errs, fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}
