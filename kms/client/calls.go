package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"kmsd/kms/api"
)

// of is a question about a key. Not every name makes a path, so a wrong one is
// refused here.
func of(name, below string) (question, error) {
	if err := api.CheckName(name); err != nil {
		return question{}, err
	}
	return question{method: http.MethodPost, path: "/v1/keys/" + url.PathEscape(name) + below}, nil
}

// about asks a question about a key.
func about[Ans any](ctx context.Context, c *Client, name, below string, body any, kind kind) (Ans, error) {
	q, err := of(name, below)
	if err != nil {
		var zero Ans
		return zero, err
	}
	q.body, q.kind = body, kind
	return ask[Ans](ctx, c, q)
}

// CreateMasterKey makes a key with its version 1.
func (c *Client) CreateMasterKey(ctx context.Context, name string, opts api.KeyOptions) (api.Key, error) {
	if err := api.CheckName(name); err != nil {
		return api.Key{}, err
	}
	return ask[api.Key](ctx, c, question{method: http.MethodPost, path: "/v1/keys", body: api.CreateBody{Name: name, KeyOptions: opts}})
}

// Key shows a key.
func (c *Client) Key(ctx context.Context, name string) (api.Key, error) {
	q, err := of(name, "")
	if err != nil {
		return api.Key{}, err
	}
	q.method, q.kind = http.MethodGet, repeatable
	return ask[api.Key](ctx, c, q)
}

// Keys lists keys by name.
func (c *Client) Keys(ctx context.Context, opts api.ListOptions) (api.KeyPage, error) {
	return ask[api.KeyPage](ctx, c, question{method: http.MethodGet, path: withQuery("/v1/keys", pageQuery(opts)), kind: repeatable})
}

// UpdateKey changes what the key's owner may change.
func (c *Client) UpdateKey(ctx context.Context, name string, up api.KeyUpdate) (api.Key, error) {
	q, err := of(name, "")
	if err != nil {
		return api.Key{}, err
	}
	q.method, q.body = http.MethodPatch, up
	return ask[api.Key](ctx, c, q)
}

// Rotate makes the next version.
func (c *Client) Rotate(ctx context.Context, name string) (int, error) {
	v, err := c.RotateWith(ctx, name, api.RotateOptions{})
	return v.Number, err
}

// RotateWith makes the next version, with choices. Of the version it knows the number
// and the copies.
func (c *Client) RotateWith(ctx context.Context, name string, opts api.RotateOptions) (api.Version, error) {
	a, err := about[api.VersionBody](ctx, c, name, "/rotate", opts, once)
	return api.Version{Number: a.Version, Copies: a.Copies}, err
}

// Disable refuses every use of a key until Enable.
func (c *Client) Disable(ctx context.Context, name string) (api.Key, error) {
	return about[api.Key](ctx, c, name, "/disable", nil, once)
}

// Enable undoes Disable.
func (c *Client) Enable(ctx context.Context, name string) (api.Key, error) {
	return about[api.Key](ctx, c, name, "/enable", nil, once)
}

// Destroy schedules the destruction of every version.
func (c *Client) Destroy(ctx context.Context, name string, window time.Duration) (api.Key, error) {
	q, err := of(name, "")
	if err != nil {
		return api.Key{}, err
	}
	q.method = http.MethodDelete
	if window >= 0 {
		q.path = withQuery(q.path, url.Values{"window": {window.String()}})
	}
	return ask[api.Key](ctx, c, q)
}

// Restore takes a scheduled destruction back.
func (c *Client) Restore(ctx context.Context, name string) (api.Key, error) {
	return about[api.Key](ctx, c, name, "/restore", nil, once)
}

// Verify asks every member for its copy of every version.
func (c *Client) Verify(ctx context.Context, name string) (api.Verification, error) {
	return about[api.Verification](ctx, c, name, "/verify", nil, repeatable)
}

// Wrap encrypts plaintext under the newest version.
func (c *Client) Wrap(ctx context.Context, name string, plaintext, aad []byte) ([]byte, error) {
	a, err := about[api.Result](ctx, c, name, "/wrap", api.Item{Plaintext: plaintext, AAD: aad}, repeatable)
	if err != nil {
		return nil, err
	}
	return must(a.Wrapped, "wrapped")
}

// Unwrap decrypts an envelope.
func (c *Client) Unwrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	a, err := about[api.Result](ctx, c, name, "/unwrap", api.Item{Wrapped: wrapped, AAD: aad}, repeatable)
	if err != nil {
		return nil, err
	}
	return must(a.Plaintext, "plaintext")
}

