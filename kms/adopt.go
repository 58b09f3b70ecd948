package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// stranger is an object that nobody here knows, and who holds it.
type stranger struct {
	pluginproto.Object
	holders []string // members in step that showed it
	other   string   // one that showed another key under its identity; "": none
}

// adopt makes master keys of what members in step hold and nobody here knows. It
// returns the names of the new keys, and why an object did not become one.
//
// No intent is written: to undo it would be to destroy somebody's key. The object is
// cloned to the other members first, where it is as unknown as before, and becomes a
// master key in one write. A crash before that leaves it to the next adoption.
func (k *KMS) adopt(ctx context.Context, g *keyGroup, found map[string]replica.Report) (adopted []string, refused map[pluginproto.KeyID]string, err error) {
	strangers := gather(found)
	refused = make(map[pluginproto.KeyID]string)
	for _, s := range strangers {
		if why := unfit(s, strangers); why != nil {
			refused[s.ID] = why.Error()
			continue
		}
		_, err := detached(ctx, k, func(ctx context.Context) (catalog.Key, error) { return k.adoptOne(ctx, g, s) })
		switch {
		case err == nil:
			adopted = append(adopted, s.Label)
		case errors.Is(err, errClosed):
			return adopted, refused, err
		case over(ctx) != nil: // whatever the work has made of that
			return adopted, refused, over(ctx)
		default:
			refused[s.ID] = err.Error()
		}
	}
	return adopted, refused, nil
}

// gather puts together what members hold under the same identity, by label.
func gather(found map[string]replica.Report) []stranger {
	byID := make(map[pluginproto.KeyID]*stranger)
	for _, member := range slices.Sorted(maps.Keys(found)) {
		for _, o := range found[member].Foreign {
			s := byID[o.ID]
			switch {
			case s == nil:
				byID[o.ID] = &stranger{Object: o, holders: []string{member}}
			case sameKey(s.Object, o):
				s.holders = append(s.holders, member)
			case s.other == "":
				s.other = member
			}
		}
	}
	all := make([]stranger, 0, len(byID))
	for _, s := range byID {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b stranger) int {
		if c := strings.Compare(a.Label, b.Label); c != 0 {
			return c
		}
		return bytes.Compare(a.ID[:], b.ID[:])
	})
	return all
}

func sameKey(a, b pluginproto.Object) bool {
	return a.Type == b.Type && bytes.Equal(a.CheckValue, b.CheckValue)
}

// unfit says why an object cannot become a master key, as far as it shows; nil: it may.
func unfit(s stranger, all []stranger) error {
	if s.other != "" {
		return fmt.Errorf("members %s and %s hold different keys under this identity: find out which is right and remove the other", s.holders[0], s.other)
	}
	for _, o := range all {
		if o.Label == s.Label && o.ID != s.ID {
			return fmt.Errorf("object %s has the label %q too: give one of them another", o.ID, s.Label)
		}
	}
	if err := api.CheckName(s.Label); err != nil {
		return fmt.Errorf("its label %q cannot be the name of a key: %w", s.Label, err)
	}
	if !slices.Contains(pluginproto.KeyTypes(), s.Type) {
		return fmt.Errorf("its type %q is not one of %v", s.Type, pluginproto.KeyTypes())
	}
	if len(s.CheckValue) == 0 {
		return errors.New("it has no check value, so its copies could not be told from others")
	}
	return nil
}

// adoptOne makes one object a master key.
func (k *KMS) adoptOne(ctx context.Context, g *keyGroup, s stranger) (catalog.Key, error) {
	release, err := g.Lease(ctx)
	if err != nil {
		return catalog.Key{}, err
	}
	defer release()
	if old, err := k.ring.get(s.Label); err == nil {
		return catalog.Key{}, taken(old.rec)
	}
	if err := k.unclaimed(ctx, s.ID); err != nil {
		return catalog.Key{}, err
	}
	holder, object, err := k.reexamine(ctx, g, s)
	if err != nil {
		return catalog.Key{}, err
	}
	if err := tryOut(ctx, holder, object); err != nil {
		return catalog.Key{}, err
	}
	_, rec, err := k.fresh(s.Label, KeyOptions{Type: string(s.Type), Group: g.name})
	if err != nil {
		return catalog.Key{}, err
	}
	rec.Versions = []catalog.Version{{
		Number: 1, Identity: s.ID.String(), State: catalog.Enabled, Created: now(),
		CheckValue: object.CheckValue, Public: object.Public,
	}}
	if rec.Versions[0].Copies, err = k.spreadStranger(ctx, g, rec, holder, object); err != nil {
		return catalog.Key{}, err
	}
	return k.putStranger(ctx, g, rec)
}

