package apitest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"kmsd/kms/api"
)

func putIsRead(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	made := put(t, s, "shop", "1", "secret 1")
	if made.Database != "shop" || made.ID != "1" || made.Raw != nil || made.Version != 1 || made.Newest != 1 || made.Master != 1 ||
		made.Created.IsZero() || !made.First.Equal(made.Created) || made.Deleted != nil || made.Object {
		t.Errorf("made %+v", made)
	}
	found := wantKey(t, s, "shop", "1", 0, "secret 1")
	if !sameVersion(found, made) {
		t.Errorf("found %+v, made %+v", found, made)
	}
	clear(found.Plaintext) // it is the caller's
	second := put(t, s, "shop", "1", "secret 2")
	if second.Version != 2 || second.Newest != 2 || !second.First.Equal(made.First) || second.Created.Before(made.Created) {
		t.Errorf("the second version is %+v", second)
	}
	if found := wantKey(t, s, "shop", "1", 1, "secret 1"); found.Newest != 2 || !found.Created.Equal(made.Created) {
		t.Errorf("the first version is %+v now", found)
	}
}

// sameVersion compares all that is no plaintext.
func sameVersion(a, b api.NamedKey) bool {
	return a.Database == b.Database && a.ID == b.ID && bytes.Equal(a.Raw, b.Raw) && a.Version == b.Version && a.Newest == b.Newest &&
		a.Created.Equal(b.Created) && a.First.Equal(b.First) && (a.Deleted == nil) == (b.Deleted == nil) && a.Object == b.Object && a.Master == b.Master
}

func dataKeySizes(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, n := range []int{1, 20, 32, 33, api.MaxPlaintext} {
		put(t, s, "shop", "1", strings.Repeat("s", n))
		wantKey(t, s, "shop", "1", 0, strings.Repeat("s", n))
	}
	_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: make([]byte, api.MaxPlaintext+1)})
	wants(t, err, api.ErrTooLarge, "putting more than 64 KiB")
}

func madeByHSM(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	seen := make(map[string]bool)
	for i, n := range []int{0, 1, 16, 24, 32, api.MaxDataKey} {
		id := fmt.Sprint(i)
		_, err := s.PutNamedKey(t.Context(), "shop", id, api.NamedKeyPut{Bytes: n})
		ok(t, err, fmt.Sprintf("having a data key of %d bytes made", n))
		k := read(t, s, "shop", id)
		if want := max(n, 1); n > 0 && len(k.Plaintext) != want || n == 0 && len(k.Plaintext) != 32 {
			t.Errorf("asked for %d bytes, got %d", n, len(k.Plaintext))
		}
		if n != 1 && seen[string(k.Plaintext[:16])] {
			t.Error("the same bytes were made twice")
		}
		if n != 1 {
			seen[string(k.Plaintext[:16])] = true
		}
	}
}

func madeAsLong(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, n := range []int{16, 20, 3000} {
		put(t, s, "shop", "1", strings.Repeat("s", n))
		_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
		ok(t, err, "having the next version made")
		before := read(t, s, "shop", "1")
		made, err := s.RotateNamedKey(t.Context(), "shop", "1")
		ok(t, err, "rotating")
		after := read(t, s, "shop", "1")
		if len(before.Plaintext) != n || len(after.Plaintext) != n || bytes.Equal(before.Plaintext, after.Plaintext) {
			t.Errorf("after %d bytes %d and %d were made", n, len(before.Plaintext), len(after.Plaintext))
		}
		if made.Plaintext != nil || made.Version != before.Version+1 || !sameVersion(made, after) {
			t.Errorf("rotated to %+v, read %+v", made, after)
		}
	}
}

func versionsStay(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	const versions = 12
	for v := 1; v <= versions; v++ {
		if k := put(t, s, "shop", "1", fmt.Sprintf("secret %d", v)); k.Version != v {
			t.Fatalf("version %d has the number %d", v, k.Version)
		}
	}
	for v := 1; v <= versions; v++ {
		if k := wantKey(t, s, "shop", "1", v, fmt.Sprintf("secret %d", v)); k.Newest != versions {
			t.Errorf("the newest version is %d, want %d", k.Newest, versions)
		}
	}
	_, err := s.NamedKey(t.Context(), "shop", "1", versions+1)
	wants(t, err, api.ErrNotFound, "reading the version after the newest")
}

func compareAndSet(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, c := range []struct {
		newest, cas int
		want        error // nil: it is put
	}{
		{0, 1, api.ErrState}, {0, 0, nil}, {1, 0, api.ErrExists}, {1, 2, api.ErrState}, {1, 1, nil}, {2, 1, api.ErrState}, {2, 2, nil},
	} {
		_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{CAS: &c.cas})
		doing := fmt.Sprintf("putting with cas %d after version %d", c.cas, c.newest)
		if c.want == nil {
			ok(t, err, doing)
		} else {
			wants(t, err, c.want, doing)
		}
	}
	ok(t, s.DeleteNamedKey(t.Context(), "shop", "1"), "deleting")
	newest := 0
	_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{CAS: &newest})
	wants(t, err, api.ErrExists, "putting with cas 0 what was deleted")
	newest = 3
	k, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{CAS: &newest})
	if err != nil || k.Version != 4 {
		t.Errorf("putting with cas 3 what was deleted: %+v, %v", k, err)
	}
}