// Rewrap moves an envelope to the newest version.
func (c *Client) Rewrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error) {
	a, err := about[api.Result](ctx, c, name, "/rewrap", api.Item{Wrapped: wrapped, AAD: aad}, repeatable)
	if err != nil {
		return nil, err
	}
	return must(a.Wrapped, "wrapped")
}

// DataKey makes n random bytes, in the clear and wrapped.
func (c *Client) DataKey(ctx context.Context, name string, n int, aad []byte) (api.DataKey, error) {
	if n < 1 || n > api.MaxDataKey { // zero would mean the default on the wire
		return api.DataKey{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("a data key has 1 to %d bytes, not %d", api.MaxDataKey, n), nil)
	}
	a, err := about[api.DataKey](ctx, c, name, "/datakey", api.DataKeyBody{Bytes: n, AAD: aad}, repeatable)
	switch {
	case err != nil:
		return api.DataKey{}, err
	case len(a.Plaintext) != n || len(a.Wrapped) == 0:
		return api.DataKey{}, incomplete("the data key")
	}
	return a, nil
}

// Batch does one operation on many items.
func (c *Client) Batch(ctx context.Context, op api.Op, name string, items []api.Item) ([]api.Result, error) {
	var body any = api.ItemsBody{Items: items}
	switch op {
	case api.OpWrap, api.OpUnwrap, api.OpRewrap:
	case api.OpDataKey:
		body = dataKeysBody(items)
	default:
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("no operation is named %q", op), nil)
	}
	if len(items) == 0 {
		return nil, api.NewError(api.CodeBadRequest, "items is empty", nil)
	}
	a, err := about[api.ResultsBody](ctx, c, name, "/"+string(op), body, repeatable)
	switch {
	case err != nil:
		return nil, err
	case len(a.Items) != len(items): // a result must not be taken for another item's
		return nil, incomplete("the batch")
	}
	return a.Items, nil
}

func dataKeysBody(items []api.Item) api.DataKeysBody {
	body := api.DataKeysBody{Items: make([]api.DataKeyBody, len(items))}
	for i, item := range items {
		body.Items[i] = api.DataKeyBody{Bytes: item.Bytes, AAD: item.AAD}
		if item.WrappedOnly {
			body.Items[i].Plaintext = new(bool)
		}
	}
	return body
}

// Sign signs a digest.
func (c *Client) Sign(ctx context.Context, name string, req api.SignRequest) (api.Signature, error) {
	return about[api.Signature](ctx, c, name, "/sign", req, repeatable)
}

// VerifySignature says whether a signature matches.
func (c *Client) VerifySignature(ctx context.Context, name string, req api.VerifyRequest) (bool, error) {
	a, err := about[api.ValidBody](ctx, c, name, "/verify-signature", req, repeatable)
	return a.Valid, err
}

// Decrypt undoes RSA-OAEP.
func (c *Client) Decrypt(ctx context.Context, name string, req api.DecryptRequest) ([]byte, error) {
	a, err := about[api.PlaintextBody](ctx, c, name, "/decrypt", req, repeatable)
	return a.Plaintext, err
}

// MAC computes an HMAC.
func (c *Client) MAC(ctx context.Context, name string, req api.MACRequest) (api.MAC, error) {
	return about[api.MAC](ctx, c, name, "/mac", req, repeatable)
}

// Random returns n bytes from the random source of an HSM.
func (c *Client) Random(ctx context.Context, group string, n int) ([]byte, error) {
	query := url.Values{"bytes": {strconv.Itoa(n)}}
	if group != "" {
		query.Set("group", group)
	}
	a, err := ask[api.RandomBody](ctx, c, question{method: http.MethodGet, path: withQuery("/v1/random", query), kind: repeatable})
	switch {
	case err != nil:
		return nil, err
	case len(a.Random) != n:
		return nil, incomplete("the random bytes")
	}
	return a.Random, nil
}

func withQuery(path string, query url.Values) string {
	if len(query) == 0 {
		return path
	}
	return path + "?" + query.Encode()
}

// must refuses an answer without the one thing that was asked for.
func must(b []byte, field string) ([]byte, error) {
	if len(b) == 0 {
		return nil, incomplete("the field " + field)
	}
	return b, nil
}

func incomplete(what string) error {
	return api.NewError(api.CodeInternal, "the answer of kmsd is without "+what+", or not of the length that was asked for", nil)
}
