package apitest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/kms/api"
)

// RunRekeys tests the promises of api.Databases about rekeys and single versions of a
// master key.
func RunRekeys(t *testing.T, around Around, open OpenDatabases) {
	for _, c := range []struct {
		promise string
		test    func(*testing.T, DatabaseService)
	}{
		{"a rekey has every version of every data key under a new version of the master key", rekeyed},
		{"a rekey of a database without data keys is done", rekeyedNothing},
		{"a rekey misses nothing that is put meanwhile", rekeyedMeanwhile},
		{"a rekey retires the old versions of the master key", retired},
		{"a rekey retires no version that another database uses", notRetired},
		{"a rekey that cannot be is refused", wrongRekeys},
		{"a version that a data key uses can be neither disabled nor destroyed", versionUsed},
		{"a master key that wraps data keys is not destroyed", masterUsed},
		{"a version that nobody uses is disabled and enabled by itself", versionDisabled},
		{"a version that nobody uses is destroyed and restored by itself", versionDestroyed},
		{"a change of a version that cannot be is refused", wrongChanges},
		{"a rekey whose time is over says so", rekeyDeadlines},
	} {
		t.Run(c.promise, func(t *testing.T) {
			around(t, func(t *testing.T) { c.test(t, open(t)) })
		})
	}
}

// rekey rekeys a database and waits until its job has ended.
func rekey(t *testing.T, s DatabaseService, database string, opts api.RekeyOptions) api.Job {
	t.Helper()
	began, err := s.Rekey(t.Context(), database, opts)
	ok(t, err, "rekeying database "+database)
	if began.ID == "" || began.Type != api.JobRekey || began.Database != database || began.Started.IsZero() || began.Retire != opts.Retire {
		t.Errorf("began %+v", began)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		job, err := s.Job(ctx, began.ID)
		ok(t, err, "asking for the job")
		if job.State == api.JobDone || job.State == api.JobFailed {
			if job.ID != began.ID || job.Version != began.Version || job.Key != began.Key || job.Ended == nil || job.State != api.JobDone {
				t.Fatalf("ended as %+v, began as %+v", job, began)
			}
			return job
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("the job does not end: %+v", job)
		}
	}
}

func rekeyed(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	makeDB(t, s, "shop2")
	put(t, s, "shop2", "1", "of another database")
	const keys, versions = 5, 3
	for id := range keys {
		for v := 1; v <= versions; v++ {
			put(t, s, "shop", fmt.Sprint(id), fmt.Sprintf("secret %d %d", id, v))
		}
	}
	ok(t, s.DeleteNamedKey(t.Context(), "shop", "0"), "deleting")
	for round := 2; round <= 3; round++ {
		job := rekey(t, s, "shop", api.RekeyOptions{})
		if job.Key != "shop" || job.Version != round || job.Progress.Total != keys*versions || job.Progress.Done != keys*versions || job.Skipped != 0 || job.Failed != 0 {
			t.Errorf("job %+v", job)
		}
		if db, err := s.Database(t.Context(), "shop"); err != nil || db.Version != round || db.Job != job.ID || db.Versions != keys*versions {
			t.Errorf("after it the database is %+v, %v", db, err)
		}
		for id := range keys {
			for v := 1; v <= versions; v++ {
				if id == 0 && v == versions {
					continue // deleted
				}
				if k := wantKey(t, s, "shop", fmt.Sprint(id), v, fmt.Sprintf("secret %d %d", id, v)); k.Master != round {
					t.Errorf("version %d of data key %d is under version %d of the master key, want %d", v, id, k.Master, round)
				}
			}
		}
	}
	if k, err := s.DescribeNamedKey(t.Context(), "shop", "0"); err != nil || k.Deleted == nil || k.Master != 3 {
		t.Errorf("the deleted version is %+v, %v", k, err)
	}
	if k := wantKey(t, s, "shop2", "1", 0, "of another database"); k.Master != 1 {
		t.Errorf("the other database's is %+v", k)
	}
}

