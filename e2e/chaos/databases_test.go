package chaos_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	// database is behind the mount of a "kmsd dev", and masterKey is its master key.
	database  = "shop"
	mountName = "mariadb"
	masterKey = "shop-db"
	// dataKeys is how many there are; few, so that programs meet at one.
	dataKeys = 24
	// asksPerSecond is how many programs of databases begin each second.
	asksPerSecond = 20
	// rekeyTime is how long a rekey may take, with every fault on the way.
	rekeyTime = time.Minute
)

// shop is what programs do with the data keys of a database, over kmsd's own API and over
// the listener for databases.
type shop struct {
	*load
	site       *site
	vault      *http.Client
	url, token string

	mu     sync.Mutex  // guards newest
	newest map[int]int // :: number of a data key → its newest version that was acknowledged
}

func newShop(t *testing.T, l *load, at *site) *shop {
	t.Helper()
	roots, err := at.env.RootCAs()
	if err != nil {
		t.Fatal(err)
	}
	// As MariaDB does it: a connection for each request, and every request once.
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	return &shop{
		load: l, site: at, vault: &http.Client{Transport: transport}, url: at.env.VaultAddr + "/v1/" + mountName, token: at.env.VaultToken,
		newest: map[int]int{},
	}
}

// nameOf is what a data key is called in the history.
func nameOf(id int) string { return fmt.Sprintf("%s/%d", database, id) }

// ask is what one program does.
func (s *shop) ask() {
	id := 1 + rand.IntN(dataKeys)
	switch rand.IntN(8) {
	case 0:
		s.put(id)
	case 1:
		s.vaultPut(id)
	case 2:
		s.rotate(id)
	case 3, 4:
		s.get(id, s.version(id))
	default:
		s.vaultGet(id, s.version(id))
	}
}

// version chooses the newest, or one that was acknowledged.
func (s *shop) version(id int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return rand.IntN(s.newest[id] + 1)
}

func (s *shop) made(id, version int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest[id] = max(s.newest[id], version)
}

func (s *shop) put(id int) {
	plain := random(32)
	s.do(chaos.Request{Op: chaos.PutNamed, Key: nameOf(id), Plain: chaos.Digest(plain)}, func(ctx context.Context, r *chaos.Request) error {
		k, err := s.c.PutNamedKey(ctx, database, fmt.Sprint(id), api.NamedKeyPut{Plaintext: plain})
		r.Version = k.Version
		s.made(id, k.Version)
		return err
	})
}

func (s *shop) rotate(id int) {
	s.do(chaos.Request{Op: chaos.RotateNamed, Key: nameOf(id)}, func(ctx context.Context, r *chaos.Request) error {
		k, err := s.c.RotateNamedKey(ctx, database, fmt.Sprint(id))
		r.Version = k.Version
		s.made(id, k.Version)
		return err
	})
}

func (s *shop) get(id, version int) {
	s.do(chaos.Request{Op: chaos.GetNamed, Key: nameOf(id), Newest: version == 0}, func(ctx context.Context, r *chaos.Request) error {
		k, err := s.c.NamedKey(ctx, database, fmt.Sprint(id), version)
		r.Version, r.Plain = k.Version, chaos.Digest(k.Plaintext)
		return err
	})
}

func (s *shop) vaultGet(id, version int) {
	path := fmt.Sprintf("/data/%d", id)
	if version != 0 {
		path += fmt.Sprintf("?version=%d", version)
	}
	s.call(chaos.Request{Op: chaos.GetNamed, Key: nameOf(id), Newest: version == 0}, http.MethodGet, path, "", func(r *chaos.Request, body []byte) error {
		var got struct {
			Data struct {
				Data     struct{ Data string }
				Metadata struct{ Version int }
			}
		}
		if err := json.Unmarshal(body, &got); err != nil {
			return err
		}
		plain, err := hex.DecodeString(got.Data.Data.Data)
		r.Version, r.Plain = got.Data.Metadata.Version, chaos.Digest(plain)
		return err
	})
}

func (s *shop) vaultPut(id int) {
	plain := random(32)
	body := fmt.Sprintf(`{"data":{"data":"%x"}}`, plain)
	req := chaos.Request{Op: chaos.PutNamed, Key: nameOf(id), Plain: chaos.Digest(plain)}
	s.call(req, http.MethodPost, fmt.Sprintf("/data/%d", id), body, func(r *chaos.Request, body []byte) error {
		var got struct{ Data struct{ Version int } }
		err := json.Unmarshal(body, &got)
		r.Version = got.Data.Version
		s.made(id, got.Data.Version)
		return err
	})
}

// call sends a request to the listener for databases, once.
func (s *shop) call(r chaos.Request, method, path, body string, read func(*chaos.Request, []byte) error) {
	s.do(r, func(ctx context.Context, r *chaos.Request) error {
		status, answer, err := s.exchange(ctx, method, path, body)
		if err == nil && status == http.StatusOK {
			if err := read(r, answer); err != nil {
				return api.NewError(api.CodeInternal, fmt.Sprintf("reading an answer of %d bytes: %v", len(answer), err), err)
			}
		}
		message := string(answer)
		if err != nil {
			status, message = 0, err.Error()
		}
		if r.Answer(status, message); r.Code != "" {
			return api.NewError(r.Code, message, err)
		}
		return nil
	})
}

