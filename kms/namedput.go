package kms

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
)

// maxDataVersions is how many versions a data key can have. MariaDB would go on to 2^32.
const maxDataVersions = 100_000

// PutNamedKey makes the first or the next version of a data key.
func (k *KMS) PutNamedKey(ctx context.Context, database, id string, put api.NamedKeyPut) (api.NamedKey, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	named, err := k.putDataKey(ctx, &dataKeyPut{database: database, id: id, NamedKeyPut: put})
	return named, translate("putting "+ofDataKey(database, id), err)
}

// RotateNamedKey makes the next version of a data key in the random source of an HSM, as
// long as the newest.
func (k *KMS) RotateNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	named, err := k.putDataKey(ctx, &dataKeyPut{database: database, id: id, rotate: true})
	return named, translate("rotating "+ofDataKey(database, id), err)
}

// dataKeyPut is what the next version of a data key is to be.
type dataKeyPut struct {
	database, id string
	rotate       bool // a version that is no secret of somebody else must be there
	api.NamedKeyPut
	drawn []byte // what an HSM has made, to be wiped
}

// putDataKey makes versions until one is committed. Another one that was put meanwhile,
// and a change of the master key, each mean that it is made anew: numbers have no gaps, and
// nothing is committed under a version of the master key that is not the newest any more.
func (k *KMS) putDataKey(ctx context.Context, p *dataKeyPut) (api.NamedKey, error) {
	if err := cmp.Or(api.CheckDatabaseName(p.database), api.CheckNamedKeyID(p.id), p.check()); err != nil {
		return api.NamedKey{}, err
	}
	defer func() { clear(p.drawn) }()
	for {
		master, err := k.masterOf(ctx, p.database)
		if err != nil {
			return api.NamedKey{}, err
		}
		dk, err := k.tryPut(ctx, master, p)
		switch {
		case err == nil:
			k.log.Debug("data key made", "database", p.database, "data_key", p.id, "version", dk.Number, "master_version", dk.Master)
			return namedToAPI(dk, dk.DataVersion), nil
		case !errors.Is(err, catalog.ErrConflict) || ctx.Err() != nil:
			return api.NamedKey{}, ifEnded(ctx, err)
		}
		if _, err := k.refresh(ctx, master.rec.Name); err != nil {
			return api.NamedKey{}, err
		}
	}
}

// check finds what is wrong with a put in itself.
func (p *dataKeyPut) check() error {
	switch {
	case p.CAS != nil && *p.CAS < 0:
		return badRequest("cas is %d, want the number of the newest version, or 0 for none", *p.CAS)
	case p.Plaintext == nil && p.Object:
		return badRequest("an object was announced, but there is none")
	case p.Plaintext == nil:
		if p.Bytes < 0 || p.Bytes > api.MaxDataKey {
			return badRequest("a data key of %d bytes was asked for, want 1 to %d", p.Bytes, api.MaxDataKey)
		}
		return nil
	case p.Bytes != 0:
		return badRequest("both a plaintext and a number of bytes were given; an HSM makes a data key only without a plaintext")
	case len(p.Plaintext) == 0:
		return badRequest("the plaintext is empty; without one an HSM makes the data key")
	case len(p.Plaintext) > api.MaxPlaintext:
		return tooLarge("the plaintext has %d bytes, at most %d can be kept", len(p.Plaintext), api.MaxPlaintext)
	case p.Object && (!json.Valid(p.Plaintext) || bytes.TrimLeft(p.Plaintext, " \t\r\n")[0] != '{'):
		return badRequest("the plaintext is not a JSON object")
	}
	return nil
}

// tryPut makes a version after the one that is the newest now. ErrConflict: it is not so
// any more.
func (k *KMS) tryPut(ctx context.Context, master *key, p *dataKeyPut) (catalog.DataKey, error) {
	before, err := k.catalog.DataKey(ctx, p.database, p.id)
	if errors.Is(err, catalog.ErrNotFound) {
		before = catalog.DataKey{Database: p.database, ID: p.id}
	} else if err != nil {
		return catalog.DataKey{}, err
	}
	if err := p.follows(before); err != nil {
		return catalog.DataKey{}, err
	}
	plaintext, err := k.plaintextOf(ctx, master, p, before)
	if err != nil {
		return catalog.DataKey{}, err
	}
	v := catalog.DataVersion{Number: before.Number + 1, Created: now(), Object: p.Object}
	v.Envelope, v.Master, err = k.wrap(ctx, master, plaintext, dataKeyAAD(p.database, p.id, v.Number, v.Object))
	if err != nil {
		return catalog.DataKey{}, ofHSMs(err)
	}
	return k.commitDataKey(ctx, master, before, v)
}

