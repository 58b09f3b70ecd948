package catalog

import "fmt"

// Encode returns the record of a [Key], [Tombstone], [Database], [DataKey], [OldVersion],
// [Job] or [Usage], for whoever takes a catalog from one place to another, such as a
// backup. What a record may hold is checked as at every write.
func Encode(v any) (Record, error) {
	switch v := v.(type) {
	case Key:
		return encodeKey(v)
	case Tombstone:
		return encodeTombstone(v)
	case Database:
		return encodeDatabase(v)
	case DataKey:
		return encodeDataKey(v)
	case OldVersion:
		return encodeOldVersion(v)
	case Job:
		return encodeJob(v)
	case Usage:
		return encodeUsage(v)
	default:
		return Record{}, fmt.Errorf("encoding a %T: it is no record that leaves a catalog", v)
	}
}

// Decode returns what a record means: one of the types that Encode takes. It checks as
// much as when a catalog is read.
func Decode(r Record) (any, error) {
	if err := CheckID(r.Kind, r.ID); err != nil {
		return nil, damaged(r, err)
	}
	switch r.Kind {
	case KindKey:
		return decodeKey(r)
	case KindTombstone:
		return decodeTombstone(r)
	case KindDatabase:
		return decodeDatabase(r)
	case KindDataKey:
		return decodeDataKey(r)
	case KindDataVersion:
		return decodeOldVersion(r)
	case KindJob:
		return decodeJob(r)
	case KindUsage:
		return decodeUsage(r)
	default:
		return nil, damaged(r, fmt.Errorf("a %s does not leave its catalog", r.Kind))
	}
}
