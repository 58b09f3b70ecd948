package httpapi

import (
	"net/http"
	"net/url"
	"strings"
)

// tree finds the row of a path. A path is split at its slashes before it is decoded, once
// and each segment by itself; nothing is cleaned and nobody is redirected. So a segment
// can be any text, also "/", ".." and bytes that are no text, when it is
// percent-encoded: the ID of a data key is. http.ServeMux takes an encoded "/" for the end
// of a path.
type tree struct {
	literal map[string]*tree // :: segment → what follows it
	wild    *tree            // what follows a segment of any text
	name    string           // of wild, in the pattern
	serve   http.HandlerFunc // of the path that ends here; nil: there is none
}

// add puts the handler of a pattern into the tree.
func (t *tree) add(pattern string, serve http.HandlerFunc) {
	for segment := range strings.SplitSeq(strings.TrimPrefix(pattern, "/"), "/") {
		t = t.child(segment)
	}
	t.serve = serve
}

func (t *tree) child(segment string) *tree {
	if name, ok := strings.CutPrefix(segment, "{"); ok {
		t.name = strings.TrimSuffix(name, "}")
		if t.wild == nil {
			t.wild = new(tree)
		}
		return t.wild
	}
	if t.literal == nil {
		t.literal = make(map[string]*tree)
	}
	if t.literal[segment] == nil {
		t.literal[segment] = new(tree)
	}
	return t.literal[segment]
}

// find returns the handler of r's path and sets the path values of r. It is nil when
// there is none.
func (t *tree) find(r *http.Request) http.HandlerFunc {
	path, ok := strings.CutPrefix(r.URL.EscapedPath(), "/")
	if !ok {
		return nil
	}
	for escaped := range strings.SplitSeq(path, "/") {
		segment, err := url.PathUnescape(escaped)
		next := t.literal[segment]
		if next == nil && t.wild != nil {
			next = t.wild
			r.SetPathValue(t.name, segment)
		}
		// A bare "." or ".." is a step in the path for all who may be on the way.
		if err != nil || escaped == "" || escaped == "." || escaped == ".." || next == nil {
			return nil
		}
		t = next
	}
	return t.serve
}

// opaque says whether the path of u is the one that was sent. One with bytes that should
// have been percent-encoded loses the difference between "/" and "%2F".
func opaque(u *url.URL) bool { return u.RawPath == "" || u.RawPath == u.EscapedPath() }