func rekeyedNothing(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	if job := rekey(t, s, "shop", api.RekeyOptions{}); job.Progress.Total != 0 || job.Version != 2 {
		t.Errorf("job %+v", job)
	}
	if k := put(t, s, "shop", "1", "secret"); k.Master != 2 {
		t.Errorf("put %+v", k)
	}
}

func rekeyedMeanwhile(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	const keys, most, burst = 4, 1000, 8 // versions of each: a store in memory may sort all of them for each page that is read
	stop := make(chan struct{})
	made := make([][]string, keys) // :: data key → plaintexts of its versions
	var wg sync.WaitGroup
	for id := range keys {
		wg.Go(func() {
			for len(made[id]) < most {
				text := fmt.Sprintf("secret %d %d", id, len(made[id]))
				if _, err := s.PutNamedKey(t.Context(), "shop", fmt.Sprint(id), api.NamedKeyPut{Plaintext: []byte(text)}); err != nil {
					t.Errorf("putting meanwhile: %v", err)
					return
				}
				if made[id] = append(made[id], text); len(made[id])%burst > 0 {
					continue
				}
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond): // which a bubble needs to go on
				}
			}
		})
	}
	rekey(t, s, "shop", api.RekeyOptions{})
	job := rekey(t, s, "shop", api.RekeyOptions{})
	close(stop)
	wg.Wait()
	for id := range keys {
		for v, text := range made[id] {
			if k := wantKey(t, s, "shop", fmt.Sprint(id), v+1, text); k.Master < job.Version || k.Newest != len(made[id]) {
				t.Errorf("version %d of data key %d is under version %d of the master key after a rekey to %d", v+1, id, k.Master, job.Version)
			}
		}
	}
}

// versionsOf returns the states of a key's versions.
func versionsOf(t *testing.T, s DatabaseService, key string) string {
	t.Helper()
	k, err := s.Key(t.Context(), key)
	ok(t, err, "showing key "+key)
	states := ""
	for _, v := range k.Versions {
		states += fmt.Sprintf("%d %s, ", v.Number, v.State)
	}
	return states
}

func retired(t *testing.T, s DatabaseService) {
	for retire, want := range map[api.Retire]string{
		api.RetireNone:    "1 enabled, 2 enabled, 3 enabled, ",
		api.RetireDisable: "1 disabled, 2 disabled, 3 enabled, ",
		api.RetireDestroy: "1 destroy_scheduled, 2 destroy_scheduled, 3 enabled, ",
	} {
		database := "shop-" + string(retire) + "x"
		makeDB(t, s, database)
		put(t, s, database, "1", "secret 1")
		_, err := s.Rotate(t.Context(), database)
		ok(t, err, "rotating the master key")
		put(t, s, database, "1", "secret 2")
		rekey(t, s, database, api.RekeyOptions{Retire: retire})
		if got := versionsOf(t, s, database); got != want {
			t.Errorf("with retire %q: %s; want %s", retire, got, want)
		}
		wantKey(t, s, database, "1", 1, "secret 1")
		wantKey(t, s, database, "1", 2, "secret 2")
	}
}

func notRetired(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	_, err := s.CreateDatabase(t.Context(), "bank", api.DatabaseOptions{Key: "shop"})
	ok(t, err, "making a second database")
	put(t, s, "shop", "1", "secret of the shop")
	put(t, s, "bank", "1", "secret of the bank")
	rekey(t, s, "shop", api.RekeyOptions{Retire: api.RetireDisable})
	if got := versionsOf(t, s, "shop"); got != "1 enabled, 2 enabled, " {
		t.Errorf("after the first database: %s", got)
	}
	wantKey(t, s, "bank", "1", 0, "secret of the bank")
	rekey(t, s, "bank", api.RekeyOptions{Retire: api.RetireDisable})
	if got := versionsOf(t, s, "shop"); !strings.HasSuffix(got, ", 2 enabled, 3 enabled, ") {
		t.Errorf("after the second database: %s", got)
	}
	wantKey(t, s, "shop", "1", 0, "secret of the shop")
	wantKey(t, s, "bank", "1", 0, "secret of the bank")
}

