package vaultkv

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/kms/api"
)

// operation is something that a client can ask of a mount.
type operation struct {
	name    string   // for the audit log, where an action allows several things
	actions []string // a policy has to allow one of them on the mount's database
	act     func(*call) error
}

// Every client asks what a mount is, so that is for everybody who may do anything with
// it.
func anyAction() []string {
	return []string{auth.ActionNamedGet, auth.ActionNamedPut, auth.ActionNamedList, auth.ActionNamedDelete}
}

// unrouted is the action of a request that asks for nothing there is.
const unrouted = "vault"

// request is what a client asks.
type request struct {
	operation
	mount   string
	behind  Mount
	id      string // of the data key; for a list, the folder
	version int    // 0: the newest
}

// mounts are what a handler serves. They are never written to.
type mounts struct {
	shown map[string]Mount
	gone  map[string]Mount // that were shown before, see SetMounts
}

// has says whether there is a mount of that name, or one within it.
func (m *mounts) has(name string) bool {
	for other := range m.shown {
		if other == name || strings.HasPrefix(other, name+"/") {
			return true
		}
	}
	return false
}

// route finds out what is asked. What is asked of a mount that is gone has no answer.
func (m *mounts) route(r *http.Request) (request, *refusal) {
	q, refused := route(m.shown, r)
	if q.mount != "" || len(m.gone) == 0 {
		return q, refused
	}
	former, wrong := route(m.gone, r)
	if former.mount == "" {
		return q, refused
	}
	former.act = (*call).gone
	return former, wrong
}

// route finds out what is asked. The path is split at the first slash after a mount, and
// not looked at further: a data key may be called anything.
func route(mounts map[string]Mount, r *http.Request) (request, *refusal) {
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/") // decoded once, by net/url
	if !ok {
		return request{}, noRoute(r.URL.Path)
	}
	namespace := strings.Trim(r.Header.Get("X-Vault-Namespace"), "/")
	if namespace != "" {
		namespace += "/"
	}
	if name, ok := strings.CutPrefix(path, "sys/mounts/"); ok {
		return routeMount(mounts, r.Method, namespace+name, path)
	}
	name, rest, ok := findMount(mounts, namespace+path)
	if !ok {
		return request{}, noRoute(path)
	}
	q := request{mount: name, behind: mounts[name]}
	kind, id, deeper := strings.Cut(rest, "/")
	q.id = id
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return q, badRequest("what follows the question mark cannot be read")
	}
	var refused *refusal
	switch {
	case kind == "data" && deeper:
		q.operation, refused = onData(r.Method)
	case kind == "metadata":
		q.operation, refused = onMetadata(r.Method, query)
	case kind == "rotate" && deeper:
		q.operation, refused = byMethod(r.Method, map[string]operation{
			http.MethodPost: rotation(), http.MethodPut: rotation(),
		})
	case rest == "config":
		q.operation, refused = byMethod(r.Method, map[string]operation{http.MethodGet: {"config", anyAction(), (*call).config}})
	default:
		return request{}, noRoute(path)
	}
	if v := query.Get("version"); v != "" && refused == nil {
		if q.version, refused = number("version", v); refused != nil {
			return q, refused
		}
	}
	return q, refused
}

// findMount returns the mount that the path begins with: there is at most one, since none
// lies within another.
func findMount(mounts map[string]Mount, path string) (name, rest string, ok bool) {
	for i := range min(len(path), maxMountName+1) {
		if path[i] != '/' {
			continue
		}
		if _, ok := mounts[path[:i]]; ok {
			return path[:i], path[i+1:], true
		}
	}
	return "", "", false
}

// maxMountName is the longest name that the configuration lets through, in bytes.
const maxMountName = 128

// routeMount is about a mount as such: name may have /tune behind it.
func routeMount(mounts map[string]Mount, method, name, path string) (request, *refusal) {
	op := operation{"mount", anyAction(), (*call).showMount}
	name = strings.TrimSuffix(name, "/")
	if mount, ok := strings.CutSuffix(name, "/tune"); ok {
		name, op = strings.TrimSuffix(mount, "/"), operation{"tune", anyAction(), (*call).tune}
	}
	m, ok := mounts[name]
	if !ok {
		return request{}, noRoute(path)
	}
	op, refused := byMethod(method, map[string]operation{http.MethodGet: op})
	return request{operation: op, mount: name, behind: m}, refused
}

func onData(method string) (operation, *refusal) {
	put := operation{"", []string{auth.ActionNamedPut}, (*call).put}
	return byMethod(method, map[string]operation{
		http.MethodGet:    {"", []string{auth.ActionNamedGet}, (*call).get},
		http.MethodPost:   put,
		http.MethodPut:    put,
		http.MethodDelete: {"", []string{auth.ActionNamedDelete}, (*call).delete},
	})
}

func onMetadata(method string, query url.Values) (operation, *refusal) {
	list := operation{"list", []string{auth.ActionNamedList}, (*call).list}
	if wanted, err := strconv.ParseBool(query.Get("list")); method == "LIST" || method == http.MethodGet && err == nil && wanted {
		return list, nil
	}
	return byMethod(method, map[string]operation{
		http.MethodGet: {"describe", []string{auth.ActionNamedList}, (*call).metadata},
	})
}

func rotation() operation {
	return operation{"rotate", []string{auth.ActionNamedPut}, (*call).rotate}
}

func byMethod(method string, ops map[string]operation) (operation, *refusal) {
	if op, ok := ops[method]; ok {
		return op, nil
	}
	return operation{}, refuse(http.StatusMethodNotAllowed, api.CodeBadRequest, "unsupported operation")
}

func noRoute(path string) *refusal {
	return refuse(http.StatusNotFound, api.CodeNotFound, fmt.Sprintf("no handler for route %q. route entry not found.", clip(path)))
}

// number reads a number that is not negative.
func number(what, text string) (int, *refusal) {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, badRequest("%s wants a whole number, not %q", what, clip(text))
	}
	return int(n), nil
}

// clip shortens foreign text that goes into a message.
func clip(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}
