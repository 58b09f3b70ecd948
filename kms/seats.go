package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// ckrTokenNotRecognized is CKR_TOKEN_NOT_RECOGNIZED: the token is not the one that it
// should be. PKCS#11 2.40, pkcs11t.h.
const ckrTokenNotRecognized uint = 0xE1

// table holds the seats of a group, which come and go.
type table struct {
	mu      sync.Mutex               // guards what follows
	seats   map[string]seat          // :: member → its place
	trips   map[string]*atomic.Int64 // :: member → see watched
	swaps   map[string]bool          // :: member → an operator has it take another token
	entries map[string]string        // :: name in the configuration → digest of the entry
}

func newTable(file []MemberConfig, seats []seat) *table {
	t := &table{
		seats: make(map[string]seat, len(seats)), trips: make(map[string]*atomic.Int64, len(seats)),
		swaps: make(map[string]bool),
	}
	t.configured(file)
	for _, s := range seats {
		t.put(s)
	}
	return t
}

// configured takes down the entries of another configuration.
func (t *table) configured(file []MemberConfig) {
	entries := make(map[string]string, len(file))
	for _, m := range file {
		entries[m.Name] = digestOf(m)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entries = entries
}

// entry returns the digest of a member's entry in the configuration, "" without one.
func (t *table) entry(name string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.entries[name]
}

func (t *table) get(name string) (seat, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.seats[name]
	return s, ok
}

func (t *table) put(s seat) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seats[s.name] = s
	if t.trips[s.name] == nil {
		t.trips[s.name] = new(atomic.Int64)
	}
}

func (t *table) remove(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.seats, name)
	delete(t.trips, name)
	delete(t.swaps, name)
}

// all returns the seats by name.
func (t *table) all() []seat {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]seat, 0, len(t.seats))
	for _, name := range slices.Sorted(maps.Keys(t.seats)) {
		out = append(out, t.seats[name])
	}
	return out
}

// trip returns where the round trips of a member are noted. For one that is no member
// it is nowhere.
func (t *table) trip(name string) *atomic.Int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if trip := t.trips[name]; trip != nil {
		return trip
	}
	return new(atomic.Int64)
}

// swap says that a member may take another token than the one it is known by.
func (t *table) swap(name string, may bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.swaps[name] = may
}

func (t *table) swapping(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.swaps[name]
}

// seatFor is the place of a member that is described at run time, when that
// description may be used.
func (k *KMS) seatFor(g *keyGroup, spec api.MemberSpec) (seat, error) {
	switch {
	case spec.Name == "" || strings.Contains(spec.Name, "/"):
		return seat{}, badRequest("%q is not the name of a member", spec.Name)
	case k.enlist == nil:
		e := badRequest("members cannot be added or replaced at run time here")
		return seat{}, e
	}
	s := seat{
		name: spec.Name, spec: &spec, entry: g.table.entry(spec.Name),
		config: MemberConfig{Name: spec.Name, Driver: spec.Driver, Standby: spec.Standby},
	}
	m, err := k.enlist(g.name, spec)
	if err != nil {
		return seat{}, refusedSpec(err)
	}
	if m.Open == nil {
		if faults := m.processFaults(k.connector.insecure, k.connector.driverDir); len(faults) > 0 {
			return seat{}, refusedSpec(errors.Join(faults...))
		}
	}
	if other := k.neighbour(g, m); other != "" {
		return seat{}, badRequest("member %s has the settings of member %s; every member needs its own token", m.Name, other)
	}
	return s, nil
}

// neighbour returns another member whose token the settings describe, "" when there is
// none. Without it a wrong PIN would be tried on a token that serves.
func (k *KMS) neighbour(g *keyGroup, m MemberConfig) string {
	if len(m.Settings) == 0 { // it says elsewhere which token it has
		return ""
	}
	for _, known := range g.Status().Members {
		s, ok := g.table.get(known.Name)
		if !ok || s.name == m.Name {
			continue
		}
		if other, err := k.resolve(g, s); err == nil && (placeOf(other) == placeOf(m) || describes(m, other, known.Token)) {
			return s.name
		}
	}
	return ""
}

// describes reports whether the settings of a member fit the token of another: by its
// serial number, or by its label alone where the other's is looked for.
func describes(m, other MemberConfig, t api.Token) bool {
	label, serial := m.Settings["token_label"], m.Settings["token_serial"]
	if serial != "" {
		return serial == t.Serial && (label == "" || label == t.Label)
	}
	where := func(m MemberConfig) string {
		m.Settings = maps.Clone(m.Settings)
		delete(m.Settings, "token_label")
		delete(m.Settings, "token_serial")
		return placeOf(m)
	}
	return label != "" && label == t.Label && where(m) == where(other)
}

func refusedSpec(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	return badRequest("%v", err)
}

// memberConfig is a seat as package group wants it.
func (k *KMS) memberConfig(g *keyGroup, s seat) group.MemberConfig {
	return group.MemberConfig{
		Name: s.name, Driver: s.config.Driver, Standby: s.config.Standby, Drained: s.drained,
		Connect: func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) { return k.connect(ctx, g, s.name) },
	}
}

