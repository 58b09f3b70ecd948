package vaultkv

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"kmsd/kms/api"
)

// versionMeta is what Vault says about a version.
type versionMeta struct {
	Created        string  `json:"created_time"`
	CustomMetadata *string `json:"custom_metadata"` // there is none
	Deleted        string  `json:"deletion_time"`   // "": it is not
	Destroyed      bool    `json:"destroyed"`       // never
	Version        int     `json:"version"`
}

func metaOf(nk api.NamedKey) versionMeta {
	m := versionMeta{Created: stamp(nk.Created), Version: nk.Version}
	if nk.Deleted != nil {
		m.Deleted = stamp(*nk.Deleted)
	}
	return m
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// get gives a version away, in the clear.
func (c *call) get() error {
	nk, err := c.h.cfg.Keys.NamedKey(c.ctx, c.behind.Database, c.id, c.version)
	defer clear(nk.Plaintext)
	if errors.Is(err, api.ErrDeleted) {
		return c.deleted(err)
	}
	if err != nil {
		return err
	}
	c.record.Version = nk.Version
	c.out.WriteString(`{"data":`)
	if err := writeValue(c.out, c.behind, nk); err != nil {
		c.h.cfg.Logger.Error("a value is not given away", "request_id", c.record.RequestID, "mount", c.mount, "error", err)
		return badRequest("%v", err)
	}
	c.out.WriteString(`,"metadata":`)
	c.out.Write(marshal(metaOf(nk)))
	c.out.WriteByte('}')
	return nil
}

// deleted is how Vault says that a version is not given away any more. Of a version that
// is not the newest no more is known than that.
func (c *call) deleted(err error) error {
	nk, described := c.h.cfg.Keys.DescribeNamedKey(c.ctx, c.behind.Database, c.id)
	if described != nil {
		return described
	}
	if nk.Deleted == nil || c.version != 0 && c.version != nk.Version {
		return err
	}
	c.record.Version = nk.Version
	return &refusal{status: http.StatusNotFound, code: api.CodeNotFound, data: marshal(struct {
		Data     *string     `json:"data"`
		Metadata versionMeta `json:"metadata"`
	}{nil, metaOf(nk)})}
}

// put makes the first or the next version.
func (c *call) put() error {
	if err := api.CheckNamedKeyID(c.id); err != nil {
		return err
	}
	put, err := parsePut(c.in.Bytes(), c.behind)
	defer clear(put.Plaintext)
	if err != nil {
		return err
	}
	nk, err := c.h.cfg.Keys.PutNamedKey(c.ctx, c.behind.Database, c.id, put)
	return c.made(nk, err)
}

// rotate has an HSM make the next version.
func (c *call) rotate() error {
	nk, err := c.h.cfg.Keys.RotateNamedKey(c.ctx, c.behind.Database, c.id)
	return c.made(nk, err)
}

func (c *call) made(nk api.NamedKey, err error) error {
	if errors.Is(err, api.ErrNotFound) { // whoever writes has to learn what is missing
		return refuse(http.StatusNotFound, api.CodeNotFound, api.AsError(err).Message)
	}
	if err != nil {
		return err
	}
	c.record.Version = nk.Version
	c.out.Write(marshal(metaOf(nk)))
	return nil
}

// delete marks the newest version. As in Vault, what is not there is deleted already.
func (c *call) delete() error {
	if c.behind.Format == api.FormatMariaDB {
		return badRequest("mount %s keeps every version: MariaDB may ask for any of them as long as its data live", c.mount)
	}
	if err := c.h.cfg.Keys.DeleteNamedKey(c.ctx, c.behind.Database, c.id); err != nil && (!errors.Is(err, api.ErrNotFound) || errors.Is(err, api.ErrNoDatabase)) {
		return err
	}
	c.status = http.StatusNoContent
	return nil
}

// gone is asked of a mount that is not there any more.
func (c *call) gone() error {
	return api.NewError(api.CodeUnavailable, "mount "+c.mount+" was taken out of the configuration", nil)
}

// marshal is for what is always JSON and never secret.
func marshal(v any) []byte {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
	return bytes.TrimSpace(out.Bytes())
}
