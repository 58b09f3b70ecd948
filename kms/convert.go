package kms

import (
	"encoding/hex"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// toAPI returns a record as users see it. It shares nothing with the record.
func toAPI(rec catalog.Key) api.Key {
	k := api.Key{
		Name: rec.Name, Group: rec.Group, Type: rec.Type, State: api.State(stateOf(rec)),
		MinCopies: rec.MinCopies, RotationPeriod: api.Duration(rec.RotationPeriod), Created: rec.Created,
		Databases: slices.Clone(rec.Databases),
		Versions:  make([]api.Version, len(rec.Versions)),
	}
	for i, v := range rec.Versions {
		k.Versions[i] = api.Version{
			Number: v.Number, State: api.State(v.State), Created: v.Created, DestroyAt: copyTime(v.DestroyAt),
			CheckValue: hex.EncodeToString(v.CheckValue), PublicKey: slices.Clone(v.Public),
			Copies: append([]string{}, v.Copies...),
		}
		if v.State == catalog.Enabled {
			k.Primary = v.Number
		}
		if v.State == catalog.DestroyScheduled && v.DestroyAt != nil &&
			(k.DestroyAt == nil || v.DestroyAt.Before(*k.DestroyAt)) {
			k.DestroyAt = copyTime(v.DestroyAt)
		}
	}
	return k
}

// namedToAPI returns a version of a data key as users see it, without its plaintext.
func namedToAPI(dk catalog.DataKey, v catalog.DataVersion) api.NamedKey {
	named := api.NamedKey{
		Database: dk.Database, Version: v.Number, Newest: dk.Number, Created: v.Created, First: dk.First,
		Deleted: copyTime(v.Deleted), Object: v.Object, Master: v.Master,
	}
	named.ID, named.Raw = api.ShowID(dk.ID)
	return named
}

// databaseToAPI returns a database as users see it, but for the number of its data keys.
func (k *KMS) databaseToAPI(db catalog.Database) (api.Database, error) {
	master, err := k.masterNamed(db.Name, db.Key)
	if err != nil {
		return api.Database{}, err
	}
	shown := api.Database{
		Name: db.Name, Key: db.Key, Group: master.rec.Group, Format: k.format(db.Name), Created: db.Created, Job: db.Job,
	}
	if master.primary >= 0 {
		shown.Version = master.rec.Versions[master.primary].Number
	}
	return shown, nil
}

func copyTime(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	c := *t
	return &c
}

// cloneRecord returns a copy that may be changed.
func cloneRecord(rec catalog.Key) catalog.Key {
	rec.Versions, rec.Databases = slices.Clone(rec.Versions), slices.Clone(rec.Databases)
	for i := range rec.Versions {
		rec.Versions[i].Copies = slices.Clone(rec.Versions[i].Copies)
	}
	return rec
}
