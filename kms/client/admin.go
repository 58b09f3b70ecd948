package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"kmsd/kms/api"
)

func groupPath(group string) string { return "/v1/groups/" + url.PathEscape(group) }

func memberPath(group, member string) string {
	return groupPath(group) + "/members/" + url.PathEscape(member)
}

// forced appends force to a path.
func forced(path string, force bool) string {
	if !force {
		return path
	}
	return withQuery(path, url.Values{"force": {"true"}})
}

// withLast appends last to a path; 0 leaves the choice to the server.
func withLast(path string, last int) string {
	if last == 0 {
		return path
	}
	return withQuery(path, url.Values{"last": {strconv.Itoa(last)}})
}

// named refuses names that make no path, or that of something else.
func named(names ...string) error {
	for _, name := range names {
		if name == "" || name == "." || name == ".." {
			return api.NewError(api.CodeNotFound, fmt.Sprintf("no group or member is named %q", name), nil)
		}
	}
	return nil
}

// onMember puts a question about a member. What it asks for is tried once: a second
// attempt would be another attempt on an HSM.
func onMember[Ans any](ctx context.Context, c *Client, method, group, member, path string, body any) (Ans, error) {
	if err := named(group, member); err != nil {
		var zero Ans
		return zero, err
	}
	return ask[Ans](ctx, c, question{method: method, path: path, body: body, kind: once})
}

// Recover makes an attempt to bring a member back now and returns how it ended.
func (c *Client) Recover(ctx context.Context, group, member string) error {
	_, err := onMember[api.Member](ctx, c, http.MethodPost, group, member, memberPath(group, member)+"/recover", nil)
	return err
}

// AddMember takes a member into a group.
func (c *Client) AddMember(ctx context.Context, group string, spec api.MemberSpec) (api.Member, error) {
	return onGroup[api.Member](ctx, c, group, "/members", spec)
}

// RemoveMember drains a member and forgets it.
func (c *Client) RemoveMember(ctx context.Context, group, member string, force bool) error {
	_, err := onMember[api.Group](ctx, c, http.MethodDelete, group, member, forced(memberPath(group, member), force), nil)
	return err
}

// ReplaceMember accepts another token, or with a spec another HSM, under the name of
// a member.
func (c *Client) ReplaceMember(ctx context.Context, group, member string, spec *api.MemberSpec) (api.Member, error) {
	var body any
	if spec != nil {
		body = spec
	}
	return onMember[api.Member](ctx, c, http.MethodPost, group, member, memberPath(group, member)+"/replace", body)
}

// SetRole makes a member active or standby, and ends a drain.
func (c *Client) SetRole(ctx context.Context, group, member, role string, force bool) (api.Member, error) {
	return onMember[api.Member](ctx, c, http.MethodPatch, group, member, forced(memberPath(group, member), force), api.RoleBody{Role: role})
}

// Drain lets a member finish what it has and gives it nothing new.
func (c *Client) Drain(ctx context.Context, group, member string, force bool) (api.Member, error) {
	return onMember[api.Member](ctx, c, http.MethodPost, group, member, forced(memberPath(group, member)+"/drain", force), nil)
}

// onGroup puts a question about a group, once.
func onGroup[Ans any](ctx context.Context, c *Client, group, below string, body any) (Ans, error) {
	if err := named(group); err != nil {
		var zero Ans
		return zero, err
	}
	return ask[Ans](ctx, c, question{method: http.MethodPost, path: groupPath(group) + below, body: body, kind: once})
}

// Sync compares every member in step with the catalog and mends what differs. It
// takes as long as ctx lets it.
func (c *Client) Sync(ctx context.Context, group string, opts api.SyncOptions) (api.SyncReport, error) {
	if err := named(group); err != nil {
		return api.SyncReport{}, err
	}
	return ask[api.SyncReport](ctx, c, question{
		method: http.MethodPost, path: groupPath(group) + "/sync", body: opts, kind: once, patient: true,
	})
}

// Reinitialize makes an attempt now to bring back every member that is away.
func (c *Client) Reinitialize(ctx context.Context, group string) (api.Group, error) {
	return onGroup[api.Group](ctx, c, group, "/reinitialize", nil)
}

// Check asks every member whether it still fits the group.
func (c *Client) Check(ctx context.Context, group string) (api.GroupCheck, error) {
	return onGroup[api.GroupCheck](ctx, c, group, "/check", nil)
}

// Log returns the last events of groups and members, oldest first.
func (c *Client) Log(ctx context.Context, last int) ([]api.Event, error) {
	if last < 0 || last > api.MaxLog {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("of the log the last 1 to %d events can be had, or 0 for all, not %d", api.MaxLog, last), nil)
	}
	a, err := ask[api.LogBody](ctx, c, question{method: http.MethodGet, path: withLast("/v1/log", last), kind: repeatable})
	return a.Events, err
}
