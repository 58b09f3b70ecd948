package apitest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/kms/api"
)

// DatabaseService is a service that keeps data keys for databases.
type DatabaseService interface {
	api.Service
	api.Databases
}

// MariaDB is the name of the database whose format is api.FormatMariaDB in the tests of
// RunDatabases.
const MariaDB = "mariadb"

// OpenDatabases returns a service without keys and databases for one test, and closes it
// with t.Cleanup. The format of a database named MariaDB is api.FormatMariaDB, and no
// other has one.
type OpenDatabases func(t *testing.T) DatabaseService

// RunDatabases tests the promises of api.Databases, but for those of rekeys and of single
// versions of a master key, which are RunRekeys'.
func RunDatabases(t *testing.T, around Around, open OpenDatabases) {
	for _, c := range []struct {
		promise string
		test    func(*testing.T, DatabaseService)
	}{
		{"a database is made with a master key of its name", databaseMade},
		{"a database uses a key that there is", databaseUsesKey},
		{"a database is made once", databaseOnce},
		{"of many who make a database at once one does", oneDatabase},
		{"a key that cannot be a master key is refused", wrongMasters},
		{"databases are listed by name in pages", databasesListed},
		{"a database counts its data keys and their versions", databaseCounts},
		{"a name or an ID that is not well formed is refused everywhere", badIDs},
		{"what does not exist is not found anywhere", noSuchDataKey},
		{"a data key that is put can be read", putIsRead},
		{"a data key has 1 byte to 64 KiB", dataKeySizes},
		{"an HSM makes a data key of the length asked for", madeByHSM},
		{"an HSM makes the next version as long as the newest", madeAsLong},
		{"every version can be read for ever", versionsStay},
		{"a data key is put only after the version that was expected", compareAndSet},
		{"an object is a JSON object", objects},
		{"only its client can rotate an object", objectsDoNotRotate},
		{"a deleted version is given to nobody and the next comes after it", deletedKeys},
		{"a data key is described without its plaintext", described},
		{"an ID is any bytes", anyID},
		{"data keys are listed by ID in pages", dataKeysListed},
		{"a put that is not well formed is refused and makes nothing", badPuts},
		{"MariaDB gets no data key that would stop it", mariadbKeys},
		{"a disabled master key gives away nothing until it is enabled", masterDisabled},
		{"versions under every version of the master key can be read", masterRotated},
		{"databases that share a master key share no data key", sharedMaster},
		{"of many who put at once each makes a version of its own", concurrentPuts},
		{"of many who expect the same version one puts", concurrentCAS},
		{"a request for a data key whose time is over says so", databaseDeadlines},
	} {
		t.Run(c.promise, func(t *testing.T) {
			around(t, func(t *testing.T) { c.test(t, open(t)) })
		})
	}
}

// makeDB makes a database for a test.
func makeDB(t *testing.T, s DatabaseService, name string) api.Database {
	t.Helper()
	db, err := s.CreateDatabase(t.Context(), name, api.DatabaseOptions{})
	ok(t, err, "making database "+name)
	return db
}

// put puts a data key that must be taken.
func put(t *testing.T, s DatabaseService, database, id, plaintext string) api.NamedKey {
	t.Helper()
	k, err := s.PutNamedKey(t.Context(), database, id, api.NamedKeyPut{Plaintext: []byte(plaintext)})
	ok(t, err, fmt.Sprintf("putting data key %q", id))
	if k.Plaintext != nil {
		t.Errorf("the answer to a put has a plaintext: %+v", k)
	}
	return k
}

// wantKey reads a version, 0 for the newest, and compares its plaintext.
func wantKey(t *testing.T, s DatabaseService, database, id string, version int, plaintext string) api.NamedKey {
	t.Helper()
	k, err := s.NamedKey(t.Context(), database, id, version)
	ok(t, err, fmt.Sprintf("reading version %d of data key %q", version, id))
	if string(k.Plaintext) != plaintext || version != 0 && k.Version != version {
		t.Errorf("version %d of data key %q is %+v, want %q", version, id, k, plaintext)
	}
	return k
}

// read reads the newest version of a data key.
func read(t *testing.T, s DatabaseService, database, id string) api.NamedKey {
	t.Helper()
	k, err := s.NamedKey(t.Context(), database, id, 0)
	ok(t, err, fmt.Sprintf("reading data key %q", id))
	return k
}

