package client

import (
	"context"
	"encoding/json"
	"io"
	"net/http"

	"kmsd/kms/api"
)

// Backup writes a backup of kmsd to w. It takes as long as ctx lets it, and is tried once
// kmsd has been reached.
func (c *Client) Backup(ctx context.Context, w io.Writer, recipients []string) (api.BackupReport, error) {
	return ask[api.BackupReport](ctx, c, question{
		method: http.MethodPost, path: "/v1/backup", body: api.BackupBody{Recipients: recipients}, kind: once, patient: true, sink: w,
	})
}

// drain copies the body of an answer to q.sink. Only what the trailer has confirmed is all
// of it.
func (c *Client) drain(ctx context.Context, q question, resp *http.Response, answer any) *failure {
	to := &sink{w: q.sink}
	if _, err := io.Copy(to, resp.Body); err != nil {
		if to.err != nil {
			return &failure{err: api.NewError(api.CodeInternal, "writing what kmsd has sent: "+to.err.Error(), to.err)}
		}
		f := c.broken(ctx, q, err)
		f.err.Hint = "what was written is not a backup; kmsd's log says why the connection ended"
		return f
	}
	report := resp.Trailer.Get(api.BackupReportHeader)
	if report == "" || json.Unmarshal([]byte(report), answer) != nil {
		return &failure{err: api.AsError(incomplete("its end"))}
	}
	return nil
}

// sink remembers that it was the writer that failed.
type sink struct {
	w   io.Writer
	err error
}

func (s *sink) Write(b []byte) (int, error) {
	n, err := s.w.Write(b)
	if err != nil {
		s.err = err
	}
	return n, err
}
