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
		Versions: make([]api.Version, len(rec.Versions)),
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

func copyTime(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	c := *t
	return &c
}

// cloneRecord returns a copy that may be changed.
func cloneRecord(rec catalog.Key) catalog.Key {
	rec.Versions = slices.Clone(rec.Versions)
	for i := range rec.Versions {
		rec.Versions[i].Copies = slices.Clone(rec.Versions[i].Copies)
	}
	return rec
}
