package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
)

// Member is what is remembered of a member of a group beside its entry in the
// configuration: which token it was admitted with, and what an operator has changed
// while the group served. Its record's ID is the group and the name.
type Member struct {
	Rev uint64 `json:"-"`

	Group string `json:"group"`
	Name  string `json:"name"`

	// Token is the token that the member was first admitted with; nil: none yet, or
	// the next one is as good.
	Token *Token `json:"token,omitempty"`

	// Seen is a digest of the member's entry in the configuration when the record was
	// last brought in line with it; "" means that the configuration has no such member.
	// What follows holds for as long as the entry has this digest.
	Seen string `json:"seen,omitempty"`

	// Spec is the description of a member that was added or replaced at run time, as
	// JSON; nil: it is as the configuration says.
	Spec    json.RawMessage `json:"spec,omitempty"`
	Removed bool            `json:"removed,omitempty"`
	Standby *bool           `json:"standby,omitempty"` // nil: as configured
	Drained bool            `json:"drained,omitempty"`
}

// Token is what tells a member's token from every other.
type Token struct {
	Serial string `json:"serial"`
	Label  string `json:"label"`
	Model  string `json:"model"`
	Domain []byte `json:"domain"` // check value of the domain key
	// Place is a digest of the driver and the settings that the token was found with.
	// With another place another token is no surprise.
	Place string `json:"place"`
}

// Is reports whether a token is this one. A label may change; what must not is the
// serial number and the domain.
func (t Token) Is(other Token) bool {
	return t.Serial == other.Serial && string(t.Domain) == string(other.Domain)
}

// Members yields what is remembered of the members of a group, by name, as it was at
// one moment. It ends with the first error.
func (c *Catalog) Members(ctx context.Context, group string) iter.Seq2[Member, error] {
	return decoded(c.store.List(ctx, KindMember, group+"/", "", 0), decodeMember)
}

// Member returns what is remembered of one member, or ErrNotFound.
func (c *Catalog) Member(ctx context.Context, group, name string) (Member, error) {
	r, err := c.store.Get(ctx, KindMember, memberID(group, name))
	if err != nil {
		return Member{}, fmt.Errorf("reading what is known of member %s of group %s: %w", name, group, err)
	}
	return decodeMember(r)
}

// UpdateMember reads what is remembered of a member, nothing at first, lets change
// work on it and writes it, again and again while somebody else is faster. change may
// be called several times, each time with a fresh copy; its error ends the update and
// nothing is written.
func (c *Catalog) UpdateMember(ctx context.Context, group, name string, change func(*Member) error) (Member, error) {
	doing := fmt.Sprintf("writing what is known of member %s of group %s", name, group)
	for {
		m, err := c.Member(ctx, group, name)
		if errors.Is(err, ErrNotFound) {
			m, err = Member{Group: group, Name: name}, nil
		}
		if err != nil {
			return Member{}, err
		}
		if err := change(&m); err != nil {
			return Member{}, err
		}
		r, err := encodeMember(m)
		if err != nil {
			return Member{}, err
		}
		rev, err := c.store.Apply(ctx, r)
		if err == nil {
			m.Rev = rev
			return m, nil
		}
		if !errors.Is(err, ErrConflict) || ctx.Err() != nil {
			return Member{}, fmt.Errorf("%s: %w", doing, err)
		}
	}
}

// ForgetMember removes what is remembered of a member. That there is nothing is no
// error.
func (c *Catalog) ForgetMember(ctx context.Context, group, name string) error {
	for {
		r, err := c.store.Get(ctx, KindMember, memberID(group, name))
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err == nil {
			_, err = c.store.Apply(ctx, Record{Kind: KindMember, ID: r.ID, Rev: r.Rev})
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrConflict) || ctx.Err() != nil {
			return fmt.Errorf("forgetting member %s of group %s: %w", name, group, err)
		}
	}
}

// memberID joins with a slash, which neither of the two has.
func memberID(group, name string) string { return group + "/" + name }

type memberRecord struct {
	head
	Member
}

func encodeMember(m Member) (Record, error) {
	if err := checkMember(m); err != nil {
		return Record{}, fmt.Errorf("writing what is known of member %q: %w", m.Name, err)
	}
	return encode(KindMember, memberID(m.Group, m.Name), m.Rev, memberRecord{headOf(KindMember), m})
}

func decodeMember(r Record) (Member, error) {
	var v memberRecord
	if err := decode(r, &v); err != nil {
		return Member{}, err
	}
	if err := errors.Join(checkMember(v.Member), checkID(r, memberID(v.Member.Group, v.Member.Name))); err != nil {
		return Member{}, damaged(r, err)
	}
	v.Member.Rev = r.Rev
	return v.Member, nil
}

func checkMember(m Member) error {
	for what, s := range map[string]string{"group": m.Group, "name": m.Name} {
		if err := checkText(what, s, maxText); err != nil {
			return err
		}
		if strings.Contains(s, "/") {
			return fmt.Errorf("a slash in the %s %q", what, s)
		}
	}
	if len(m.Seen) > maxDigest || len(m.Spec) > maxSpec {
		return ErrTooLarge
	}
	if t := m.Token; t != nil {
		if len(t.Serial) > maxText || len(t.Label) > maxText || len(t.Model) > maxText || len(t.Domain) > maxIdentity || len(t.Place) > maxDigest {
			return ErrTooLarge
		}
	}
	return nil
}
