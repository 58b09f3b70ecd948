package chaos_test

import (
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/kms/api"
)

// at is a moment of a story, in seconds from its beginning.
func at(seconds float64) time.Time {
	return time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC).Add(time.Duration(seconds * float64(time.Second)))
}

// sent is a request that began and ended then, with 10 seconds of time.
func sent(op chaos.Op, key string, start, end float64) chaos.Request {
	return chaos.Request{Op: op, Key: key, Start: at(start), End: at(end), Deadline: at(start + 10)}
}

func with(r chaos.Request, change func(*chaos.Request)) chaos.Request {
	change(&r)
	return r
}

func refused(r chaos.Request, code api.Code) chaos.Request {
	r.Code, r.Message = code, "so"
	return r
}

func hurried(r chaos.Request) chaos.Request {
	r.Hurried = true
	return r
}

func made(r chaos.Request, version int, copies ...string) chaos.Request {
	r.Version, r.Copies, r.Least = version, copies, 2
	return r
}

// story is a good run: a key is made, used, rotated and used again; another one is
// disabled, enabled and destroyed.
func story() []chaos.Request {
	wrapped := func(op chaos.Op, plain, envelope string) func(*chaos.Request) {
		return func(r *chaos.Request) { r.Op, r.Plain, r.Envelope = op, plain, envelope }
	}
	return []chaos.Request{
		made(sent(chaos.Create, "shop", 0, 1), 1, "a", "b"),
		with(sent("", "shop", 1, 2), wrapped(chaos.Wrap, "p1", "e1")),
		with(sent("", "shop", 2, 3), wrapped(chaos.Unwrap, "p1", "e1")),
		made(sent(chaos.Rotate, "shop", 3, 4), 2, "a", "b", "c"),
		with(sent("", "shop", 4, 5), func(r *chaos.Request) { r.Op, r.From, r.Envelope = chaos.Rewrap, "e1", "e2" }),
		with(sent("", "shop", 5, 6), wrapped(chaos.DataKey, "p3", "e3")),
		with(sent(chaos.VerifySignature, "shop", 6, 7), func(r *chaos.Request) { r.Valid = true }),

		made(sent(chaos.Create, "gone", 10, 11), 1, "a", "b"),
		with(sent("", "gone", 11, 12), wrapped(chaos.Wrap, "p4", "e4")),
		sent(chaos.Disable, "gone", 12, 13),
		refused(with(sent("", "gone", 13, 14), wrapped(chaos.Unwrap, "", "e4")), api.CodeState),
		sent(chaos.Enable, "gone", 14, 15),
		with(sent("", "gone", 15, 16), wrapped(chaos.Unwrap, "p4", "e4")),
		sent(chaos.Destroy, "gone", 16, 17),
		refused(with(sent("", "gone", 17, 18), wrapped(chaos.Unwrap, "", "e4")), api.CodeState),
		refused(sent(chaos.Create, "never", 18, 19), api.CodeInsufficientCopies),
		refused(with(sent("", "never", 19, 20), wrapped(chaos.Wrap, "p5", "")), api.CodeNotFound),

		with(sent("", "shop", 90, 91), wrapped(chaos.Unwrap, "p1", "e1")),
		with(sent("", "shop", 91, 92), wrapped(chaos.Unwrap, "p1", "e2")),
		with(sent("", "shop", 92, 93), wrapped(chaos.Unwrap, "p3", "e3")),
	}
}

// ending is how that run ends.
func ending() chaos.Final {
	both := func() map[string]string { return map[string]string{"id1": "c1", "id2": "c2"} }
	bytes := func() map[string]string { return map[string]string{"id1": "b1", "id2": "b2"} }
	return chaos.Final{
		Living: both(),
		Gone:   map[string]bool{"id4": true},
		Tokens: map[string]map[string]string{"a": both(), "b": both(), "c": both()},
		Bytes:  map[string]map[string]string{"a": bytes(), "b": bytes(), "c": bytes()},
		States: map[string]api.State{"shop": api.StateEnabled, "gone": api.StateDestroyed},
	}
}

func TestAGoodRunHasNoViolations(t *testing.T) {
	for _, v := range chaos.Check(story(), ending()) {
		t.Error(v)
	}
}