// follows says whether a version may come after another, which is 0 for none.
func (p *dataKeyPut) follows(before catalog.DataKey) error {
	which := ofDataKey(p.database, p.id)
	switch {
	case p.rotate && before.Number == 0:
		return api.NewError(api.CodeNotFound, fmt.Sprintf("database %q has no data key %q", p.database, p.id), nil)
	case p.rotate && before.Deleted != nil:
		return deleted(before, before.DataVersion)
	case p.rotate && before.Object:
		return stateError("put its next version", "%s is a JSON object, which only its client can make", which)
	case before.Number >= maxDataVersions:
		return stateError("use another data key", "%s has %d versions, and more are not possible", which, before.Number)
	case p.CAS == nil || *p.CAS == before.Number:
		return nil
	}
	if *p.CAS == 0 { // whoever asks wants to make it, by cas or by a command
		e := api.NewError(api.CodeExists, fmt.Sprintf("there is a %s already, its newest version is %d", which, before.Number), api.ErrCAS)
		e.Hint = "to make its next version, rotate it"
		return e
	}
	is := fmt.Sprintf("the newest version of %s is %d", which, before.Number)
	if before.Number == 0 {
		is = "there is no " + which
	}
	e := api.NewError(api.CodeState, fmt.Sprintf("%s, but cas is %d", is, *p.CAS), api.ErrCAS)
	e.Hint = "somebody else has put it meanwhile; read it before you put it again"
	return e
}

// plaintextOf returns what was given, or draws as much as was asked for, once.
func (k *KMS) plaintextOf(ctx context.Context, master *key, p *dataKeyPut, before catalog.DataKey) ([]byte, error) {
	if p.Plaintext != nil {
		return p.Plaintext, k.checkFormat(p.database, len(p.Plaintext), p.Object)
	}
	n := p.Bytes
	if n == 0 && before.Number > 0 && !before.Object {
		e, err := envelope.Parse(before.Envelope)
		if err != nil {
			return nil, fmt.Errorf("finding the length of version %d: %w", before.Number, err)
		}
		n = e.PlaintextSize()
	}
	n = cmp.Or(n, 32)
	if err := k.checkFormat(p.database, n, false); err != nil {
		return nil, err
	}
	if len(p.drawn) == n {
		return p.drawn, nil
	}
	if master.primary < 0 {
		return nil, master.unusable()
	}
	g, err := k.groupOf(master.rec)
	if err != nil {
		return nil, err
	}
	clear(p.drawn)
	p.drawn, err = g.random(ctx, n)
	return p.drawn, err
}

// checkFormat refuses what the readers of a database could not use.
func (k *KMS) checkFormat(database string, size int, object bool) error {
	if k.format(database) != api.FormatMariaDB {
		return nil
	}
	if object {
		return badRequest("the data keys of database %q are for MariaDB, which wants the bytes of a key, not a JSON object", database)
	}
	if !api.MariaDBTakes(size) {
		return badRequest("the data keys of database %q are for MariaDB, which wants 16, 24 or 32 bytes, not %d: "+
			"it would take any other length, and stop when it writes a page", database, size)
	}
	return nil
}

// commitDataKey writes a version after before and, when that returns an error, finds out
// what has become of it.
func (k *KMS) commitDataKey(ctx context.Context, master *key, before catalog.DataKey, v catalog.DataVersion) (catalog.DataKey, error) {
	next := before
	next.DataVersion = v
	var old *catalog.OldVersion
	if before.Number == 0 {
		next.First = v.Created
	} else {
		old = &catalog.OldVersion{Database: before.Database, ID: before.ID, DataVersion: before.DataVersion}
	}
	committed, err := k.catalog.PutDataKey(ctx, master.rec, next, old)
	if err == nil || nothingChanged(err) {
		return committed, err
	}
	found, lookup := k.versionNow(ctx, next)
	switch {
	case lookup == nil && bytes.Equal(found.Envelope, v.Envelope):
		return next, nil
	case lookup == nil && found.Number < v.Number, errors.Is(lookup, catalog.ErrNotFound):
		return catalog.DataKey{}, err
	}
	e := api.NewError(api.CodeUnavailable, fmt.Sprintf("it is not known whether version %d of %s was made: %v",
		v.Number, ofDataKey(next.Database, next.ID), err), err)
	e.Hint = "describe the data key before you put it again"
	return catalog.DataKey{}, e
}

// nothingChanged reports whether an error of the catalog's Apply says so.
func nothingChanged(err error) bool {
	for _, certain := range []error{
		catalog.ErrConflict, catalog.ErrTooLarge, catalog.ErrFull, catalog.ErrClosed, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, certain) {
			return true
		}
	}
	return false
}