func wrongRekeys(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	make1(t, s, "key", "")
	for _, name := range []string{"nowhere", "key"} {
		_, err := s.Rekey(t.Context(), name, api.RekeyOptions{})
		wants(t, err, api.ErrNotFound, "rekeying "+name)
	}
	_, err := s.Rekey(t.Context(), "a/b", api.RekeyOptions{})
	wants(t, err, api.ErrBadRequest, "rekeying a/b")
	_, err = s.Rekey(t.Context(), "shop", api.RekeyOptions{Retire: "burn"})
	wants(t, err, api.ErrBadRequest, "rekeying to burn the old versions")
	_, err = s.Job(t.Context(), "nothing")
	wants(t, err, api.ErrNotFound, "asking for a job that there is not")
	_, err = s.Disable(t.Context(), "shop")
	ok(t, err, "disabling the master key")
	_, err = s.Rekey(t.Context(), "shop", api.RekeyOptions{})
	wants(t, err, api.ErrState, "rekeying with a disabled master key")
}

func rekeyDeadlines(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	for _, ctx := range []context.Context{canceled(t), expired(t)} {
		_, err := s.Rekey(ctx, "shop", api.RekeyOptions{})
		wants(t, err, api.ErrDeadline, "rekeying when the time is over")
		_, err = s.ChangeVersion(ctx, "shop", 1, api.VersionChange{Action: api.ActionDisable})
		wants(t, err, api.ErrDeadline, "changing a version when the time is over")
	}
	if got := versionsOf(t, s, "shop"); got != "1 enabled, " {
		t.Errorf("after that: %s", got)
	}
}

// change changes a version and wants it to be so.
func change(t *testing.T, s DatabaseService, key string, version int, c api.VersionChange, want string) {
	t.Helper()
	doing := fmt.Sprintf("%s of version %d", c.Action, version)
	k, err := s.ChangeVersion(t.Context(), key, version, c)
	ok(t, err, doing)
	if got := versionsOf(t, s, key); got != want || k.Versions[version-1].State == "" {
		t.Errorf("after %s: %s; want %s", doing, got, want)
	}
}

// takeOut lists the ways in which a version can be taken out of use.
func takeOut() []api.VersionChange {
	return []api.VersionChange{
		{Action: api.ActionDisable}, {Action: api.ActionDestroy, Window: -1}, {Action: api.ActionDestroy, Window: time.Hour}, {Action: api.ActionDestroy},
	}
}

func versionUsed(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret 1")
	_, err := s.Rotate(t.Context(), "shop")
	ok(t, err, "rotating the master key")
	put(t, s, "shop", "1", "secret 2") // version 1 of the master key wraps an older version only
	for version := 1; version <= 2; version++ {
		for _, c := range takeOut() {
			_, err := s.ChangeVersion(t.Context(), "shop", version, c)
			wants(t, err, api.ErrState, fmt.Sprintf("%s of version %d, which is used", c.Action, version))
		}
	}
	if got := versionsOf(t, s, "shop"); got != "1 enabled, 2 enabled, " {
		t.Errorf("after that: %s", got)
	}
	wantKey(t, s, "shop", "1", 1, "secret 1")
	rekey(t, s, "shop", api.RekeyOptions{})
	change(t, s, "shop", 1, api.VersionChange{Action: api.ActionDestroy}, "1 destroyed, 2 enabled, 3 enabled, ")
	change(t, s, "shop", 2, api.VersionChange{Action: api.ActionDisable}, "1 destroyed, 2 disabled, 3 enabled, ")
	wantKey(t, s, "shop", "1", 1, "secret 1")
	wantKey(t, s, "shop", "1", 2, "secret 2")
}

