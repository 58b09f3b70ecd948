package kms

import (
	"context"
	"errors"
	"slices"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// rekeyDue begins a rekey of every database whose data keys should follow a master key
// that has been rotated: one with a rotation period, whoever has rotated it, and one
// whose version had wrapped too often. Any other rotation is an operator's, who also
// says when the data keys follow. It goes by the catalog, so that a crash between the two
// loses nothing.
func (j *janitor) rekeyDue(ctx context.Context) error {
	type due struct {
		database string
		version  int
	}
	var all []due
	j.kms.ring.inGroup(j.g.name, func(k *key) bool {
		if k.primary < 0 || !k.leads() {
			return true
		}
		for _, db := range k.rec.Databases {
			if v := k.rec.Versions[k.primary].Number; j.rekeyed[db] < v {
				all = append(all, due{db, v})
			}
		}
		return true
	})
	var failures []error
	for _, d := range all {
		ctx, cancel := context.WithTimeout(ctx, choreTimeout)
		begun, err := j.kms.rekeyTo(ctx, d.database, d.version)
		cancel()
		if begun {
			j.rekeyed[d.database] = d.version
		}
		failures = append(failures, translate("rekeying database "+d.database, err))
	}
	return errors.Join(failures...)
}

// leads reports whether the data keys of a key's databases follow it by themselves.
func (k *key) leads() bool {
	return k.rec.RotationPeriod > 0 || slices.ContainsFunc(k.uses[:min(k.primary, len(k.uses))], (*usage).spent)
}

// rekeyTo sees to it that a database has had, or has, a rekey to a version that exists.
// Not begun: another one is under way, and this has to be asked again when it is done.
func (k *KMS) rekeyTo(ctx context.Context, database string, version int) (begun bool, err error) {
	had, err := k.hadRekey(ctx, database, version)
	if had || err != nil {
		return had, err
	}
	if err := k.rekeys.claim(database); err != nil {
		return false, nil
	}
	// Whoever had the claim may have begun it since, and it may be done.
	if had, err := k.hadRekey(ctx, database, version); had || err != nil {
		k.rekeys.release(database, nil)
		return had, err
	}
	_, err = k.beginRekey(ctx, database, version, api.RetireNone)
	return err == nil, err
}

// hadRekey reports whether the last rekey of a database was, or is, to a version or a later
// one.
func (k *KMS) hadRekey(ctx context.Context, database string, version int) (bool, error) {
	db, err := k.readDatabase(ctx, database)
	if err != nil {
		return false, err
	}
	last := catalog.Job{Version: 1} // without a rekey all is under the first version, or a later one
	if db.Job != "" {
		if last, err = k.catalog.Job(ctx, db.Job); err != nil {
			return false, err
		}
	}
	return last.Version >= version, nil
}
