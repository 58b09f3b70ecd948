package httpapi

import (
	"context"
	"math"
	"net/http"
	"reflect"

	"kmsd/kms/api"
)

// Limits of bodies, in bytes. Base64 takes four bytes for three.
const (
	smallBody = 64 << 10 // requests without secrets of the caller's
	signBody  = 64 << 10
	macBody   = 128 << 10 // a message of 64 KiB
	putBody   = 128 << 10 // a data key of 64 KiB
	cryptBody = 8 << 20   // a batch of 1000 items of 6 KB each, or 80 of the largest
)

// route is a row of the table. Only on makes one, and only the door serves it.
type route struct {
	method  string
	pattern string // of segments; {name} is a key, {db} a database, {key} a data key of it
	action  string // what a policy has to allow
	summary string // one sentence for the OpenAPI document

	operation string // what it does, for the audit log, where the action allows several things
	query     []param
	subject   string // the query parameter that stands for the key's name in policies
	maxBody   int64  // bytes

	stream bool // answers with server-sent events
	// namesIn tells the call what the decoded body names; nil when that is in the path.
	namesIn func(c *call, req any) error
	// foundIn is the same for an answer that reads something, where nothing else tells
	// what it is about: it is released to those only who may read that.
	foundIn func(c *call, answer any) error

	optional bool     // the body may be empty
	patience patience // how long it may take

	request, answer reflect.Type
	decode          func(body []byte) (any, error)
	act             func(ctx context.Context, c *call, req any) (any, error)
}

// patience says how long a request may take.
type patience int

const (
	hurried patience = iota // the time of every request, or less if the client says so
	patient                 // the same, or more if the client says so
	endless                 // what the client says, else as long as its connection lasts
)

// param is a query parameter.
type param struct {
	name, about string
	schema      map[string]any
}

// on completes a row with what it does. The action gets the decoded request and
// returns a value; it cannot answer by itself.
func on[Req, Ans any](rt route, act func(ctx context.Context, c *call, req Req) (Ans, error)) *route {
	rt.request, rt.answer = reflect.TypeFor[Req](), reflect.TypeFor[Ans]()
	if rt.request == reflect.TypeFor[none]() {
		rt.optional = true
	}
	rt.decode = func(body []byte) (any, error) { return decodeJSON[Req](body, rt.optional) }
	rt.act = func(ctx context.Context, c *call, req any) (any, error) { return act(ctx, c, req.(Req)) }
	return &rt
}

// about is a row for something without a key.
func about(method, pattern, action, summary string) route {
	return route{method: method, pattern: pattern, action: action, summary: summary, maxBody: smallBody}
}

// aboutKey is a row for /v1/keys/{name} and below.
func aboutKey(method, below, action, summary string) route {
	return about(method, "/v1/keys/{name}"+below, action, summary)
}

// aboutDatabase is a row for /v1/databases/{db} and below.
func aboutDatabase(method, below, action, summary string) route {
	return about(method, "/v1/databases/{db}"+below, action, summary)
}

// aboutNamed is a row for a data key of a database and below.
func aboutNamed(operation, method, below, action, summary string) route {
	rt := aboutDatabase(method, "/keys/{key}"+below, action, summary)
	rt.operation = operation
	return rt
}

func (rt route) with(query ...param) route { rt.query = query; return rt }
func (rt route) upTo(body int64) route     { rt.maxBody = body; return rt }
func (rt route) bodyOptional() route       { rt.optional = true; return rt }
func (rt route) takes(p patience) route    { rt.patience = p; return rt }

// administer is a row for what an operator does to a group or its members.
func administer(operation, method, below, summary string) route {
	rt := about(method, "/v1/groups/{group}"+below, "group-admin", summary).takes(patient)
	rt.operation = operation
	return rt
}