func databaseMade(t *testing.T, s DatabaseService) {
	db := makeDB(t, s, "shop")
	if db.Name != "shop" || db.Key != "shop" || db.Version != 1 || db.Group == "" || db.Format != "" || db.Created.IsZero() {
		t.Errorf("made %+v", db)
	}
	k, err := s.Key(t.Context(), "shop")
	ok(t, err, "showing its master key")
	if k.Type != "aes-256" || !slices.Equal(k.Databases, []string{"shop"}) || k.Group != db.Group {
		t.Errorf("its master key is %+v", k)
	}
	shown, err := s.Database(t.Context(), "shop")
	ok(t, err, "showing the database")
	if shown != db {
		t.Errorf("shown %+v, made %+v", shown, db)
	}
	if m := makeDB(t, s, MariaDB); m.Format != api.FormatMariaDB {
		t.Errorf("the format of %s is %q", MariaDB, m.Format)
	}
}

func databaseUsesKey(t *testing.T, s DatabaseService) {
	make1(t, s, "master", "aes-128")
	_, err := s.Rotate(t.Context(), "master")
	ok(t, err, "rotating")
	for _, name := range []string{"shop", "bank"} {
		db, err := s.CreateDatabase(t.Context(), name, api.DatabaseOptions{Key: "master"})
		ok(t, err, "making database "+name)
		if db.Key != "master" || db.Version != 2 {
			t.Errorf("made %+v", db)
		}
		put(t, s, name, "1", "secret of "+name)
	}
	k, err := s.Key(t.Context(), "master")
	ok(t, err, "showing the master key")
	if !slices.Equal(k.Databases, []string{"bank", "shop"}) {
		t.Errorf("the key knows of the databases %q", k.Databases)
	}
	db, err := s.CreateDatabase(t.Context(), "third", api.DatabaseOptions{Key: "other", KeyOptions: api.KeyOptions{Type: "aes-128"}})
	ok(t, err, "making a database with a key of another name")
	k, err = s.Key(t.Context(), "other")
	ok(t, err, "showing that key")
	if db.Key != "other" || k.Type != "aes-128" {
		t.Errorf("made %+v with %+v", db, k)
	}
}

func databaseOnce(t *testing.T, s DatabaseService) {
	first := makeDB(t, s, "shop")
	_, err := s.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{})
	wants(t, err, api.ErrExists, "making it again")
	_, err = s.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{Key: "other"})
	wants(t, err, api.ErrExists, "making it again with another key")
	_, err = s.Key(t.Context(), "other")
	wants(t, err, api.ErrNotFound, "showing a key that nobody needed")
	again, err := s.Database(t.Context(), "shop")
	ok(t, err, "showing it")
	if again != first {
		t.Errorf("it was %+v and is %+v", first, again)
	}
}

func oneDatabase(t *testing.T, s DatabaseService) {
	errs := atOnce(8, func(int) error {
		_, err := s.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{})
		return err
	})
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
			continue
		}
		wants(t, err, api.ErrExists, "making it too")
	}
	if made != 1 {
		t.Errorf("%d made the database", made)
	}
}

// atOnce calls f with 0 to n-1 at the same time and returns what came of each.
func atOnce(n int, f func(int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errs
}

func wrongMasters(t *testing.T, s DatabaseService) {
	make1(t, s, "ec", "ec-p256")
	make1(t, s, "aes", "aes-256")
	make1(t, s, "off", "")
	_, err := s.Disable(t.Context(), "off")
	ok(t, err, "disabling")
	for what, c := range map[string]struct {
		opts api.DatabaseOptions
		want error
	}{
		"a key that does not wrap":       {api.DatabaseOptions{Key: "ec"}, api.ErrBadRequest},
		"a disabled key":                 {api.DatabaseOptions{Key: "off"}, api.ErrState},
		"a key of another type":          {api.DatabaseOptions{Key: "aes", KeyOptions: api.KeyOptions{Type: "aes-128"}}, api.ErrBadRequest},
		"a new key that would not wrap":  {api.DatabaseOptions{KeyOptions: api.KeyOptions{Type: "ec-p256"}}, api.ErrBadRequest},
		"a new key of no type":           {api.DatabaseOptions{KeyOptions: api.KeyOptions{Type: "des"}}, api.ErrBadRequest},
		"a key whose name no key can be": {api.DatabaseOptions{Key: "a/b"}, api.ErrBadRequest},
	} {
		_, err := s.CreateDatabase(t.Context(), "shop", c.opts)
		wants(t, err, c.want, "making a database with "+what)
	}
	_, err = s.Key(t.Context(), "shop")
	wants(t, err, api.ErrNotFound, "showing a key that was refused")
	_, err = s.Database(t.Context(), "shop")
	wants(t, err, api.ErrNotFound, "showing what was refused")
}

func databasesListed(t *testing.T, s DatabaseService) {
	for _, name := range []string{"shop-b", "shop-a", "bank", "shop-c"} {
		makeDB(t, s, name)
	}
	var names []string
	opts := api.ListOptions{Prefix: "shop-", Limit: 2}
	for pages := 1; ; pages++ {
		page, err := s.Databases(t.Context(), opts)
		ok(t, err, "listing databases")
		for _, db := range page.Databases {
			names = append(names, db.Name)
			if db.Key != db.Name || db.Version != 1 || db.Group == "" || db.Created.IsZero() {
				t.Errorf("listed %+v", db)
			}
		}
		if opts.After = page.Next; page.Next == "" {
			break
		}
		if pages > 3 {
			t.Fatal("the pages do not end")
		}
	}
	if got := strings.Join(names, " "); got != "shop-a shop-b shop-c" {
		t.Errorf("listed %q", got)
	}
	for _, limit := range []int{-1, api.MaxPage + 1} {
		_, err := s.Databases(t.Context(), api.ListOptions{Limit: limit})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("listing %d databases", limit))
	}
}

