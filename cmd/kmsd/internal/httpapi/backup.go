package httpapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"kmsd/kms/api"
)

// download is the answer of a route that sends bytes as they come. It returns what the
// trailer says of them. The door writes it.
type download func(ctx context.Context, w io.Writer) (report any, err error)

func backup(_ context.Context, c *call, req api.BackupBody) (download, error) {
	c.record.Spec = showRecipients(req.Recipients)
	return func(ctx context.Context, w io.Writer) (any, error) { return c.service.Backup(ctx, w, req.Recipients) }, nil
}

// showRecipients says for the audit log who can read a backup. Of what is no recipient it
// says nothing: somebody may have sent the secret key.
func showRecipients(recipients []string) string {
	shown := make([]string, len(recipients))
	for i, r := range recipients {
		if shown[i] = r; !strings.HasPrefix(r, "age1") {
			shown[i] = "(not recorded)"
		}
	}
	return "recipients=" + strings.Join(shown, ",")
}

// Operations of a download in the audit log. The first is written down before the first
// byte, so that nothing is released without a record.
const (
	downloadBegins = "begin"
	downloadEnds   = "end"
)

// serveDownload writes bytes until they end. An error before the first byte is answered
// as any other; after that the connection breaks, so that nobody takes a part for the whole.
func (h *Handler) serveDownload(ctx context.Context, rt *route, c *call, write download, w http.ResponseWriter) {
	out := &outflow{h: h, c: c, w: w, rc: http.NewResponseController(w)}
	report, err := h.guard(rt, c, func() (any, error) { return write(ctx, out) })
	if err == nil && !out.begun {
		err = out.begin()
	}
	if err == nil {
		err = out.end(report)
	}
	if out.gone != nil {
		err = api.NewError(api.CodeUnavailable, "the client has not taken all of it: "+out.gone.Error(), out.gone)
	}
	c.record.Operation = downloadEnds
	e := h.finish(ctx, c, err)
	switch {
	case e == nil:
	case out.begun:
		panic(http.ErrAbortHandler)
	default:
		h.refuse(w, e)
	}
}

// outflow writes a download.
type outflow struct {
	h     *Handler
	c     *call
	w     http.ResponseWriter
	rc    *http.ResponseController
	begun bool  // the header is written
	gone  error // why the client cannot be written to; nil: it can
}

// begin writes the record of the beginning and the header.
func (o *outflow) begin() error {
	r := o.c.record
	r.Operation, r.Outcome, r.Duration = downloadBegins, "ok", time.Since(r.Time)
	if err := o.h.cfg.Audit.Record(context.Background(), r); err != nil {
		return fmt.Errorf("writing the audit log: %w", err)
	}
	head := o.w.Header()
	head.Set("Content-Type", "application/octet-stream")
	head.Set("Cache-Control", "no-store")
	head.Set("X-Content-Type-Options", "nosniff")
	head.Set("Trailer", api.BackupReportHeader)
	o.w.WriteHeader(http.StatusOK)
	o.begun = true
	return nil
}

// Write gives a client a minute to take what there is.
func (o *outflow) Write(b []byte) (int, error) {
	if !o.begun {
		if err := o.begin(); err != nil {
			return 0, err
		}
	}
	_ = o.rc.SetWriteDeadline(time.Now().Add(time.Minute))
	n, err := o.w.Write(b)
	if err != nil {
		o.gone = err
	}
	return n, err
}

// end sends what is left and sets the trailer, which goes out when the door is passed.
func (o *outflow) end(report any) error {
	text, err := json.Marshal(report)
	if err != nil {
		return fmt.Errorf("encoding the report of a download: %w", err)
	}
	_ = o.rc.SetWriteDeadline(time.Now().Add(time.Minute))
	if err := o.rc.Flush(); err != nil {
		o.gone = err
		return err
	}
	o.w.Header().Set(api.BackupReportHeader, string(text))
	return nil
}