// routes is the table of everything that needs a principal.
func routes() []*route {
	const get, post, patch, del = http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete

	create := about(post, "/v1/keys", "create", "Make a master key with its version 1 on every active member.")
	create.namesIn = func(c *call, req any) error { return c.setKey(req.(api.CreateBody).Name) }

	list := about(get, "/v1/keys", "list", "List keys by name. A policy must allow list on the prefix; keys that the caller may not list are left out.").
		with(prefixParam, limitParam, afterParam)
	list.subject = "prefix"

	events := about(get, "/v1/events", "group-read", "Follow what happens to groups, members and keys, as server-sent events, after the last of what has happened to groups and members.").
		with(lastParam)
	events.stream = true

	return append(databaseRoutes(),
		on(create, createKey),
		on(list, listKeys),
		on(aboutKey(get, "", "read", "Show a key and its versions."), named(Service.Key)),
		on(aboutKey(patch, "", "update", "Change what a key's owner may change."), updateKey),
		on(aboutKey(del, "", "destroy", "Schedule the destruction of every version, or of one, after the window; 0s destroys at once.").with(windowParam, versionParam), destroyKey),
		on(aboutKey(post, "/restore", "restore", "Take a scheduled destruction back, of every version or of one.").with(versionParam), change(api.ActionRestore, Service.Restore)),
		on(aboutKey(post, "/rotate", "rotate", "Make the next version. Old versions still unwrap.").bodyOptional(), rotateKey),
		on(aboutKey(post, "/disable", "disable", "Refuse every use of a key, or of one version, until it is enabled.").with(versionParam), change(api.ActionDisable, Service.Disable)),
		on(aboutKey(post, "/enable", "enable", "Let a disabled key, or one version, be used again.").with(versionParam), change(api.ActionEnable, Service.Enable)),
		on(aboutKey(post, "/verify", "verify", "Ask every member for its copy of every version."), named(Service.Verify)),

		on(aboutKey(post, "/wrap", "wrap", "Encrypt 1 byte to 64 KiB under the newest version, or up to 1000 items.").upTo(cryptBody), crypt(api.OpWrap)),
		on(aboutKey(post, "/unwrap", "unwrap", "Decrypt an envelope, or up to 1000 items.").upTo(cryptBody), crypt(api.OpUnwrap)),
		on(aboutKey(post, "/rewrap", "rewrap", "Move an envelope to the newest version, or up to 1000 items.").upTo(cryptBody), crypt(api.OpRewrap)),
		on(aboutKey(post, "/datakey", "datakey", "Make random bytes in an HSM and return them in the clear and wrapped, or up to 1000 items.").upTo(cryptBody), dataKeys),

		on(aboutKey(post, "/sign", "sign", "Sign a digest with an RSA or EC key.").upTo(signBody), sign),
		on(aboutKey(post, "/verify-signature", "verify-signature", "Say whether a signature matches a digest.").upTo(signBody), verifySignature),
		on(aboutKey(post, "/decrypt", "decrypt", "Undo RSA-OAEP.").upTo(signBody), decrypt),
		on(aboutKey(post, "/mac", "mac", "Compute an HMAC of a message of up to 64 KiB.").upTo(macBody), mac),

		on(about(get, "/v1/random", "random", "Return random bytes from an HSM.").with(bytesParam, groupParam), random),
		on(about(get, "/v1/groups", "group-read", "Show every group and its members."), listGroups),
		on(about(get, "/v1/groups/{group}", "group-read", "Show a group and its members."), showGroup),

		on(administer("add", post, "/members", "Take a member into a group; the answer comes when it is in step."), addMember),
		on(administer("remove", del, "/members/{member}", "Drain a member and forget it; its token keeps its keys.").with(forceParam), removeMember),
		on(administer("role", patch, "/members/{member}", "Make a member active or standby, and end a drain.").with(forceParam), setRole),
		on(administer("recover", post, "/members/{member}/recover", "Try now to bring a lost member back; the answer comes when the attempt has ended."), recoverMember),
		on(administer("drain", post, "/members/{member}/drain", "Let a member finish what it has and give it nothing new.").with(forceParam), drainMember),
		on(administer("replace", post, "/members/{member}/replace", "Accept another token under the name of a member, and with a body another HSM.").bodyOptional(), replaceMember),
		on(administer("sync", post, "/sync", "Compare every member in step with the catalog and mend what differs.").bodyOptional().takes(endless), syncGroup),
		on(administer("reinitialize", post, "/reinitialize", "Try now to bring back every member that is away, also those given up."), reinitializeGroup),
		on(administer("check", post, "/check", "Ask every member whether it still fits the group, with a canary key, and change nothing."), checkGroup),

		on(about(get, "/v1/log", "group-read", "Show the last that has happened to groups and members, oldest first.").with(lastParam), showLog),
		on(events, follow),
	)
}

// publicRoute is a row that needs no principal: it tells nothing about keys.
type publicRoute struct {
	pattern, summary string
	answers          reflect.Type // nil: an OpenAPI document
	answer           func(h *Handler) (status int, body any)
}

// liveness is the answer of /livez.
type liveness struct {
	Live bool `json:"live"`
}

func publicRoutes() []publicRoute {
	return []publicRoute{
		{"/livez", "Say that the process answers.", reflect.TypeFor[liveness](), live},
		{"/readyz", "Say whether a wrap and unwrap succeeded on a member in the last few seconds: 200, else 503.", reflect.TypeFor[api.Readiness](), ready},
		{"/metrics", "Show numbers about groups, members and requests to Prometheus.", expositionType, metrics},
		{"/openapi.json", "Describe this API.", nil, openapi},
	}
}

var (
	prefixParam  = param{"prefix", "Only names that start with this.", text()}
	afterParam   = param{"after", "The next of the page before.", text()}
	limitParam   = param{"limit", "How many on a page; 100 if not given.", number(1, api.MaxPage)}
	versionParam = param{"version", "Which version; all, or for reading the newest, if not given.", number(1, maxVersion)}
	windowParam  = param{"window", "How long the key can be restored, a Go duration; 720h if not given.", text()}
	bytesParam   = param{"bytes", "How many; 32 if not given.", number(1, api.MaxRandom)}
	lastParam    = param{"last", "How many of the events that are remembered; if not given, all of them in the log and none before a stream.", number(1, api.MaxLog)}
	forceParam   = param{"force", "Do it although nobody else serves, or a key loses its last copy.", map[string]any{"type": "boolean"}}
	groupParam   = param{"group", "Whose random source; the default group if not given.", text()}
)

// maxVersion is more than the number of any version.
const maxVersion = math.MaxInt32

func text() map[string]any { return map[string]any{"type": "string"} }

func number(least, most int) map[string]any {
	return map[string]any{"type": "integer", "minimum": least, "maximum": most}
}