func TestEveryBrokenPromiseOfARequestIsFound(t *testing.T) {
	unwrap := func(key, envelope, plain string, start float64) chaos.Request {
		return with(sent(chaos.Unwrap, key, start, start+0.5), func(r *chaos.Request) { r.Envelope, r.Plain = envelope, plain })
	}
	tests := []struct {
		name  string
		extra chaos.Request
		want  chaos.Rule // "": none
	}{
		{"an answer 51 ms after its deadline", sent(chaos.Random, "", 30, 40.051), chaos.Late},
		{"an answer 49 ms after its deadline", sent(chaos.Random, "", 30, 40.049), ""},
		{"an answer 40 ms after the deadline was noticed", with(sent(chaos.Random, "", 30, 40.2), func(r *chaos.Request) { r.Expired = at(40.16) }), ""},
		{"an answer 60 ms after the deadline was noticed", with(sent(chaos.Random, "", 30, 40.2), func(r *chaos.Request) { r.Expired = at(40.14) }), chaos.Late},
		{"a key operation long after its deadline", refused(sent(chaos.Rotate, "shop", 30, 41), api.CodeDeadline), chaos.Late},
		{"a wrap that is unavailable", refused(sent(chaos.Wrap, "shop", 30, 31), api.CodeUnavailable), chaos.Failed},
		{"a wrap that meets its deadline", refused(sent(chaos.Wrap, "shop", 30, 40), api.CodeDeadline), chaos.Failed},
		{"a wrap in a hurry that meets its deadline", hurried(refused(sent(chaos.Wrap, "shop", 30, 40), api.CodeDeadline)), ""},
		{"a wrap in a hurry that is answered too late", hurried(sent(chaos.Sign, "shop", 30, 40.051)), chaos.Late},
		{"a wrap in a hurry that finds no key", hurried(refused(sent(chaos.Wrap, "shop", 30, 31), api.CodeNotFound)), chaos.NotFound},
		{"a rotation that is unavailable", refused(sent(chaos.Rotate, "shop", 30, 31), api.CodeUnavailable), ""},
		{"a rotation below min_copies", refused(sent(chaos.Rotate, "shop", 30, 31), api.CodeInsufficientCopies), ""},
		{"a rotation that fails for no reason", refused(sent(chaos.Rotate, "shop", 30, 31), api.CodeInternal), chaos.Refused},
		{"a key in use that is said to be disabled", refused(sent(chaos.Wrap, "shop", 30, 31), api.CodeState), chaos.Failed},
		{"a key that is there and is said not to be", refused(sent(chaos.Wrap, "shop", 30, 31), api.CodeNotFound), chaos.NotFound},
		{"a key that was destroyed and is said not to be there", refused(sent(chaos.Wrap, "gone", 30, 31), api.CodeNotFound), chaos.NotFound},
		{"a key that is not there yet for certain", refused(sent(chaos.Wrap, "shop", 0.5, 0.9), api.CodeNotFound), ""},
		{"a new key that is said to exist", refused(sent(chaos.Create, "new", 30, 31), api.CodeExists), chaos.Refused},
		{"a key made again", refused(sent(chaos.Create, "shop", 30, 31), api.CodeExists), ""},
		{"another plaintext", unwrap("shop", "e1", "p3", 30), chaos.OtherBytes},
		{"another plaintext after a rewrap", unwrap("shop", "e2", "p3", 30), chaos.OtherBytes},
		{"an envelope that nobody was given", unwrap("shop", "e9", "p1", 30), chaos.OtherBytes},
		{"a good signature refused", sent(chaos.VerifySignature, "shop", 30, 31), chaos.BadSig},
		{"an unwrap after the destruction", unwrap("gone", "e4", "p4", 30), chaos.Resurrected},
		{"a rotation after the destruction", made(sent(chaos.Rotate, "gone", 30, 31), 2, "a", "b"), chaos.Resurrected},
		{"an unwrap that began before the destruction ended", unwrap("gone", "e4", "p4", 16.9), ""},
		{"an unwrap while the key is disabled", unwrap("gone", "e4", "p4", 13.2), chaos.Served},
		{"an unwrap while the key is being disabled", unwrap("gone", "e4", "p4", 12.4), ""},
		{"an unwrap while the key is being enabled", unwrap("gone", "e4", "p4", 14.1), ""},
		{"a number that was given before", made(sent(chaos.Rotate, "shop", 30, 31), 2, "a", "b"), chaos.Reused},
		{"a number below one that was given", made(sent(chaos.Rotate, "shop", 30, 31), 0, "a", "b"), chaos.Reused},
		{"a version on one member", made(sent(chaos.Rotate, "shop", 30, 31), 3, "a"), chaos.TooFew},
		{"an envelope that is never opened", with(sent(chaos.Wrap, "shop", 30, 31), func(r *chaos.Request) { r.Plain, r.Envelope = "p7", "e7" }), chaos.Lost},
		{"a key that is not there at the end", made(sent(chaos.Create, "other", 30, 31), 1, "a", "b"), chaos.Lost},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { finds(t, append(story(), tt.extra), ending(), tt.want) })
	}
	t.Run("an envelope that does not open at the end", func(t *testing.T) {
		requests := append(story(), refused(unwrap("shop", "e3", "", 95), api.CodeCorrupt))
		finds(t, requests, ending(), chaos.Lost)
	})
}

