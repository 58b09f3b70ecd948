package vaultkv

import (
	"math"
	"strconv"
	"strings"

	"kmsd/kms/api"
)

// secretMeta is what Vault says about a secret.
type secretMeta struct {
	CASRequired   bool                   `json:"cas_required"`
	Created       string                 `json:"created_time"`
	Current       int                    `json:"current_version"`
	Custom        *string                `json:"custom_metadata"`
	DeleteAfter   string                 `json:"delete_version_after"`
	MaxVersions   int                    `json:"max_versions"`
	OldestVersion int                    `json:"oldest_version"`
	Updated       string                 `json:"updated_time"`
	Versions      map[string]versionInfo `json:"versions"`
}

type versionInfo struct {
	Created   string `json:"created_time"`
	Deleted   string `json:"deletion_time"`
	Destroyed bool   `json:"destroyed"`
}

// metadata describes a data key. Of its versions it names the newest: that is what
// is remembered of a key without looking at the others.
func (c *call) metadata() error {
	nk, err := c.h.cfg.Keys.DescribeNamedKey(c.ctx, c.behind.Database, c.id)
	if err != nil {
		return err
	}
	newest := metaOf(nk)
	c.out.Write(marshal(secretMeta{
		Created: stamp(nk.First), Updated: newest.Created, Current: nk.Version, OldestVersion: 1, DeleteAfter: noTime,
		// Percona Server for MongoDB takes 0 for 10, and makes no more versions than these.
		MaxVersions: math.MaxInt32,
		Versions:    map[string]versionInfo{strconv.Itoa(nk.Version): {Created: newest.Created, Deleted: newest.Deleted}},
	}))
	return nil
}

// noTime is how long it takes until versions are deleted: they are not.
const noTime = "0s"

// list shows what is in a folder. What lies deeper shows as the folder next on the way to
// it, with a slash.
func (c *call) list() error {
	folder := c.id
	if folder != "" && !strings.HasSuffix(folder, "/") {
		folder += "/"
	}
	var names []string
	opts := api.ListOptions{Prefix: folder, Limit: api.MaxPage}
	for {
		page, err := c.h.cfg.Keys.NamedKeys(c.ctx, c.behind.Database, opts)
		if err != nil {
			return err
		}
		for _, nk := range page.Keys {
			names = appendName(names, idOf(nk)[len(folder):])
		}
		if opts.After = page.Next; page.Next == "" {
			break
		}
	}
	if len(names) == 0 {
		return api.NewError(api.CodeNotFound, "there is nothing", nil)
	}
	c.out.Write(marshal(map[string][]string{"keys": names}))
	return nil
}

// appendName adds the first step of the way to a data key, unless it is there already:
// keys come in the order of their IDs, so that those of a folder follow each other.
func appendName(names []string, rest string) []string {
	if step, _, deeper := strings.Cut(rest, "/"); deeper {
		rest = step + "/"
	}
	if rest == "" || len(names) > 0 && names[len(names)-1] == rest {
		return names
	}
	return append(names, rest)
}

func idOf(nk api.NamedKey) string {
	if nk.Raw != nil {
		return string(nk.Raw)
	}
	return nk.ID
}

// config says that every version is kept.
func (c *call) config() error {
	c.out.Write(marshal(struct {
		CASRequired bool   `json:"cas_required"`
		DeleteAfter string `json:"delete_version_after"`
		MaxVersions int    `json:"max_versions"`
	}{DeleteAfter: noTime}))
	return nil
}

// mountOptions says which version of the store it is. MariaDB looks for it at the top of
// the answer, pg_tde under data.
type mountOptions struct {
	Version string `json:"version"`
}

// tune and showMount come from the configuration: they are answered also when the
// database is still to be made.
func (c *call) tune() error {
	c.sys = true
	c.out.Write(marshal(struct {
		DefaultLease int          `json:"default_lease_ttl"`
		Description  string       `json:"description"`
		ForceNoCache bool         `json:"force_no_cache"`
		MaxLease     int          `json:"max_lease_ttl"`
		Options      mountOptions `json:"options"`
	}{Options: mountOptions{"2"}}))
	return nil
}

func (c *call) showMount() error {
	c.sys = true
	type leases struct {
		Default      int  `json:"default_lease_ttl"`
		ForceNoCache bool `json:"force_no_cache"`
		Max          int  `json:"max_lease_ttl"`
	}
	c.out.Write(marshal(struct {
		Config      leases       `json:"config"`
		Description string       `json:"description"`
		Local       bool         `json:"local"`
		Options     mountOptions `json:"options"`
		SealWrap    bool         `json:"seal_wrap"`
		Type        string       `json:"type"`
	}{Options: mountOptions{"2"}, Type: "kv"}))
	return nil
}