// unclaimed returns an error when an identity is that of any key, past, present or
// just being made, also of another group's.
func (k *KMS) unclaimed(ctx context.Context, id pluginproto.KeyID) error {
	if owner := k.ring.owner(id); owner != "" {
		return fmt.Errorf("it is a version of key %s", owner)
	}
	t, err := k.catalog.Tombstone(ctx, id.String())
	switch {
	case err == nil:
		return fmt.Errorf("it is version %d of key %s, which is destroyed", t.Version, t.Key)
	case !errors.Is(err, catalog.ErrNotFound):
		return err
	}
	for in, err := range k.catalog.Intents(ctx) {
		if err != nil {
			return err
		}
		if in.Identity == id.String() {
			return fmt.Errorf("it is being made, as version %d of key %s", in.Version, in.Key)
		}
	}
	return nil
}

// owner returns the name of the key that has an identity, "" when none has.
func (r *keyring) owner(id pluginproto.KeyID) (name string) {
	r.keys.Range(func(_, v any) bool {
		k := v.(*key)
		if _, ok := k.byID[id]; ok {
			name = k.rec.Name
		}
		return name == ""
	})
	return name
}

// reexamine asks every member in step for the object anew, also those that had not
// shown it: one that holds another key under the identity speaks against it.
func (k *KMS) reexamine(ctx context.Context, g *keyGroup, s stranger) (holder group.Member, object pluginproto.Object, err error) {
	for _, m := range g.InStep() {
		o, err := m.Inspect(ctx, s.ID)
		switch {
		case err != nil && pluginproto.ClassOf(err) == pluginproto.ClassNotFound:
		case err != nil:
			return nil, object, fmt.Errorf("looking at it again: %w", err)
		case !sameKey(o, s.Object):
			return nil, object, fmt.Errorf("member %s holds a different key under this identity than %s: find out which is right and remove the other", m.Name(), list(s.holders))
		case holder == nil:
			holder, object = m, o
		}
	}
	if holder == nil {
		return nil, object, fmt.Errorf("it is not there any more on %s", list(s.holders))
	}
	return holder, object, nil
}

// tryOut uses a key for what master keys are for, since whoever made it may have
// forbidden that. Types that do not wrap have been used for their check value.
func tryOut(ctx context.Context, m group.Member, o pluginproto.Object) error {
	if o.Type != pluginproto.AES256 && o.Type != pluginproto.AES128 {
		return nil
	}
	text := []byte("may this key wrap and unwrap?")
	cmd := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: o.ID, Input: text, IV: make([]byte, 12)}
	if _, err := rand.Read(cmd.IV); err != nil {
		return fmt.Errorf("drawing an IV: %w", err)
	}
	sealed, err := m.Do(ctx, cmd)
	if err != nil {
		return fmt.Errorf("it cannot wrap: %w", err)
	}
	cmd.Op, cmd.Input = pluginproto.OpDecrypt, sealed.Output
	if sealed.IV != nil {
		cmd.IV = sealed.IV
	}
	opened, err := m.Do(ctx, cmd)
	if err != nil {
		return fmt.Errorf("it cannot unwrap: %w", err)
	}
	if !bytes.Equal(opened.Output, text) {
		return errors.New("it unwraps something else than it has wrapped")
	}
	return nil
}

// spreadStranger clones an object to every other member in step and returns who
// holds it then. Enough of them must; without another one, it must at least come out
// of its token, or no other member could ever hold it.
func (k *KMS) spreadStranger(ctx context.Context, g *keyGroup, rec catalog.Key, holder group.Member, o pluginproto.Object) ([]string, error) {
	if err := k.enough(g, rec, false, names(g.InStep()), nil); err != nil {
		return nil, err // before anything is copied in vain
	}
	h := half{primary: holder, copy: replica.Copy{ID: o.ID, Type: o.Type, CheckValue: o.CheckValue, Key: rec.Name, Version: 1}}
	copies, failures := k.spread(ctx, g, h)
	if len(copies)+len(failures) == 1 {
		if _, err := holder.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Key: o.ID}); err != nil {
			return nil, fmt.Errorf("it cannot be cloned: %w", err)
		}
	}
	for _, err := range failures {
		if source, ok := errors.AsType[*replica.SourceError](err); ok {
			return nil, fmt.Errorf("it cannot be cloned: %w", source.Err)
		}
	}
	return copies, k.enough(g, rec, false, copies, failures)
}

// putStranger writes the record of an adopted key. From here on it is a master key
// like every other.
func (k *KMS) putStranger(ctx context.Context, g *keyGroup, rec catalog.Key) (catalog.Key, error) {
	if ctx.Err() != nil {
		return catalog.Key{}, context.Cause(ctx)
	}
	ctx, cancel := cleanup(ctx)
	defer cancel()
	name := rec.Name
	rec, err := k.catalog.PutKey(ctx, rec)
	if err != nil {
		g.janitor.suspect(name) // it may be there all the same
		return catalog.Key{}, err
	}
	if err := k.ring.put(rec); err != nil {
		return catalog.Key{}, err
	}
	k.tell(rec, "adopted", "version", 1, "copies", rec.Versions[0].Copies)
	g.janitor.wake() // for members that could not take it
	return rec, nil
}