func masterUsed(t *testing.T, s DatabaseService) {
	makeDB(t, s, "shop")
	put(t, s, "shop", "1", "secret")
	for _, window := range []time.Duration{-1, time.Hour, 0} {
		_, err := s.Destroy(t.Context(), "shop", window)
		wants(t, err, api.ErrState, "destroying the master key")
	}
	wantKey(t, s, "shop", "1", 0, "secret")
}

func versionDisabled(t *testing.T, s DatabaseService) {
	make1(t, s, "key", "")
	old, err := s.Wrap(t.Context(), "key", []byte("p"), nil)
	ok(t, err, "wrapping")
	_, err = s.Rotate(t.Context(), "key")
	ok(t, err, "rotating")
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionDisable}, "1 disabled, 2 enabled, ")
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionDisable}, "1 disabled, 2 enabled, ")
	_, err = s.Unwrap(t.Context(), "key", old, nil)
	wants(t, err, api.ErrState, "unwrapping with a disabled version")
	if w, err := s.Wrap(t.Context(), "key", []byte("p"), nil); err != nil {
		t.Errorf("wrapping with the other version: %v", err)
	} else if _, err = s.Unwrap(t.Context(), "key", w, nil); err != nil {
		t.Errorf("unwrapping with the other version: %v", err)
	}
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionEnable}, "1 enabled, 2 enabled, ")
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionEnable}, "1 enabled, 2 enabled, ")
	if p, err := s.Unwrap(t.Context(), "key", old, nil); err != nil || string(p) != "p" {
		t.Errorf("unwrapping with an enabled version: %q, %v", p, err)
	}
}

func versionDestroyed(t *testing.T, s DatabaseService) {
	make1(t, s, "key", "")
	old, err := s.Wrap(t.Context(), "key", []byte("p"), nil)
	ok(t, err, "wrapping")
	_, err = s.Rotate(t.Context(), "key")
	ok(t, err, "rotating")
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionDestroy, Window: -1}, "1 destroy_scheduled, 2 enabled, ")
	_, err = s.Unwrap(t.Context(), "key", old, nil)
	wants(t, err, api.ErrState, "unwrapping with a version that is to be destroyed")
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionRestore}, "1 enabled, 2 enabled, ")
	if p, err := s.Unwrap(t.Context(), "key", old, nil); err != nil || string(p) != "p" {
		t.Errorf("unwrapping with a restored version: %q, %v", p, err)
	}
	change(t, s, "key", 1, api.VersionChange{Action: api.ActionDestroy}, "1 destroyed, 2 enabled, ")
	_, err = s.Unwrap(t.Context(), "key", old, nil)
	wants(t, err, api.ErrState, "unwrapping with a destroyed version")
	for _, action := range []api.VersionAction{api.ActionEnable, api.ActionDisable, api.ActionDestroy, api.ActionRestore} {
		_, err := s.ChangeVersion(t.Context(), "key", 1, api.VersionChange{Action: action})
		wants(t, err, api.ErrState, string(action)+" of a destroyed version")
	}
}

func wrongChanges(t *testing.T, s DatabaseService) {
	make1(t, s, "key", "")
	for _, c := range []struct {
		key     string
		version int
		change  api.VersionChange
		want    error
	}{
		{"nowhere", 1, api.VersionChange{Action: api.ActionDisable}, api.ErrNotFound},
		{"a/b", 1, api.VersionChange{Action: api.ActionDisable}, api.ErrBadRequest},
		{"key", 2, api.VersionChange{Action: api.ActionDisable}, api.ErrNotFound},
		{"key", 1, api.VersionChange{Action: api.ActionRestore}, api.ErrState},
	} {
		_, err := s.ChangeVersion(t.Context(), c.key, c.version, c.change)
		wants(t, err, c.want, fmt.Sprintf("%s of version %d of %s", c.change.Action, c.version, c.key))
	}
	if got := versionsOf(t, s, "key"); got != "1 enabled, " {
		t.Errorf("after that: %s", got)
	}
}
