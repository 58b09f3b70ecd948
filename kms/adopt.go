package kms

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
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
	name    string // of the key, and number of the version, that its label says
	number  int
	holders []string // members in step that showed it
	other   string   // one that showed another key under its identity; "": none
}

// adopt makes master keys of what members in step hold and nobody here knows. It
// returns the names of the new keys, and why an object did not become one. What kmsd has
// made itself, before its catalog was lost, has the version in its label: all versions of
// a key are adopted together or not at all.
//
// No intent is written: to undo it would be to destroy somebody's key. The object is
// cloned to the other members first, where it is as unknown as before, and becomes a
// master key in one write. A crash before that leaves it to the next adoption.
func (k *KMS) adopt(ctx context.Context, g *keyGroup, found map[string]replica.Report) (adopted []string, refused map[pluginproto.KeyID]string, err error) {
	strangers := gather(found)
	refused = make(map[pluginproto.KeyID]string)
	for len(strangers) > 0 {
		n := 1
		for n < len(strangers) && strangers[n].name == strangers[0].name {
			n++
		}
		versions := strangers[:n]
		strangers = strangers[n:]
		err := unfit(versions)
		if err == nil {
			_, err = detached(ctx, k, func(ctx context.Context) (catalog.Key, error) { return k.adoptKey(ctx, g, versions) })
		}
		switch {
		case err == nil:
			adopted = append(adopted, versions[0].name)
			continue
		case errors.Is(err, errClosed):
			return adopted, refused, err
		case over(ctx) != nil: // whatever the work has made of that
			return adopted, refused, over(ctx)
		}
		for _, s := range versions {
			refused[s.ID] = err.Error()
		}
	}
	return adopted, refused, nil
}

// labelled returns the key and the version that a label says: those of kmsd are
// NAME/VERSION, another program's is the name of a first version.
func labelled(label string) (name string, number int) {
	if i := strings.LastIndexByte(label, '/'); i >= 0 {
		if n, err := strconv.Atoi(label[i+1:]); err == nil && n > 0 && strconv.Itoa(n) == label[i+1:] {
			return label[:i], n
		}
	}
	return label, 1
}

// gather puts together what members hold under the same identity, by key and version.
func gather(found map[string]replica.Report) []stranger {
	byID := make(map[pluginproto.KeyID]*stranger)
	for _, member := range slices.Sorted(maps.Keys(found)) {
		for _, o := range found[member].Foreign {
			s := byID[o.ID]
			switch {
			case s == nil:
				s = &stranger{Object: o, holders: []string{member}}
				s.name, s.number = labelled(o.Label)
				byID[o.ID] = s
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
		return cmp.Or(strings.Compare(a.name, b.name), cmp.Compare(a.number, b.number), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return all
}

func sameKey(a, b pluginproto.Object) bool {
	return a.Type == b.Type && bytes.Equal(a.CheckValue, b.CheckValue)
}

// unfit says why objects cannot become the versions of a master key, as far as it shows;
// nil: they may.
func unfit(versions []stranger) error {
	for i, s := range versions {
		if i > 0 && s.number == versions[i-1].number {
			return fmt.Errorf("objects %s and %s have both the label %q: give one of them another", versions[i-1].ID, s.ID, s.Label)
		}
		if s.Type != versions[0].Type {
			return fmt.Errorf("objects %s and %s are versions of one key by their labels, and of different types: give one of them another label", versions[0].ID, s.ID)
		}
		if err := unfitAlone(s); err != nil {
			return ofVersion(versions, i, err)
		}
	}
	return nil
}

// ofVersion says which version of several an error is about.
func ofVersion(versions []stranger, i int, err error) error {
	if len(versions) == 1 {
		return err
	}
	return fmt.Errorf("version %d of it (object %s): %w", versions[i].number, versions[i].ID, err)
}

func unfitAlone(s stranger) error {
	if s.other != "" {
		return fmt.Errorf("members %s and %s hold different keys under this identity: find out which is right and remove the other", s.holders[0], s.other)
	}
	if err := api.CheckName(s.name); err != nil {
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

// adoptKey makes objects the versions of one master key.
func (k *KMS) adoptKey(ctx context.Context, g *keyGroup, versions []stranger) (catalog.Key, error) {
	release, err := g.Lease(ctx)
	if err != nil {
		return catalog.Key{}, err
	}
	defer release()
	if old, err := k.ring.get(versions[0].name); err == nil {
		return catalog.Key{}, taken(old.rec)
	}
	_, rec, err := k.fresh(versions[0].name, KeyOptions{Type: string(versions[0].Type), Group: g.name})
	if err != nil {
		return catalog.Key{}, err
	}
	rec.Versions = nil
	for i, s := range versions {
		v, err := k.adoptVersion(ctx, g, rec, s)
		if err != nil {
			return catalog.Key{}, ofVersion(versions, i, err)
		}
		rec.Versions = append(rec.Versions, v)
	}
	return k.putStranger(ctx, g, rec)
}

// adoptVersion finds out whether an object can be used, and clones it.
func (k *KMS) adoptVersion(ctx context.Context, g *keyGroup, rec catalog.Key, s stranger) (v catalog.Version, err error) {
	if err := k.unclaimed(ctx, s.ID); err != nil {
		return v, err
	}
	holder, object, err := k.reexamine(ctx, g, s)
	if err != nil {
		return v, err
	}
	if err := tryOut(ctx, holder, object); err != nil {
		return v, err
	}
	v = catalog.Version{
		Number: s.number, Identity: s.ID.String(), State: catalog.Enabled, Created: now(),
		CheckValue: object.CheckValue, Public: object.Public,
	}
	v.Copies, err = k.spreadStranger(ctx, g, rec, s.number, holder, object)
	return v, err
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
func (k *KMS) spreadStranger(ctx context.Context, g *keyGroup, rec catalog.Key, number int, holder group.Member, o pluginproto.Object) ([]string, error) {
	if err := k.enough(g, rec, false, names(g.InStep()), nil); err != nil {
		return nil, err // before anything is copied in vain
	}
	h := half{primary: holder, copy: replica.Copy{ID: o.ID, Type: o.Type, CheckValue: o.CheckValue, Key: rec.Name, Version: number}}
	copies, failures := k.spread(ctx, g, h)
	if len(copies)+len(failures) == 1 {
		if err := gives(ctx, holder, o.ID); err != nil {
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

// gives finds out whether a key can leave its token.
func gives(ctx context.Context, m group.Member, id pluginproto.KeyID) error {
	cloning := m.Token().Cloning
	at := slices.IndexFunc(cloning, func(p pluginproto.CloneProtocol) bool { return p.Gives })
	if at < 0 {
		return pluginproto.Errorf(pluginproto.ClassCaller, "cloning a key from member "+m.Name(), "it has no protocol for that")
	}
	req := pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: cloning[at].Name, Keys: []pluginproto.KeyID{id}}
	rand.Read(req.Transfer[:]) // never fails
	said, err := m.CloneStep(ctx, req)
	if err == nil && !said.Done {
		req.End = true
		_, err = m.CloneStep(ctx, req)
	}
	return err
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
	newest := rec.Versions[len(rec.Versions)-1]
	k.tell(rec, "adopted", "version", newest.Number, "copies", newest.Copies)
	g.janitor.wake() // for members that could not take it
	return rec, nil
}
