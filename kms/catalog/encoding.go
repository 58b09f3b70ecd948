package catalog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// A record is rewritten as a whole, so a field that this program does not know would be
// lost at the next write, and with it perhaps a key. Therefore unknown fields and higher
// schemas are both refused: a newer kmsd that adds a field writes a higher schema, and
// going back to an older kmsd fails before it does harm.
//
// schemaOf is the form of the JSON in the value of a record of a kind, as it is written.
// Every form from 1 on is read.
func schemaOf(kind Kind) int {
	switch kind {
	case KindKey:
		return 2 // 1 had no databases
	default:
		return 1
	}
}

// Limits of what a record may hold; far above what kms ever writes.
const (
	maxIdentity = 64    // bytes
	maxMembers  = 1024  // in Copies and Pending
	maxText     = 256   // bytes of a group, a type or a member's name
	maxPublic   = 8192  // bytes of a public key
	maxVersions = 20000 // of one key
	maxUsers    = 1024  // databases of one key
	maxDigest   = 64    // bytes of a digest, as text
	maxSpec     = 65536 // bytes of the description of a member
)

type keyRecord struct {
	head
	Key
}

type intentRecord struct {
	head
	Intent
}

type tombstoneRecord struct {
	head
	Tombstone
}

func encodeKey(k Key) (Record, error) {
	if err := checkKey(k); err != nil {
		return Record{}, fmt.Errorf("writing key %q: %w", k.Name, err)
	}
	return encode(KindKey, k.Name, k.Rev, keyRecord{headOf(KindKey), k})
}

func decodeKey(r Record) (Key, error) {
	var v keyRecord
	if err := decode(r, &v); err != nil {
		return Key{}, err
	}
	if err := errors.Join(checkKey(v.Key), checkID(r, v.Key.Name)); err != nil {
		return Key{}, damaged(r, err)
	}
	v.Key.Rev = r.Rev
	return v.Key, nil
}

func encodeIntent(in Intent) (Record, error) {
	if err := checkIntent(in); err != nil {
		return Record{}, fmt.Errorf("writing the intent of key %q: %w", in.Key, err)
	}
	return encode(KindIntent, intentID(in), in.Rev, intentRecord{headOf(KindIntent), in})
}

func decodeIntent(r Record) (Intent, error) {
	var v intentRecord
	if err := decode(r, &v); err != nil {
		return Intent{}, err
	}
	if err := errors.Join(checkIntent(v.Intent), checkID(r, intentID(v.Intent))); err != nil {
		return Intent{}, damaged(r, err)
	}
	v.Intent.Rev = r.Rev
	return v.Intent, nil
}

func encodeTombstone(t Tombstone) (Record, error) {
	if err := checkTombstone(t); err != nil {
		return Record{}, fmt.Errorf("writing the tombstone of %q: %w", t.Identity, err)
	}
	return encode(KindTombstone, t.Identity, t.Rev, tombstoneRecord{headOf(KindTombstone), t})
}

func decodeTombstone(r Record) (Tombstone, error) {
	var v tombstoneRecord
	if err := decode(r, &v); err != nil {
		return Tombstone{}, err
	}
	if err := errors.Join(checkTombstone(v.Tombstone), checkID(r, v.Tombstone.Identity)); err != nil {
		return Tombstone{}, damaged(r, err)
	}
	v.Tombstone.Rev = r.Rev
	return v.Tombstone, nil
}

func encode(kind Kind, id string, rev uint64, v any) (Record, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return Record{}, fmt.Errorf("encoding %s %q: %w", kind, id, err)
	}
	if len(b) > MaxValue || len(id) > MaxID {
		return Record{}, fmt.Errorf("encoding %s %q, %d bytes: %w", kind, id, len(b), ErrTooLarge)
	}
	return Record{Kind: kind, ID: id, Rev: rev, Value: b}, nil
}

// head is the first field of every record.
type head struct {
	Schema int `json:"schema"`
}

func headOf(kind Kind) head { return head{schemaOf(kind)} }

func (h *head) schema() int { return h.Schema }

