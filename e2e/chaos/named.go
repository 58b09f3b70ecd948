package chaos

import (
	"maps"
	"net/http"
	"slices"
	"time"

	"kmsd/kms/api"
)

// Operations on named data keys. The key of such a request is DATABASE/ID.
const (
	PutNamed    Op = "put-named"
	RotateNamed Op = "rotate-named"
	GetNamed    Op = "get-named" // Version 0 asks for the newest, and Newest is set
	Rekey       Op = "rekey"     // of the master key: Version is the one that it has made
)

const (
	Answered Rule = "a database was told of a failure instead of nothing"
	Stale    Rule = "a read returned an older version than had been acknowledged"
	Doubled  Rule = "what was put once is there twice"
	Gap      Rule = "a data key lacks a version below its newest"
	Behind   Rule = "after a rekey a data key is under an older version of its master key"
)

// Stored is a version of a named data key as it was found in the catalog.
type Stored struct {
	Plain  string // digest of what it unwraps to; "" when it does not
	Master int    // version of the master key that wraps it
}

// dataKeys is what the history says of named data keys.
type dataKeys struct {
	plain map[string]map[int]string    // :: data key → version → digest of what it is
	acked map[string]map[int]time.Time // :: data key → version → when that was first acknowledged
}

// named checks every request about named data keys, and what was found of them at the
// end. requests are in the order of their starts.
func (c *checker) named(requests []Request) {
	k := dataKeys{plain: map[string]map[int]string{}, acked: map[string]map[int]time.Time{}}
	for _, r := range requests {
		if r.Status >= http.StatusInternalServerError || r.Status == http.StatusTooManyRequests {
			c.report(Answered, "%s %s at %s: status %d", r.Op, r.Key, r.Start.Format("15:04:05.000"), r.Status)
		}
		if r.acknowledged() && r.Op.named() {
			k.note(c, r)
		}
	}
	for _, r := range requests {
		if r.Op == GetNamed && r.Newest && r.acknowledged() {
			k.fresh(c, r)
		}
	}
	k.ends(c)
}

func (o Op) named() bool { return o == PutNamed || o == RotateNamed || o == GetNamed }

// note takes down what an acknowledgement says of a version. A version that was read is
// as certain as one that was put.
func (k *dataKeys) note(c *checker, r Request) {
	if k.plain[r.Key] == nil {
		k.plain[r.Key], k.acked[r.Key] = map[int]string{}, map[int]time.Time{}
	}
	if at, ok := k.acked[r.Key][r.Version]; !ok || r.End.Before(at) {
		k.acked[r.Key][r.Version] = r.End
	}
	if r.Plain == "" { // a rotation: nobody has seen it yet
		return
	}
	if before := k.plain[r.Key][r.Version]; before != "" && before != r.Plain {
		c.report(OtherBytes, "%s %s at %s: version %d is %s, and was %s", r.Op, r.Key, r.Start.Format("15:04:05.000"), r.Version, r.Plain, before)
	}
	k.plain[r.Key][r.Version] = r.Plain
}

// fresh checks that the newest version that was read is no older than one that had been
// acknowledged before.
func (k *dataKeys) fresh(c *checker, r Request) {
	for version, at := range k.acked[r.Key] {
		if version > r.Version && at.Before(r.Start) {
			c.report(Stale, "%s at %s returned version %d, and version %d was acknowledged at %s", r.Key,
				r.Start.Format("15:04:05.000"), r.Version, version, at.Format("15:04:05.000"))
			return
		}
	}
}

// ends compares what was acknowledged with what the catalog holds.
func (k *dataKeys) ends(c *checker) {
	for _, key := range slices.Sorted(maps.Keys(k.acked)) {
		stored := c.final.Named[key]
		for _, version := range slices.Sorted(maps.Keys(k.acked[key])) {
			switch at, ok := stored[version]; {
			case !ok:
				c.report(Lost, "version %d of %s is not in the catalog", version, key)
			case at.Plain == "" || k.plain[key][version] != "" && at.Plain != k.plain[key][version]:
				c.report(OtherBytes, "version %d of %s is %q in the catalog, and was %q", version, key, at.Plain, k.plain[key][version])
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(c.final.Named)) {
		numbers := slices.Sorted(maps.Keys(c.final.Named[key]))
		seen := map[string]int{}
		for i, version := range numbers {
			at := c.final.Named[key][version]
			if version != i+1 {
				c.report(Gap, "%s has versions %v", key, numbers)
				break
			}
			if other := seen[at.Plain]; other != 0 && at.Plain != "" {
				c.report(Doubled, "versions %d and %d of %s", other, version, key)
			}
			seen[at.Plain] = version
			if at.Master < c.final.Master {
				c.report(Behind, "version %d of %s is under version %d, and %d is that of the last rekey", version, key, at.Master, c.final.Master)
			}
		}
	}
}

// codeOfStatus is what an answer of the listener for databases amounts to. No answer is
// what every database has to live with.
func codeOfStatus(status int) api.Code {
	switch status {
	case http.StatusOK, http.StatusNoContent:
		return ""
	case 0:
		return api.CodeUnavailable
	case http.StatusNotFound:
		return api.CodeNotFound
	case http.StatusForbidden:
		return api.CodeDenied
	default:
		return api.CodeBadRequest
	}
}

// Answer takes down how a database was answered; a status of 0: not at all.
func (r *Request) Answer(status int, message string) {
	r.Vault, r.Status, r.Code, r.Message = true, status, codeOfStatus(status), message
}