// connect opens the driver of a member as its seat is now, and makes sure that its
// token is the one it should be.
func (k *KMS) connect(ctx context.Context, g *keyGroup, name string) (_ group.Conn, _ pluginproto.TokenInfo, err error) {
	s, ok := g.table.get(name)
	if !ok {
		return nil, pluginproto.TokenInfo{}, fmt.Errorf("connecting member %s: %w", name, group.ErrUnknownMember)
	}
	m, err := k.resolve(g, s)
	if err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	conn, token, err := k.connector.connect(ctx, g.cfg, m, g.table.trip(name))
	if err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	if err := k.recognise(ctx, g, m, token); err != nil {
		conn.Kill()
		return nil, pluginproto.TokenInfo{}, err
	}
	return conn, token, nil
}

// resolve returns how a member is configured now. A description from run time is
// looked at again each time: what it may name is the configuration's to say.
func (k *KMS) resolve(g *keyGroup, s seat) (MemberConfig, error) {
	if s.spec == nil {
		return s.config, nil
	}
	refuse := func(format string, args ...any) error {
		return ownFault(pluginproto.CKROK, "configuring member "+s.name+" as it was added while kmsd ran", format, args...)
	}
	if k.enlist == nil {
		return MemberConfig{}, refuse("this program takes no such members")
	}
	m, err := k.enlist(g.name, *s.spec)
	if err != nil {
		return MemberConfig{}, refuse("it is refused now: %v", err)
	}
	m.Name, m.Standby = s.name, s.config.Standby
	if m.Open == nil {
		if faults := m.processFaults(k.connector.insecure, k.connector.driverDir); len(faults) > 0 {
			return MemberConfig{}, refuse("%v", faults[0])
		}
	}
	return m, nil
}

// recognise refuses a token that is not the one that the member was first admitted
// with, or is another member's.
func (k *KMS) recognise(ctx context.Context, g *keyGroup, m MemberConfig, token pluginproto.TokenInfo) error {
	known, err := k.remembered(ctx, g)
	if err != nil {
		return fmt.Errorf("recognising the token of member %s: %w", m.Name, err)
	}
	found := pinOf(m, token)
	refuse := func(format string, args ...any) error {
		return ownFault(ckrTokenNotRecognized, "recognising the token of member "+m.Name, format, args...)
	}
	for _, other := range known {
		if t := other.Token; other.Name != m.Name && t != nil && t.Serial != "" && t.Serial == found.Serial && t.Label == found.Label && k.stands(g, other) {
			return refuse("it (label %q, serial %s) is that of member %s; every member needs its own", found.Label, found.Serial, other.Name)
		}
	}
	i := slices.IndexFunc(known, func(other catalog.Member) bool { return other.Name == m.Name })
	if i < 0 || known[i].Token == nil {
		return nil // the first one
	}
	switch pin := *known[i].Token; {
	case pin.Is(found) && !g.table.swapping(m.Name):
		return nil
	case g.table.swapping(m.Name), pin.Place != found.Place:
		// Somebody wants it so: what the old token held says nothing about this one.
		// What was to be destroyed there stays so: it may be the old one after all.
		return k.forgetCopies(ctx, g, m.Name)
	case pin.Serial != found.Serial:
		return refuse("the member is known by the token with serial %s (label %q), and this one has serial %s (label %q): "+
			"it was initialised anew or exchanged; bring the old one back, or accept this one with: kmsd member replace %s",
			pin.Serial, pin.Label, found.Serial, found.Label, m.Name)
	default:
		return refuse("the token with serial %s was given another domain secret than when it was admitted: "+
			"give the group the old domain secret, or accept the token as it is with: kmsd member replace %s", found.Serial, m.Name)
	}
}

// stands reports whether what is remembered of a member's token still counts: it is a
// member, and its token is looked for in the same place.
func (k *KMS) stands(g *keyGroup, known catalog.Member) bool {
	s, ok := g.table.get(known.Name)
	if !ok {
		return false
	}
	m, err := k.resolve(g, s)
	return err != nil || placeOf(m) == known.Token.Place
}

// remembered returns what the catalog knows of the members of a group.
func (k *KMS) remembered(ctx context.Context, g *keyGroup) ([]catalog.Member, error) {
	var all []catalog.Member
	for m, err := range k.catalog.Members(ctx, g.name) {
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

func pinOf(m MemberConfig, t pluginproto.TokenInfo) catalog.Token {
	return catalog.Token{Serial: t.Serial, Label: t.Label, Model: t.Model, Domain: t.DomainCheck, Place: placeOf(m)}
}

// ownFault is a failure of a member that only an operator can mend.
func ownFault(ckr uint, op, format string, args ...any) error {
	return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: ckr, Permanent: true, Op: op, Msg: fmt.Sprintf(format, args...)}
}
