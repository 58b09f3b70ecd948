package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// CreateMasterKey makes a key with its version 1 on every member in step.
func (k *KMS) CreateMasterKey(ctx context.Context, name string, opts KeyOptions) (Key, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	doing := "creating key " + strconv.Quote(name)
	g, fresh, err := k.fresh(name, opts)
	if err != nil {
		return Key{}, translate(doing, err)
	}
	rec, err := detached(ctx, k, func(ctx context.Context) (catalog.Key, error) {
		return k.addVersion(ctx, g, name, "created", opts.AllowDegraded, func() (catalog.Key, error) {
			if old, err := k.ring.get(name); err == nil {
				return catalog.Key{}, taken(old.rec)
			}
			return fresh, nil
		})
	})
	if err != nil {
		return Key{}, translate(doing, err)
	}
	return k.keyToAPI(rec), nil
}

// fresh checks what a new key should be, and returns its record without versions.
func (k *KMS) fresh(name string, opts KeyOptions) (*keyGroup, catalog.Key, error) {
	if err := api.CheckName(name); err != nil {
		return nil, catalog.Key{}, err
	}
	if opts.Type == "" {
		opts.Type = string(pluginproto.AES256)
	}
	if !slices.Contains(pluginproto.KeyTypes(), pluginproto.KeyType(opts.Type)) {
		return nil, catalog.Key{}, badRequest("there is no key type %q; choose one of %v", opts.Type, pluginproto.KeyTypes())
	}
	g, err := k.group(opts.Group)
	if err != nil {
		return nil, catalog.Key{}, err
	}
	if opts.MinCopies == 0 {
		opts.MinCopies = g.minCopies()
	}
	if err := errors.Join(checkMinCopies(g, opts.MinCopies), checkPeriod(opts.RotationPeriod)); err != nil {
		return nil, catalog.Key{}, err
	}
	return g, catalog.Key{
		Name: name, Group: g.name, Type: opts.Type, MinCopies: opts.MinCopies,
		RotationPeriod: time.Duration(opts.RotationPeriod), Created: now(),
	}, nil
}

func checkMinCopies(g *keyGroup, n int) error {
	if all := len(g.Names()); n < 1 || n > all {
		return badRequest("min_copies is %d, want 1 to %d, the number of members of group %s", n, all, g.name)
	}
	return nil
}

func checkPeriod(d Duration) error {
	if d < 0 || d > 0 && time.Duration(d) < time.Second {
		return badRequest("rotation_period is %v, want a second or more, or 0 for never", time.Duration(d))
	}
	return nil
}

// taken says that a name has been used. A destroyed key keeps its name, so that no
// old envelope can ever be taken for one of another key.
func taken(rec catalog.Key) error {
	msg := fmt.Sprintf("there is a key %q already", rec.Name)
	if stateOf(rec) == catalog.Destroyed {
		msg = fmt.Sprintf("there was a key %q, which is destroyed; names are not used again", rec.Name)
	}
	return api.NewError(api.CodeExists, msg, nil)
}

// Rotate makes the next version of a key.
func (k *KMS) Rotate(ctx context.Context, name string) (int, error) {
	v, err := k.RotateWith(ctx, name, api.RotateOptions{})
	return v.Number, err
}

// RotateWith makes the next version of a key, with choices.
func (k *KMS) RotateWith(ctx context.Context, name string, opts api.RotateOptions) (api.Version, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	v, err := k.rotate(ctx, name, opts)
	return v, translate("rotating key "+strconv.Quote(name), err)
}

func (k *KMS) rotate(ctx context.Context, name string, opts api.RotateOptions) (api.Version, error) {
	old, err := k.ring.get(name)
	if err != nil {
		return api.Version{}, err
	}
	g, err := k.groupOf(old.rec)
	if err != nil {
		return api.Version{}, err
	}
	rec, err := detached(ctx, k, func(ctx context.Context) (catalog.Key, error) {
		return k.addVersion(ctx, g, name, "rotated", opts.AllowDegraded, func() (catalog.Key, error) {
			current, err := k.ring.get(name)
			if err != nil {
				return catalog.Key{}, err
			}
			if current.primary < 0 {
				return catalog.Key{}, current.unusable()
			}
			return current.rec, nil
		})
	})
	if err != nil {
		return api.Version{}, err
	}
	made := k.keyToAPI(rec).Versions
	return made[len(made)-1], nil
}

// half is a version that is on the primary and not committed yet.
type half struct {
	intent  catalog.Intent
	primary group.Member
	copy    replica.Copy
	public  []byte
}

