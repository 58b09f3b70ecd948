package chaos_test

import (
	"net/http"
	"slices"
	"testing"

	"kmsd/e2e/chaos"
	"kmsd/kms/api"
)

// named is a request about version 1 of a data key, or another one, and what it is.
func named(op chaos.Op, start float64, version int, plain string) chaos.Request {
	return with(sent(op, "shop/1", start, start+0.5), func(r *chaos.Request) { r.Version, r.Plain = version, plain })
}

func newest(r chaos.Request) chaos.Request {
	r.Newest = true
	return r
}

// answered is how the listener for databases has answered.
func answered(r chaos.Request, status int) chaos.Request {
	r.Answer(status, "so")
	return r
}

// namedStory is a good run with a data key of three versions, of which nobody was told of
// the last.
func namedStory() []chaos.Request {
	return slices.Concat(story(), []chaos.Request{
		answered(named(chaos.GetNamed, 20, 0, ""), http.StatusNotFound),
		named(chaos.PutNamed, 21, 1, "n1"),
		answered(newest(named(chaos.GetNamed, 22, 1, "n1")), http.StatusOK),
		named(chaos.RotateNamed, 23, 2, ""),
		newest(named(chaos.GetNamed, 24, 2, "n2")),
		answered(named(chaos.PutNamed, 25, 0, "n3"), 0),
		sent(chaos.Rekey, "shop-db", 26, 27),
		refused(sent(chaos.Rekey, "shop-db", 27, 28), api.CodeState),
	})
}

func namedEnding() chaos.Final {
	final := ending()
	final.Master = 2
	final.Named = map[string]map[int]chaos.Stored{"shop/1": {1: {Plain: "n1", Master: 2}, 2: {Plain: "n2", Master: 2}, 3: {Plain: "n3", Master: 3}}}
	return final
}

func TestEveryBrokenPromiseAboutADataKeyIsFound(t *testing.T) {
	for _, v := range chaos.Check(namedStory(), namedEnding()) {
		t.Errorf("in a good run: %v", v)
	}
	for _, tt := range []struct {
		name  string
		extra chaos.Request
		want  chaos.Rule // "": none
	}{
		{"a read that is broken off", answered(named(chaos.GetNamed, 30, 0, ""), 0), ""},
		{"a read that is told of a failure", answered(named(chaos.GetNamed, 30, 0, ""), http.StatusServiceUnavailable), chaos.Answered},
		{"a read that is told to wait", answered(named(chaos.GetNamed, 30, 0, ""), http.StatusTooManyRequests), chaos.Answered},
		{"a read that finds nothing", answered(named(chaos.GetNamed, 30, 0, ""), http.StatusNotFound), chaos.NotFound},
		{"a read that is refused", answered(named(chaos.GetNamed, 30, 0, ""), http.StatusForbidden), chaos.Failed},
		{"a read over kmsd's own API that fails", refused(named(chaos.GetNamed, 30, 0, ""), api.CodeUnavailable), chaos.Failed},
		{"a read of other bytes", named(chaos.GetNamed, 30, 1, "n2"), chaos.OtherBytes},
		{"a read of an older version", named(chaos.GetNamed, 30, 1, "n1"), ""},
		{"a read of the newest version that is not the newest", newest(named(chaos.GetNamed, 30, 1, "n1")), chaos.Stale},
		{"a read of the newest version while it is made", newest(named(chaos.GetNamed, 23.2, 1, "n1")), ""},
		{"a number that was given before", named(chaos.PutNamed, 30, 2, "n2"), chaos.Reused},
		{"a version that is lost", named(chaos.PutNamed, 30, 4, "n4"), chaos.Lost},
		{"a put that fails for no reason", refused(named(chaos.PutNamed, 30, 0, "n4"), api.CodeInternal), chaos.Refused},
	} {
		t.Run(tt.name, func(t *testing.T) { finds(t, append(namedStory(), tt.extra), namedEnding(), tt.want) })
	}
}

func TestEveryBrokenPromiseAboutStoredDataKeysIsFound(t *testing.T) {
	for _, tt := range []struct {
		name   string
		stored map[int]chaos.Stored
		want   chaos.Rule // "": none
	}{
		{"without the version that nobody was told of", map[int]chaos.Stored{1: {"n1", 2}, 2: {"n2", 2}}, ""},
		{"without the newest", map[int]chaos.Stored{1: {"n1", 2}}, chaos.Lost},
		{"with a gap", map[int]chaos.Stored{1: {"n1", 2}, 2: {"n2", 2}, 4: {"n3", 2}}, chaos.Gap},
		{"with other bytes", map[int]chaos.Stored{1: {"n9", 2}, 2: {"n2", 2}}, chaos.OtherBytes},
		{"with one that does not unwrap", map[int]chaos.Stored{1: {"", 2}, 2: {"n2", 2}}, chaos.OtherBytes},
		{"with one that is there twice", map[int]chaos.Stored{1: {"n1", 2}, 2: {"n2", 2}, 3: {"n2", 2}}, chaos.Doubled},
		{"with one that the rekey has missed", map[int]chaos.Stored{1: {"n1", 1}, 2: {"n2", 2}}, chaos.Behind},
	} {
		t.Run(tt.name, func(t *testing.T) {
			final := namedEnding()
			final.Named["shop/1"] = tt.stored
			finds(t, namedStory(), final, tt.want)
		})
	}
}