func databaseCounts(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	makeDB(t, s, "shop2") // whose name begins as that of the other
	for _, id := range []string{"1", "1", "1", "2"} {
		put(t, s, "shop", id, "secret")
	}
	put(t, s, "shop2", "1", "secret")
	ok(t, s.DeleteNamedKey(t.Context(), "shop", "2"), "deleting")
	db, err := s.Database(t.Context(), "shop")
	ok(t, err, "showing the database")
	if db.Keys != 2 || db.Versions != 4 {
		t.Errorf("it has %d data keys and %d versions, want 2 and 4", db.Keys, db.Versions)
	}
}

// onDatabase calls everything that takes the name of a database that exists.
func onDatabase(ctx context.Context, s DatabaseService, database, id string) map[string]error {
	failed := onDataKey(ctx, s, database, id)
	_, failed["Database"] = s.Database(ctx, database)
	_, failed["NamedKeys"] = s.NamedKeys(ctx, database, api.ListOptions{})
	_, failed["PutNamedKey"] = s.PutNamedKey(ctx, database, id, api.NamedKeyPut{})
	return failed
}

// onDataKey calls everything that takes the ID of a data key that exists.
func onDataKey(ctx context.Context, s DatabaseService, database, id string) map[string]error {
	failed := make(map[string]error)
	_, failed["RotateNamedKey"] = s.RotateNamedKey(ctx, database, id)
	_, failed["NamedKey"] = s.NamedKey(ctx, database, id, 0)
	_, failed["NamedKey of a version"] = s.NamedKey(ctx, database, id, 1)
	_, failed["DescribeNamedKey"] = s.DescribeNamedKey(ctx, database, id)
	failed["DeleteNamedKey"] = s.DeleteNamedKey(ctx, database, id)
	return failed
}

func badIDs(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, name := range []string{"", ".", "..", "-x", "a/b", "a b", "é", "%2e", strings.Repeat("n", api.MaxNameLen+1)} {
		_, err := s.CreateDatabase(t.Context(), name, api.DatabaseOptions{})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("CreateDatabase of %q", name))
		for method, err := range onDatabase(t.Context(), s, name, "1") {
			wants(t, err, api.ErrBadRequest, fmt.Sprintf("%s of database %q", method, name))
		}
	}
	for _, id := range []string{"", strings.Repeat("n", api.MaxNamedKeyID+1)} {
		_, err := s.PutNamedKey(t.Context(), "shop", id, api.NamedKeyPut{})
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("PutNamedKey of %q", id))
		for method, err := range onDataKey(t.Context(), s, "shop", id) {
			wants(t, err, api.ErrBadRequest, fmt.Sprintf("%s of %q", method, id))
		}
	}
	put(t, s, "shop", "1", "secret")
	_, err := s.NamedKey(t.Context(), "shop", "1", -1)
	wants(t, err, api.ErrBadRequest, "reading version -1")
}

func noSuchDataKey(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	make1(t, s, "key", "") // is no database
	put(t, s, "shop", "1", "secret")
	for _, name := range []string{"shop2", "key"} {
		for method, err := range onDatabase(t.Context(), s, name, "1") {
			wants(t, err, api.ErrNotFound, method+" of database "+name)
		}
	}
	for _, id := range []string{"2", "11", "1/0000000001"} {
		for method, err := range onDataKey(t.Context(), s, "shop", id) {
			wants(t, err, api.ErrNotFound, method+" of data key "+id)
		}
	}
	_, err := s.NamedKey(t.Context(), "shop", "1", 2)
	wants(t, err, api.ErrNotFound, "reading a version that was never made")
}