func TestEveryBrokenPromiseAtTheEndIsFound(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*chaos.Final)
		want  chaos.Rule // "": none
	}{
		{"an object that is nobody's business", func(f *chaos.Final) { f.Tokens["b"]["x"], f.Known = "c9", map[string]bool{"x": true} }, ""},
		{"an object that the catalog does not know", func(f *chaos.Final) { f.Tokens["b"]["x"] = "c9" }, chaos.Stray},
		{"a destroyed key on a token", func(f *chaos.Final) { f.Tokens["b"]["id4"] = "c4" }, chaos.Resurrected},
		{"a token without a key", func(f *chaos.Final) { delete(f.Tokens["c"], "id2") }, chaos.Missing},
		{"another check value", func(f *chaos.Final) { f.Tokens["c"]["id2"] = "c9" }, chaos.Different},
		{"other bytes under one identity", func(f *chaos.Final) { f.Bytes["c"]["id2"] = "b9" }, chaos.Different},
		{"bytes that the catalog does not know", func(f *chaos.Final) { f.Bytes["b"]["x"] = "b9" }, chaos.Stray},
		{"the bytes of a destroyed key", func(f *chaos.Final) { f.Bytes["b"]["id4"] = "b4" }, chaos.Resurrected},
		{"a token that does not keep the bytes of a key", func(f *chaos.Final) { delete(f.Bytes["c"], "id2") }, chaos.Missing},
		{"a key that kmsd itself finds wrong", func(f *chaos.Final) { f.Unverified = map[string]string{"shop": "c: missing"} }, chaos.Different},
		{"a destroyed key that is enabled", func(f *chaos.Final) { f.States["gone"] = api.StateEnabled }, chaos.Resurrected},
		{"a key that is away", func(f *chaos.Final) { delete(f.States, "shop") }, chaos.Lost},
		{"an operation that is not finished", func(f *chaos.Final) { f.Open = []string{"destroying id4 on b"} }, chaos.Unfinished},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			final := ending()
			tt.spoil(&final)
			finds(t, story(), final, tt.want)
		})
	}
}

func TestAnAnswerIsNotLateWhileNobodyLooks(t *testing.T) {
	late := append(story(), sent(chaos.Random, "", 30, 40.1))
	for _, tt := range []struct {
		name     string
		from, to float64
		want     chaos.Rule
	}{
		{"until the answer", 39, 40.1, ""},
		{"for most of it", 40.01, 40.09, ""},
		{"long before", 20, 39.9, chaos.Late},
		{"for too little", 40.08, 40.1, chaos.Late},
	} {
		t.Run(tt.name, func(t *testing.T) {
			final := ending()
			final.Stalls = []chaos.Stall{{From: at(tt.from), To: at(tt.to)}}
			finds(t, late, final, tt.want)
		})
	}
	final := ending() // told by two threads, it is the same 30 ms
	final.Stalls = []chaos.Stall{{From: at(40.05), To: at(40.08)}, {From: at(40.06), To: at(40.08)}, {From: at(40.05), To: at(40.07)}}
	finds(t, late, final, chaos.Late)
}

// finds checks that there is a breach of that promise, or none at all.
func finds(t *testing.T, requests []chaos.Request, final chaos.Final, want chaos.Rule) {
	t.Helper()
	found := false
	for _, v := range chaos.Check(requests, final) {
		t.Log(v)
		found = found || v.Rule == want
		if want == "" {
			t.Errorf("there is no violation in it")
		}
	}
	if want != "" && !found {
		t.Errorf("not found: %s", want)
	}
}
