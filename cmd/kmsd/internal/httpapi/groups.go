package httpapi

import (
	"context"
	"encoding/json"
	"net/http"

	"kmsd/kms/api"
)

func listGroups(_ context.Context, c *call, _ none) (api.Status, error) {
	return c.service.Status(), nil
}

func showGroup(_ context.Context, c *call, _ none) (api.Group, error) {
	return c.group(c.request.PathValue("group"))
}

func (c *call) group(name string) (api.Group, error) {
	for _, g := range c.service.Status().Groups {
		if g.Name == name {
			return g, nil
		}
	}
	return api.Group{}, api.NewError(api.CodeNotFound, "no group is named "+clip(name), nil)
}

func random(ctx context.Context, c *call, _ none) (api.RandomBody, error) {
	const byDefault = 32
	n, err := c.params.number("bytes", byDefault, api.MaxRandom)
	if err != nil {
		return api.RandomBody{}, err
	}
	c.record.Group = clip(c.params.text("group"))
	b, err := c.service.Random(ctx, c.params.text("group"), n)
	return api.RandomBody{Random: b}, err
}

func live(*Handler) (int, any) { return http.StatusOK, liveness{Live: true} }

func ready(h *Handler) (int, any) {
	r := h.cfg.Service.Ready()
	if !r.Ready {
		return http.StatusServiceUnavailable, r
	}
	return http.StatusOK, r
}

func openapi(h *Handler) (int, any) { return http.StatusOK, json.RawMessage(h.document) }