func databaseDeadlines(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret")
	for _, ctx := range []context.Context{canceled(t), expired(t)} {
		failed := onDatabase(ctx, s, "shop", "1")
		_, failed["CreateDatabase"] = s.CreateDatabase(ctx, "bank", api.DatabaseOptions{})
		_, failed["Databases"] = s.Databases(ctx, api.ListOptions{})
		for method, err := range failed {
			wants(t, err, api.ErrDeadline, method+" when the time is over")
		}
	}
	if k := wantKey(t, s, "shop", "1", 0, "secret"); k.Version != 1 {
		t.Errorf("it has become %+v", k)
	}
}

func masterDisabled(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret")
	_, err := s.Disable(t.Context(), "shop")
	ok(t, err, "disabling the master key")
	_, err = s.NamedKey(t.Context(), "shop", "1", 0)
	wants(t, err, api.ErrState, "reading a data key")
	_, err = s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
	wants(t, err, api.ErrState, "putting a data key")
	_, err = s.RotateNamedKey(t.Context(), "shop", "1")
	wants(t, err, api.ErrState, "rotating a data key")
	_, err = s.NamedKey(t.Context(), "shop", "2", 0)
	wants(t, err, api.ErrNotFound, "reading what there is not")
	k, err := s.DescribeNamedKey(t.Context(), "shop", "1")
	if err != nil || k.Version != 1 {
		t.Errorf("describing it, which needs no key: %+v, %v", k, err)
	}
	db, err := s.Database(t.Context(), "shop")
	if err != nil || db.Version != 0 || db.Versions != 1 {
		t.Errorf("the database is %+v, %v", db, err)
	}
	_, err = s.Enable(t.Context(), "shop")
	ok(t, err, "enabling the master key")
	wantKey(t, s, "shop", "1", 0, "secret")
}

func masterRotated(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for version := 1; version <= 3; version++ {
		if k := put(t, s, "shop", "1", fmt.Sprintf("secret %d", version)); k.Master != version {
			t.Errorf("put under version %d of the master key, want %d", k.Master, version)
		}
		_, err := s.Rotate(t.Context(), "shop")
		ok(t, err, "rotating the master key")
	}
	for version := 1; version <= 3; version++ {
		if k := wantKey(t, s, "shop", "1", version, fmt.Sprintf("secret %d", version)); k.Master != version {
			t.Errorf("read from under version %d of the master key, want %d", k.Master, version)
		}
	}
}

func sharedMaster(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	_, err := s.CreateDatabase(t.Context(), "bank", api.DatabaseOptions{Key: "shop"})
	ok(t, err, "making a second database")
	put(t, s, "shop", "1", "secret of the shop")
	_, err = s.NamedKey(t.Context(), "bank", "1", 0)
	wants(t, err, api.ErrNotFound, "reading it in the other database")
	put(t, s, "bank", "1", "secret of the bank")
	wantKey(t, s, "shop", "1", 0, "secret of the shop")
	wantKey(t, s, "bank", "1", 0, "secret of the bank")
}

// concurrentPuts lets many put two data keys, while others read them.
func concurrentPuts(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "0", "first")
	put(t, s, "shop", "1", "first")
	const many = 16
	made := make([]api.NamedKey, many)
	began := time.Now()
	for i, err := range atOnce(many, func(i int) (err error) {
		id := fmt.Sprint(i % 2)
		if made[i], err = s.PutNamedKey(t.Context(), "shop", id, api.NamedKeyPut{Plaintext: fmt.Appendf(nil, "secret %d", i)}); err == nil {
			_, err = s.NamedKey(t.Context(), "shop", id, 0)
		}
		return err
	}) {
		ok(t, err, fmt.Sprintf("putting version %d after %v", i, time.Since(began)))
	}
	seen := make(map[string]bool)
	for i, k := range made {
		seen[fmt.Sprint(k.ID, " ", k.Version)] = true
		wantKey(t, s, "shop", k.ID, k.Version, fmt.Sprintf("secret %d", i))
	}
	for id := range 2 {
		for version := 2; version <= many/2+1; version++ {
			if !seen[fmt.Sprint(id, " ", version)] {
				t.Errorf("nobody has made version %d of data key %d", version, id)
			}
		}
	}
}

func concurrentCAS(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for newest, want := range []error{api.ErrExists, api.ErrState} {
		made := 0
		for _, err := range atOnce(8, func(int) error {
			_, err := s.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{CAS: &newest})
			return err
		}) {
			if err == nil {
				made++
				continue
			}
			wants(t, err, want, fmt.Sprintf("putting after version %d", newest))
		}
		if k := read(t, s, "shop", "1"); made != 1 || k.Version != newest+1 {
			t.Errorf("%d have put after version %d, and the newest is %d", made, newest, k.Version)
		}
	}
}
