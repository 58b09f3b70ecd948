package client

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"kmsd/kms/api"
)

// ofDatabase is a question about a database that is answered from what is remembered.
func ofDatabase(name, below string) (question, error) {
	if err := api.CheckDatabaseName(name); err != nil {
		return question{}, err
	}
	return question{method: http.MethodGet, path: "/v1/databases/" + url.PathEscape(name) + below, kind: repeatable}, nil
}

// ofNamed is the same for a data key. Its ID is one segment of the path, whatever its
// bytes are.
func ofNamed(database, id, below string) (question, error) {
	if err := api.CheckNamedKeyID(id); err != nil {
		return question{}, err
	}
	return ofDatabase(database, "/keys/"+escapeID(id)+below)
}

// escapeID escapes dots too where everybody on the way takes them for a step in the path.
func escapeID(id string) string {
	if id == "." || id == ".." {
		return strings.ReplaceAll(id, ".", "%2E")
	}
	return url.PathEscape(id)
}

// to asks a question, unless it could not be made.
func to[Ans any](ctx context.Context, c *Client, q question, err error) (Ans, error) {
	if err != nil {
		var zero Ans
		return zero, err
	}
	return ask[Ans](ctx, c, q)
}

// change is a question that changes something, as q asks for it.
func change(method string, body any, q question, err error) (question, error) {
	q.method, q.body, q.kind = method, body, once
	return q, err
}

// pageQuery is what chooses a page.
func pageQuery(opts api.ListOptions) url.Values {
	query := url.Values{}
	if opts.Prefix != "" {
		query.Set("prefix", opts.Prefix)
	}
	if opts.After != "" {
		query.Set("after", opts.After)
	}
	if opts.Limit != 0 {
		query.Set("limit", strconv.Itoa(opts.Limit))
	}
	return query
}

// CreateDatabase makes a database and, when there is none, its master key.
func (c *Client) CreateDatabase(ctx context.Context, name string, opts api.DatabaseOptions) (api.Database, error) {
	if err := api.CheckDatabaseName(name); err != nil {
		return api.Database{}, err
	}
	body := api.CreateDatabaseBody{Name: name, DatabaseOptions: opts}
	return ask[api.Database](ctx, c, question{method: http.MethodPost, path: "/v1/databases", body: body})
}

// Database shows a database.
func (c *Client) Database(ctx context.Context, name string) (api.Database, error) {
	q, err := ofDatabase(name, "")
	return to[api.Database](ctx, c, q, err)
}

// Databases lists databases by name.
func (c *Client) Databases(ctx context.Context, opts api.ListOptions) (api.DatabasePage, error) {
	return ask[api.DatabasePage](ctx, c, question{method: http.MethodGet, path: withQuery("/v1/databases", pageQuery(opts)), kind: repeatable})
}

// PutNamedKey makes the first or the next version of a data key.
func (c *Client) PutNamedKey(ctx context.Context, database, id string, put api.NamedKeyPut) (api.NamedKey, error) {
	q, err := ofNamed(database, id, "")
	q, err = change(http.MethodPut, put, q, err)
	return to[api.NamedKey](ctx, c, q, err)
}

// RotateNamedKey makes the next version of a data key in an HSM.
func (c *Client) RotateNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	q, err := ofNamed(database, id, "/rotate")
	q, err = change(http.MethodPost, nil, q, err)
	return to[api.NamedKey](ctx, c, q, err)
}

// NamedKey returns a version of a data key; version 0 is the newest.
func (c *Client) NamedKey(ctx context.Context, database, id string, version int) (api.NamedKey, error) {
	q, err := ofNamed(database, id, "")
	if err != nil {
		return api.NamedKey{}, err
	}
	if version != 0 {
		q.path = withQuery(q.path, url.Values{"version": {strconv.Itoa(version)}})
	}
	k, err := ask[api.NamedKey](ctx, c, q)
	switch {
	case err != nil:
		return api.NamedKey{}, err
	case len(k.Plaintext) == 0 || k.Version == 0 || k.Version != cmp.Or(version, k.Version):
		clear(k.Plaintext)
		return api.NamedKey{}, incomplete("the data key")
	}
	return k, nil
}

// DescribeNamedKey returns the newest version of a data key without its plaintext.
func (c *Client) DescribeNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	q, err := ofNamed(database, id, "/metadata")
	return to[api.NamedKey](ctx, c, q, err)
}

// NamedKeys lists data keys by ID.
func (c *Client) NamedKeys(ctx context.Context, database string, opts api.ListOptions) (api.NamedKeyPage, error) {
	q, err := ofDatabase(database, "/keys")
	q.path = withQuery(q.path, pageQuery(opts))
	return to[api.NamedKeyPage](ctx, c, q, err)
}

// DeleteNamedKey marks the newest version of a data key as deleted.
func (c *Client) DeleteNamedKey(ctx context.Context, database, id string) error {
	q, err := ofNamed(database, id, "")
	q, err = change(http.MethodDelete, nil, q, err)
	_, err = to[struct{}](ctx, c, q, err)
	return err
}

// Rekey makes the next version of a database's master key and begins a job that wraps
// every data key under it.
func (c *Client) Rekey(ctx context.Context, database string, opts api.RekeyOptions) (api.Job, error) {
	q, err := ofDatabase(database, "/rekey")
	q, err = change(http.MethodPost, opts, q, err)
	return to[api.Job](ctx, c, q, err)
}

// Job returns how far a job is.
func (c *Client) Job(ctx context.Context, id string) (api.Job, error) {
	if id == "" || id == "." || id == ".." {
		return api.Job{}, api.NewError(api.CodeNotFound, fmt.Sprintf("there is no job %q", id), nil)
	}
	return ask[api.Job](ctx, c, question{method: http.MethodGet, path: "/v1/jobs/" + url.PathEscape(id), kind: repeatable})
}

// ChangeVersion does to one version of a key what Disable, Enable, Destroy and Restore do
// to all.
func (c *Client) ChangeVersion(ctx context.Context, key string, version int, what api.VersionChange) (api.Key, error) {
	if version < 1 { // none means all on the wire
		return api.Key{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("a key has no version %d", version), nil)
	}
	query := url.Values{"version": {strconv.Itoa(version)}}
	below, method := "/"+string(what.Action), http.MethodPost
	switch what.Action {
	case api.ActionDisable, api.ActionEnable, api.ActionRestore:
	case api.ActionDestroy:
		below, method = "", http.MethodDelete
		if what.Window >= 0 {
			query.Set("window", what.Window.String())
		}
	default:
		return api.Key{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("nothing that is done to a version is named %q", what.Action), nil)
	}
	q, err := of(key, withQuery(below, query))
	q, err = change(method, nil, q, err)
	return to[api.Key](ctx, c, q, err)
}