// addVersion makes the next version of the key that base returns, under the promise
// that it is committed on enough members or taken back. done is what its event says.
//
// A version is begun in the catalog, made on the primary, cloned to every other
// member in step and committed. The key is claimed all the while, and the lease taken
// for the second half only: a token may need a minute to make a pair, or hang, and
// other keys do not wait for that. When the primary is lost in between, the attempt is
// taken back and the next one uses an identity of its own: the old one may have come
// to be on the lost member, and must never have two values.
func (k *KMS) addVersion(ctx context.Context, g *keyGroup, name, done string, degraded bool, base func() (catalog.Key, error)) (catalog.Key, error) {
	release, err := g.making.claim(ctx, name)
	if err != nil {
		return catalog.Key{}, err
	}
	defer release()
	for attempt := 1; ; attempt++ {
		rec, err := base()
		if err != nil {
			return catalog.Key{}, err
		}
		if err := k.enough(g, rec, degraded, names(g.InStep()), nil); err != nil {
			return catalog.Key{}, err
		}
		h, err := k.generate(ctx, g, rec)
		if errors.Is(err, catalog.ErrConflict) && ctx.Err() == nil && k.changed(ctx, rec) {
			attempt-- // a member came in step meanwhile, and its copies were noted: nothing was begun
			continue
		}
		if err != nil {
			return catalog.Key{}, ifEnded(ctx, err)
		}
		rec, lost, err := k.complete(ctx, g, h, done, degraded, base)
		g.ended(h.intent.Identity, err)
		if err == nil || !lost || ctx.Err() != nil || attempt >= len(g.Names()) {
			return rec, err
		}
		k.log.Warn("the primary was lost while a key was made; making it anew", "key", name, "member", h.primary.Name())
	}
}

// complete brings a version that is on the primary to the other members and commits
// it, or takes it back. lost says that this failed because the primary was lost.
func (k *KMS) complete(ctx context.Context, g *keyGroup, h half, done string, degraded bool, base func() (catalog.Key, error)) (_ catalog.Key, lost bool, err error) {
	release, err := g.Lease(ctx)
	if err != nil {
		k.undo(ctx, g, h.intent)
		return catalog.Key{}, false, ifEnded(ctx, err)
	}
	defer release()
	rec, err := base()
	if err != nil { // disabled or destroyed meanwhile
		k.undo(ctx, g, h.intent)
		return catalog.Key{}, false, err
	}
	if _, stays := g.table.get(h.primary.Name()); !stays {
		k.undo(ctx, g, h.intent)
		return catalog.Key{}, true, pluginproto.Errorf(pluginproto.ClassMember, "making key "+rec.Name,
			"member %s was removed while it made it", h.primary.Name())
	}
	copies, failures := k.spread(ctx, g, h)
	for busy := isBusy(failures); busy && k.enough(g, rec, degraded, copies, failures) != nil && pause(ctx, soonAgain); busy = isBusy(failures) {
		copies, failures = k.spread(ctx, g, h) // better late than not at all
	}
	lost = lostSource(failures)
	if len(copies) == 1 && !lost { // nobody has heard of the primary since
		if _, err := h.primary.Inspect(ctx, h.copy.ID); err != nil {
			lost = true
			failures[h.primary.Name()] = err
		}
	}
	err = k.enough(g, rec, degraded, copies, failures)
	if err == nil && len(copies) == 1 && lost {
		err = errors.Join(slices.Collect(maps.Values(failures))...)
	}
	if err == nil && ctx.Err() == nil {
		rec, err = k.commit(ctx, g, h, copies, done, base)
		return rec, false, err
	}
	k.undo(ctx, g, h.intent)
	return catalog.Key{}, lost, ifEnded(ctx, err)
}

// ifEnded puts the reason why ctx ended, if it did, before what that has led to.
func ifEnded(ctx context.Context, err error) error {
	switch {
	case ctx.Err() == nil:
		return err
	case err == nil:
		return context.Cause(ctx)
	default:
		return fmt.Errorf("%w: %v", context.Cause(ctx), err)
	}
}

// enough returns ErrInsufficientCopies when fewer members hold a version than must.
func (k *KMS) enough(g *keyGroup, rec catalog.Key, degraded bool, holders []string, failures map[string]error) error {
	want := rec.MinCopies
	if degraded {
		want = 1
	}
	if len(holders) >= want {
		return nil
	}
	if len(holders) == 0 && failures == nil {
		return nil // the group is lost; let it say so itself
	}
	var absent []string
	for _, m := range g.Status().Members {
		if err := failures[m.Name]; err != nil {
			absent = append(absent, fmt.Sprintf("%s: %v", m.Name, err))
		} else if !slices.Contains(holders, m.Name) {
			absent = append(absent, fmt.Sprintf("%s is %s: %s", m.Name, m.State, m.Reason))
		}
	}
	e := api.NewError(api.CodeInsufficientCopies, fmt.Sprintf("key %s needs %d copies, but only %s could take one (%s)",
		rec.Name, want, strings.Join(holders, ", "), strings.Join(absent, "; ")), errors.Join(slices.Collect(maps.Values(failures))...))
	e.Hint = "wait for the other members to recover, or allow the key to be made degraded"
	return e
}