func objects(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for i, text := range []string{`{}`, `{"key":"c2VjcmV0","note":"é","n":1.50}`, ` {"a":{"b":[]}} `} {
		k, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: []byte(text), Object: true})
		ok(t, err, "putting "+text)
		if found := wantKey(t, s, "shop", "1", 0, text); !k.Object || !found.Object || found.Version != i+1 {
			t.Errorf("put %+v, found %+v", k, found)
		}
	}
	for _, text := range []string{`[]`, `"{}"`, `null`, `{`, `{} {}`, `{"a":}`, ` `, "secret"} {
		_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: []byte(text), Object: true})
		wants(t, err, api.ErrBadRequest, "putting "+text+" as an object")
	}
	put(t, s, "shop", "1", "{}") // bytes that look like one
	if k := read(t, s, "shop", "1"); k.Object {
		t.Errorf("found %+v", k)
	}
}

func objectsDoNotRotate(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: []byte(`{"key":"longer than 32 bytes, as objects are"}`), Object: true})
	ok(t, err, "putting an object")
	_, err = s.RotateNamedKey(t.Context(), "shop", "1")
	wants(t, err, api.ErrState, "rotating an object")
	_, err = s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
	ok(t, err, "having a key made after an object")
	if k := read(t, s, "shop", "1"); k.Object || len(k.Plaintext) != 32 || k.Version != 2 {
		t.Errorf("made %+v", k)
	}
}

func deletedKeys(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret 1")
	put(t, s, "shop", "1", "secret 2")
	ok(t, s.DeleteNamedKey(t.Context(), "shop", "1"), "deleting")
	ok(t, s.DeleteNamedKey(t.Context(), "shop", "1"), "deleting again")
	for _, version := range []int{0, 2} {
		_, err := s.NamedKey(t.Context(), "shop", "1", version)
		wants(t, err, api.ErrNotFound, fmt.Sprintf("reading version %d", version))
	}
	_, err := s.RotateNamedKey(t.Context(), "shop", "1")
	wants(t, err, api.ErrNotFound, "rotating what is deleted")
	wantKey(t, s, "shop", "1", 1, "secret 1")
	if k, err := s.DescribeNamedKey(t.Context(), "shop", "1"); err != nil || k.Version != 2 || k.Deleted == nil {
		t.Errorf("described as %+v, %v", k, err)
	}
	page, err := s.NamedKeys(t.Context(), "shop", api.ListOptions{})
	if err != nil || len(page.Keys) != 1 || page.Keys[0].Deleted == nil {
		t.Errorf("listed %+v, %v", page, err)
	}
	if k := put(t, s, "shop", "1", "secret 3"); k.Version != 3 || k.Deleted != nil {
		t.Errorf("put %+v", k)
	}
	wantKey(t, s, "shop", "1", 0, "secret 3")
	_, err = s.NamedKey(t.Context(), "shop", "1", 2)
	wants(t, err, api.ErrNotFound, "reading the version that stays deleted")
}

func described(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret 1")
	made := put(t, s, "shop", "1", "secret 2")
	k, err := s.DescribeNamedKey(t.Context(), "shop", "1")
	ok(t, err, "describing")
	if k.Plaintext != nil || !sameVersion(k, made) {
		t.Errorf("described as %+v, made %+v", k, made)
	}
}

// strangeIDs are in their order.
func strangeIDs() []string {
	ids := []string{
		"\x00", "\x00\x00", " ", "%2F", ".", "..", "/", "//", "1", "1/", "1/0000000001", "1/0000000001/0000000001", "a b", "a?version=1", "a#b",
		"keys/rotate", "key\xff", "é", "日本", "\xff\xfe", strings.Repeat("x", api.MaxNamedKeyID),
	}
	slices.Sort(ids)
	return ids
}

func anyID(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, id := range strangeIDs() {
		made := put(t, s, "shop", id, "first of "+id)
		if text, raw := api.ShowID(id); made.ID != text || !bytes.Equal(made.Raw, raw) {
			t.Errorf("the ID %q shows as %q, %q", id, made.ID, made.Raw)
		}
		put(t, s, "shop", id, "second of "+id)
	}
	for _, id := range strangeIDs() {
		wantKey(t, s, "shop", id, 0, "second of "+id)
		wantKey(t, s, "shop", id, 1, "first of "+id)
		if k, err := s.DescribeNamedKey(t.Context(), "shop", id); err != nil || k.Version != 2 {
			t.Errorf("describing %q: %+v, %v", id, k, err)
		}
		if k, err := s.RotateNamedKey(t.Context(), "shop", id); err != nil || k.Version != 3 {
			t.Errorf("rotating %q: %+v, %v", id, k, err)
		}
		ok(t, s.DeleteNamedKey(t.Context(), "shop", id), fmt.Sprintf("deleting %q", id))
	}
	db, err := s.Database(t.Context(), "shop")
	if n := len(strangeIDs()); err != nil || db.Keys != n || db.Versions != 3*n {
		t.Errorf("the database is %+v, %v; want %d data keys", db, err, n)
	}
}

