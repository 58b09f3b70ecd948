package client

import (
	"context"
	"net/http"
	"time"

	"kmsd/kms/api"
)

// Status asks for the groups, for at most 2 seconds. If there is no answer it
// returns what was known last, with Error set.
func (c *Client) Status() api.Status {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s, err := ask[api.Status](ctx, c, question{method: http.MethodGet, path: "/v1/groups", kind: repeatable})
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		s = c.last
		s.Error = err.Error()
		return s
	}
	c.last = s
	return s
}

// Groups is Status for those who want the error, and to choose how long to wait.
func (c *Client) Groups(ctx context.Context) (api.Status, error) {
	return ask[api.Status](ctx, c, question{method: http.MethodGet, path: "/v1/groups", kind: repeatable})
}

// Group shows one group.
func (c *Client) Group(ctx context.Context, group string) (api.Group, error) {
	return ask[api.Group](ctx, c, question{method: http.MethodGet, path: groupPath(group), kind: repeatable})
}

// Ready says whether keys can be used. It needs no token. The error is nil also
// when they can not.
func (c *Client) Ready(ctx context.Context) (api.Readiness, error) {
	return ask[api.Readiness](ctx, c, question{method: http.MethodGet, path: "/readyz", kind: repeatable, also: http.StatusServiceUnavailable})
}