// generate begins the next version and makes it on the primary, or on the next
// member when that fails or another one can give it to more members, each time under a new
// identity. While all members that are to do it are at long works it waits for one.
func (k *KMS) generate(ctx context.Context, g *keyGroup, rec catalog.Key) (made half, err error) {
	for {
		passed := false // by one that may be the only one that is left
		_, err = g.OnPrimary(ctx, func(ctx context.Context, m group.Member) (err error) {
			if !givesToMost(m, g.InStep()) {
				passed = true
				return fmt.Errorf("making a key on member %s, which can give it to fewer others: %w", m.Name(), group.ErrPassed)
			}
			made, err = k.generateOn(ctx, g, m, rec)
			return err
		})
		later := errors.Is(err, group.ErrOccupied) || errors.Is(err, group.ErrPassed) || (passed && errors.Is(err, group.ErrLost))
		if !later || !pause(ctx, soonAgain) {
			return made, err
		}
	}
}

func (k *KMS) generateOn(ctx context.Context, g *keyGroup, m group.Member, rec catalog.Key) (_ half, err error) {
	id, err := newIdentity()
	if err != nil {
		return half{}, err
	}
	number := 1
	if n := len(rec.Versions); n > 0 {
		number = rec.Versions[n-1].Number + 1
	}
	g.making.begun(id.String())
	defer func() {
		if err != nil {
			g.ended(id.String(), err)
		}
	}()
	intent, err := k.catalog.Begin(ctx, catalog.Intent{
		Identity: id.String(), Op: catalog.IntentCreate, Group: g.name,
		Key: rec.Name, Version: number, Started: now(),
	}, rec.Rev)
	if err != nil {
		g.janitor.suspect(rec.Name) // it may be there all the same
		return half{}, err
	}
	defer func() {
		if err != nil {
			k.undo(ctx, g, intent)
			g.janitor.settleLater() // a member may have come in step meanwhile, without the lease
		}
	}()
	object, err := m.Generate(ctx, pluginproto.KeySpec{
		ID: id, Type: pluginproto.KeyType(rec.Type), Label: fmt.Sprintf("%s/%d", rec.Name, number),
	})
	if err != nil {
		return half{}, fmt.Errorf("generating on member %s: %w", m.Name(), err)
	}
	if err := checkObject(object, id, pluginproto.KeyType(rec.Type)); err != nil {
		return half{}, fmt.Errorf("generating on member %s: %w", m.Name(), err)
	}
	return half{
		intent: intent, primary: m, public: object.Public,
		copy: replica.Copy{ID: id, Type: object.Type, CheckValue: object.CheckValue, Key: rec.Name, Version: number},
	}, nil
}

// checkObject checks what a member says it has made.
func checkObject(o pluginproto.Object, id pluginproto.KeyID, want pluginproto.KeyType) error {
	switch {
	case o.ID != id, o.Type != want:
		return pluginproto.Errorf(pluginproto.ClassUnknown, "checking the new key", "the driver answered with another key")
	case len(o.CheckValue) == 0:
		return pluginproto.Errorf(pluginproto.ClassUnknown, "checking the new key", "the driver gave no check value")
	case !want.Symmetric() && len(o.Public) == 0:
		return pluginproto.Errorf(pluginproto.ClassUnknown, "checking the new key", "the driver gave no public key")
	default:
		return nil
	}
}

// spread clones a new version from the primary to every other member in step. It
// returns who holds it, and why others do not.
func (k *KMS) spread(ctx context.Context, g *keyGroup, h half) (copies []string, failures map[string]error) {
	others := slices.DeleteFunc(names(g.InStep()), func(name string) bool { return name == h.primary.Name() })
	copies = []string{h.primary.Name()}
	failures = make(map[string]error)
	if len(others) == 0 {
		return copies, failures
	}
	for member, err := range g.OnEach(ctx, others, func(ctx context.Context, m group.Member) error {
		_, err := replica.Clone(ctx, h.primary, m, h.copy)
		if errors.Is(err, replica.ErrDifferent) {
			g.Distrust(m.Name(), err)
		}
		return err
	}) {
		if err == nil {
			copies = append(copies, member)
		} else {
			failures[member] = err
		}
	}
	slices.Sort(copies)
	return copies, failures
}

// lostSource reports whether clones failed because the primary was lost.
func lostSource(failures map[string]error) bool {
	for _, err := range failures {
		if source, ok := errors.AsType[*replica.SourceError](err); ok &&
			pluginproto.ClassOf(source.Err) == pluginproto.ClassMember {
			return true
		}
	}
	return false
}

// soonAgain is the pause before a member that is at a long work is asked again, when
// nobody else will do.
const soonAgain = time.Second

// isBusy reports whether clones failed because a member is at a long work.
func isBusy(failures map[string]error) bool {
	for _, err := range failures {
		if errors.Is(err, group.ErrOccupied) {
			return true
		}
	}
	return false
}

// pause waits, and reports false when ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// now is the time as records have it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }
