package kms

import (
	"context"
	"errors"

	"kmsd/kms/api"
)

var errNotYet = errors.New("not there yet")

// AddMember takes a member into a group.
func (k *KMS) AddMember(ctx context.Context, groupName string, spec api.MemberSpec) (api.Member, error) {
	return api.Member{}, translate("adding a member", errNotYet)
}

// RemoveMember drains a member and forgets it.
func (k *KMS) RemoveMember(ctx context.Context, groupName, member string, force bool) error {
	return translate("removing a member", errNotYet)
}

// ReplaceMember accepts another token under the name of a member.
func (k *KMS) ReplaceMember(ctx context.Context, groupName, member string, spec *api.MemberSpec) (api.Member, error) {
	return api.Member{}, translate("replacing a member", errNotYet)
}

// SetRole makes a member active or standby, and ends a drain.
func (k *KMS) SetRole(ctx context.Context, groupName, member, role string, force bool) (api.Member, error) {
	return api.Member{}, translate("changing the role of a member", errNotYet)
}

// Drain lets a member finish what it has and gives it nothing new.
func (k *KMS) Drain(ctx context.Context, groupName, member string, force bool) (api.Member, error) {
	return api.Member{}, translate("draining a member", errNotYet)
}

// Reconfigure makes the members of the groups those of another configuration, as far
// as their entries have changed. What else has changed needs a new Open; it is
// returned in words.
func (k *KMS) Reconfigure(ctx context.Context, groups []GroupConfig) (left []string, err error) {
	return nil, translate("reconfiguring", errNotYet)
}