func dataKeysListed(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	makeDB(t, s, "shop2")
	put(t, s, "shop2", "other", "secret")
	for _, id := range strangeIDs() {
		put(t, s, "shop", id, "secret")
	}
	put(t, s, "shop", "1", "secret")
	for _, c := range []struct {
		prefix string
		limit  int
	}{{"", 0}, {"", 1}, {"", 4}, {"", len(strangeIDs())}, {"1", 1}, {"1/", 2}, {"/", 1}, {"\xff", 3}, {"none", 1}} {
		want := slices.DeleteFunc(strangeIDs(), func(id string) bool { return !strings.HasPrefix(id, c.prefix) })
		if got := list(t, s, api.ListOptions{Prefix: c.prefix, Limit: c.limit}); !slices.Equal(got, want) {
			t.Errorf("with prefix %q, %d on a page, listed %q, want %q", c.prefix, c.limit, got, want)
		}
	}
	for _, opts := range []api.ListOptions{{Limit: -1}, {Limit: api.MaxPage + 1}, {After: "not a next!"}} {
		_, err := s.NamedKeys(t.Context(), "shop", opts)
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("listing with %+v", opts))
	}
}

// list returns the IDs of all pages.
func list(t *testing.T, s DatabaseService, opts api.ListOptions) (ids []string) {
	t.Helper()
	for {
		page, err := s.NamedKeys(t.Context(), "shop", opts)
		ok(t, err, "listing data keys")
		for _, k := range page.Keys {
			id := k.ID
			if k.Raw != nil {
				id = string(k.Raw)
			}
			ids = append(ids, id)
			if k.Plaintext != nil || k.Database != "shop" || k.Newest != k.Version || k.First.IsZero() || id == "1" && k.Version != 2 {
				t.Errorf("listed %+v", k)
			}
		}
		if opts.After = page.Next; page.Next == "" {
			return ids
		}
		if len(page.Keys) == 0 || len(ids) > len(strangeIDs()) {
			t.Fatalf("the pages do not end: %q", ids)
		}
	}
}

func badPuts(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	minus := -1
	for what, p := range map[string]api.NamedKeyPut{
		"nothing":                    {Plaintext: []byte{}},
		"a plaintext and a length":   {Plaintext: []byte("secret"), Bytes: 6},
		"a negative length":          {Bytes: -1},
		"a length above 1024":        {Bytes: api.MaxDataKey + 1},
		"an object that is not here": {Object: true},
		"a negative cas":             {CAS: &minus},
	} {
		_, err := s.PutNamedKey(t.Context(), "shop", "1", p)
		wants(t, err, api.ErrBadRequest, "putting "+what)
	}
	_, err := s.NamedKey(t.Context(), "shop", "1", 0)
	wants(t, err, api.ErrNotFound, "reading what was refused")
}

func mariadbKeys(t *testing.T, s DatabaseService) {
	makeDB(t, s, MariaDB)
	for i, n := range []int{16, 24, 32} {
		put(t, s, MariaDB, "1", strings.Repeat("s", n))
		_, err := s.PutNamedKey(t.Context(), MariaDB, "1", api.NamedKeyPut{Bytes: n})
		ok(t, err, "having a key made")
		_, err = s.RotateNamedKey(t.Context(), MariaDB, "1")
		ok(t, err, "rotating")
		if k := read(t, s, MariaDB, "1"); len(k.Plaintext) != n || k.Version != 3*(i+1) {
			t.Errorf("after %d bytes: %d bytes, version %d", n, len(k.Plaintext), k.Version)
		}
	}
	for _, n := range []int{1, 15, 20, 31, 33, 64} {
		_, err := s.PutNamedKey(t.Context(), MariaDB, "1", api.NamedKeyPut{Plaintext: make([]byte, n)})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("putting %d bytes", n))
		_, err = s.PutNamedKey(t.Context(), MariaDB, "1", api.NamedKeyPut{Bytes: n})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("having %d bytes made", n))
	}
	_, err := s.PutNamedKey(t.Context(), MariaDB, "1", api.NamedKeyPut{Plaintext: []byte(`{"data":"00112233"}`), Object: true})
	wants(t, err, api.ErrBadRequest, "putting an object")
	if err := s.DeleteNamedKey(t.Context(), MariaDB, "1"); !errors.Is(err, api.ErrState) {
		t.Errorf("deleting: %v, want %v", err, api.ErrState)
	}
	if k := read(t, s, MariaDB, "1"); k.Version != 9 {
		t.Errorf("the newest version is %d", k.Version)
	}
}
