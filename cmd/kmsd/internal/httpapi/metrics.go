package httpapi

import (
	"context"
	"net/http"
	"reflect"
	"time"

	"kmsd/kms/api"
)

// metricsType is the text format of Prometheus.
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// crowded is the operation that Observe is told of for requests that did not get as far
// as a route, since too many were being served.
const crowded = "any"

// finish records how a request ended, counts it, and returns the error to answer with,
// nil when it went well.
func (h *Handler) finish(ctx context.Context, c *call, err error) *api.Error {
	e := h.audit(ctx, c, err)
	outcome := "ok"
	if e != nil {
		outcome = string(e.Code)
	}
	h.cfg.Observe(c.record.Action, outcome, c.record.Items, c.failed, time.Since(c.record.Time))
	return e
}

// countFailed counts an item that failed in a batch that did not.
func (c *call) countFailed(code api.Code) {
	if c.failed == nil {
		c.failed = make(map[api.Code]int)
	}
	c.failed[code]++
}

// exposition is the answer of /metrics. It is text, and no JSON.
type exposition []byte

var expositionType = reflect.TypeFor[exposition]()

// metrics shows numbers about the service, from memory.
func metrics(h *Handler) (int, any) {
	if h.cfg.Metrics == nil {
		return http.StatusNotFound, errNoRoute()
	}
	text, err := h.cfg.Metrics()
	if err != nil {
		h.cfg.Logger.Error("there are no metrics", "error", err)
		return http.StatusInternalServerError, api.NewError(api.CodeInternal, "there are no metrics; the log says why", err)
	}
	return http.StatusOK, exposition(text)
}