// decode reads a record strictly. Only when something is wrong is the schema looked at
// before the rest, so that a newer record is refused for what it is and not for a field.
func decode(r Record, into interface{ schema() int }) error {
	if len(r.Value) > MaxValue {
		return damaged(r, fmt.Errorf("it has %d bytes", len(r.Value)))
	}
	d := json.NewDecoder(bytes.NewReader(r.Value))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil && knows(r.Kind, into.schema()) && d.InputOffset() == int64(len(r.Value)) {
		return nil
	}
	var h head
	if err := json.Unmarshal(r.Value, &h); err != nil { // also for what follows the record
		return damaged(r, err)
	}
	if !knows(r.Kind, h.Schema) {
		return fmt.Errorf("reading %s %q: schema %d, this kmsd knows schema %d: %w", r.Kind, r.ID, h.Schema, schemaOf(r.Kind), ErrSchema)
	}
	if err != nil {
		return damaged(r, err)
	}
	return nil // there is white space after it
}

func knows(kind Kind, schema int) bool { return 1 <= schema && schema <= schemaOf(kind) }

func damaged(r Record, why error) error {
	return fmt.Errorf("reading %s %q: %w: %w", r.Kind, r.ID, ErrDamaged, why)
}

// checkID catches a record that was stored in another's place.
func checkID(r Record, id string) error {
	if r.ID != id {
		return fmt.Errorf("it says that it is %q", id)
	}
	return nil
}

func checkKey(k Key) error {
	if err := checkText("name", k.Name, MaxID); err != nil {
		return err
	}
	if err := checkText("group", k.Group, maxText); err != nil {
		return err
	}
	if err := checkText("type", k.Type, maxText); err != nil {
		return err
	}
	if len(k.Versions) > maxVersions {
		return fmt.Errorf("%d versions: %w", len(k.Versions), ErrTooLarge)
	}
	if len(k.Databases) > maxUsers {
		return fmt.Errorf("%d databases: %w", len(k.Databases), ErrTooLarge)
	}
	for _, db := range k.Databases {
		if err := checkDatabaseName(db); err != nil {
			return err
		}
	}
	last := 0
	for _, v := range k.Versions {
		if v.Number <= last {
			return fmt.Errorf("version %d after version %d", v.Number, last)
		}
		last = v.Number
		if err := checkVersion(v); err != nil {
			return fmt.Errorf("version %d: %w", v.Number, err)
		}
	}
	return nil
}

func checkVersion(v Version) error {
	switch v.State {
	case Enabled, Disabled, DestroyScheduled, Destroyed:
	default:
		return fmt.Errorf("unknown state %q", v.State)
	}
	if len(v.Public) > maxPublic || len(v.CheckValue) > maxIdentity {
		return ErrTooLarge
	}
	if err := checkText("identity", v.Identity, maxIdentity); err != nil {
		return err
	}
	return checkMembers(v.Copies)
}

func checkIntent(in Intent) error {
	if in.Op != IntentCreate && in.Op != IntentCanary {
		return fmt.Errorf("unknown operation %q", in.Op)
	}
	if in.Version < 1 {
		return fmt.Errorf("version %d", in.Version)
	}
	return errors.Join(
		checkText("identity", in.Identity, maxIdentity),
		checkText("key", in.Key, MaxID),
		checkText("group", in.Group, maxText),
		checkMembers(in.Members))
}

func checkTombstone(t Tombstone) error {
	return errors.Join(
		checkText("identity", t.Identity, maxIdentity),
		checkText("key", t.Key, MaxID),
		checkText("group", t.Group, maxText),
		checkMembers(t.Pending))
}

func checkMembers(members []string) error {
	if len(members) > maxMembers {
		return fmt.Errorf("%d members: %w", len(members), ErrTooLarge)
	}
	for _, m := range members {
		if err := checkText("member", m, maxText); err != nil {
			return err
		}
	}
	return nil
}

func checkText(what, s string, limit int) error {
	if s == "" {
		return fmt.Errorf("no %s", what)
	}
	if len(s) > limit {
		return fmt.Errorf("the %s has %d bytes: %w", what, len(s), ErrTooLarge)
	}
	return nil
}
