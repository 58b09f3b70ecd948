package replica

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// defaultPatience is how long a member that lacks copies waits for others to come
// that may have them, when none that is connected has.
const defaultPatience = 2 * time.Second

// Book says what members should hold and remembers what they do hold.
type Book interface {
	// Plan returns what members should hold at this moment.
	Plan(ctx context.Context) (Plan, error)
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
type Admission struct {
	book     Book
	inStep   func() []Token
	members  int // of the group
	patience time.Duration
	log      hclog.Logger

	mu      sync.Mutex
	waiting map[string]*Sync // :: member → what it holds, while it is being admitted
	changed chan struct{}    // closed and replaced when waiting changes
}

// Config is what NewAdmission needs.
type Config struct {
	Book Book
	// InStep returns the members that serve or stand by; they are preferred as
	// sources, in this order.
	InStep func() []Token
	// Members is how many members the group has.
	Members int
	// Patience is how long a member waits for others that may supply what it lacks.
	// Zero means 2 s.
	Patience time.Duration
	Logger   hclog.Logger // nil means silence
}

// NewAdmission returns the door of a group.
func NewAdmission(cfg Config) *Admission {
	if cfg.Patience == 0 {
		cfg.Patience = defaultPatience
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	return &Admission{
		book: cfg.Book, inStep: cfg.InStep, members: cfg.Members, patience: cfg.Patience, log: cfg.Logger,
		waiting: make(map[string]*Sync, cfg.Members),
		changed: make(chan struct{}),
	}
}

// Admit brings a member in step. It is called first with last false, while keys
// may still be made and destroyed, and does the bulk; then with last true, under
// the group's lease, when it does what has changed since. An error keeps the member
// out.
func (a *Admission) Admit(ctx context.Context, member Token, last bool) (err error) {
	defer func() {
		if last || err != nil {
			a.Moved(member.Name())
		}
	}()
	if !last {
		return a.bulk(ctx, member)
	}
	s := a.enrolled(member)
	if s == nil {
		if s, err = NewSync(ctx, member); err != nil {
			return err
		}
	}
	plan, report, err := a.apply(ctx, s)
	if err != nil {
		return err
	}
	if err := a.book.Note(ctx, member.Name(), plan, report); err != nil {
		return fmt.Errorf("noting what member %s holds: %w", member.Name(), err)
	}
	a.tell(member.Name(), report)
	return nil
}

// bulk lists the member and brings over what others have, and waits a little for
// others when it lacks what nobody has yet.
func (a *Admission) bulk(ctx context.Context, member Token) error {
	s, err := NewSync(ctx, member)
	if err != nil {
		return err
	}
	a.enrol(member.Name(), s)
	patience := time.NewTimer(a.patience)
	defer patience.Stop()
	for {
		changed := a.change()
		_, report, err := a.apply(ctx, s)
		if err != nil {
			return err
		}
		if len(report.Missing) == 0 || a.complete() {
			return nil
		}
		select {
		case <-changed:
		case <-patience.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *Admission) apply(ctx context.Context, s *Sync) (Plan, Report, error) {
	plan, err := a.book.Plan(ctx)
	if err != nil {
		return Plan{}, Report{}, fmt.Errorf("reading what member %s should hold: %w", s.token.Name(), err)
	}
	report, err := s.Apply(ctx, plan, a.sources)
	return plan, report, err
}

// sources returns who may supply a copy: the members in step, then those that are
// being admitted and say that they hold it.
func (a *Admission) sources(c Copy) []Token {
	tokens := a.inStep()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.waiting {
		if s.Holds(c) {
			tokens = append(tokens, s.token)
		}
	}
	return tokens
}

// complete reports whether no other member can be hoped for.
func (a *Admission) complete() bool {
	inStep := a.inStep()
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(inStep)+len(a.waiting) >= a.members
}

func (a *Admission) enrol(member string, s *Sync) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting[member] = s
	a.changedLocked()
}

// Moved says that a member has come into step or has been lost. Either way it is
// not being admitted any more, and those who wait for a source look again.
func (a *Admission) Moved(member string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, member)
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
	return a.changed
}

func (a *Admission) changedLocked() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// tell says in one line what was unusual about an admission.
func (a *Admission) tell(member string, r Report) {
	if r.Cloned+len(r.Destroyed)+len(r.Missing)+r.Foreign == 0 {
		return
	}
	level := hclog.Info
	if len(r.Missing) > 0 {
		level = hclog.Warn
	}
	a.log.Log(level, "member compared with the catalog", "member", member, "held", len(r.Held), "cloned", r.Cloned,
		"destroyed", len(r.Destroyed), "missing", len(r.Missing), "foreign", r.Foreign)
}