func (s *shop) exchange(ctx context.Context, method, path, body string) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("X-Vault-Token", s.token)
	resp, err := s.vault.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// rekeys begins one after the other, and follows each to its end.
func (s *shop) rekeys(ctx context.Context, t *testing.T) {
	retire := []api.Retire{api.RetireNone, api.RetireDisable, api.RetireDestroy}
	for n := 0; ctx.Err() == nil; n++ {
		if _, err := s.rekey(api.RekeyOptions{Retire: retire[n%len(retire)]}); err != nil {
			t.Errorf("rekey %d: %v", n+1, err)
		}
		pause(ctx, time.Duration(500+rand.IntN(2500))*time.Millisecond)
	}
}

// rekey is one rekey. It goes on to its end when the load does; nil is also for one that
// was refused.
func (s *shop) rekey(opts api.RekeyOptions) (job api.Job, err error) {
	if !s.do(chaos.Request{Op: chaos.Rekey, Key: masterKey}, func(ctx context.Context, r *chaos.Request) (err error) {
		job, err = s.c.Rekey(ctx, database, opts)
		r.Version = job.Version
		return err
	}) {
		return api.Job{}, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), rekeyTime)
	defer cancel()
	return s.follow(ctx, job.ID)
}

// follow waits for the end of a job.
func (s *shop) follow(ctx context.Context, id string) (job api.Job, err error) {
	err = devserver.Poll(ctx, func() (err error) {
		if job, err = s.c.Job(ctx, id); err != nil {
			return err
		}
		switch {
		case job.State == api.JobDone && job.Failed == 0:
			return nil
		case job.State == api.JobDone || job.State == api.JobFailed:
			return devserver.Final(fmt.Errorf("the job ended as %+v", job))
		default:
			return fmt.Errorf("the job is %+v", job)
		}
	})
	return job, err
}

// settle waits for the job that is under way, rekeys for the last time, and reads every
// version of every data key.
func (s *shop) settle(ctx context.Context, t *testing.T, final *chaos.Final) {
	t.Helper()
	db, err := s.site.operator.Database(ctx, database)
	if err != nil {
		t.Fatal(err)
	}
	if db.Job != "" {
		if _, err := s.follow(ctx, db.Job); err != nil {
			t.Error(err)
		}
	}
	job, err := s.rekey(api.RekeyOptions{Retire: api.RetireDisable})
	if err != nil || job.ID == "" {
		t.Errorf("the last rekey: %+v, %v", job, err)
	}
	final.Master = job.Version
	t.Logf("data keys: %v; the last rekey was to version %d", s.summary(), job.Version)
	for id := 1; id <= dataKeys; id++ {
		k, err := s.site.operator.DescribeNamedKey(ctx, database, fmt.Sprint(id))
		if errors.Is(err, api.ErrNotFound) {
			continue // nobody has put it; the catalog will tell
		} else if err != nil {
			t.Error(err)
		}
		for v := 1; v <= k.Version; v++ {
			s.get(id, v)
		}
	}
}

// summary counts what was acknowledged, and what the listener for databases has not
// answered.
func (s *shop) summary() string {
	done, silent := map[chaos.Op]int{}, 0
	for _, r := range s.history.Requests() {
		switch r.Op {
		case chaos.PutNamed, chaos.RotateNamed, chaos.GetNamed, chaos.Rekey:
			if r.Code == "" {
				done[r.Op]++
			}
			if r.Vault && r.Status == 0 {
				silent++
			}
		}
	}
	return fmt.Sprintf("done %v, %d got no answer over the listener for databases", done, silent)
}

// readNamed opens the envelopes of all data keys past kmsd, with a driver on the token of
// a member that has every key.
func readNamed(ctx context.Context, t *testing.T, d pluginproto.Driver, cat look.Catalog, final *chaos.Final) {
	t.Helper()
	final.Named = map[string]map[int]chaos.Stored{}
	for _, v := range cat.DataKeys {
		key := v.Database + "/" + v.ID
		if final.Named[key] == nil {
			final.Named[key] = map[int]chaos.Stored{}
		}
		// The aad is written down here a second time, so that a change of it is noticed.
		aad := fmt.Appendf(nil, "kmsd data key 1\x00%c%s%c%s", len(v.Database), v.Database, len(v.ID), v.ID)
		plain, err := look.Unwrap(ctx, d, v.Envelope, append(binary.BigEndian.AppendUint32(aad, uint32(v.Number)), 0))
		if err != nil {
			t.Logf("version %d of %s does not unwrap: %v", v.Number, key, err)
		}
		final.Named[key][v.Number] = chaos.Stored{Plain: chaos.Digest(plain), Master: v.Master}
	}
}
