package e2e_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// scraper asks for /metrics as a Prometheus does: with no token.
type scraper struct {
	web *http.Client
	url string
}

func newScraper(t *testing.T, s *devserver.Server) *scraper {
	t.Helper()
	roots, err := s.Env.RootCAs()
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &scraper{web: &http.Client{Transport: transport}, url: s.Env.Addr + "/metrics"}
}

func (s *scraper) scrape(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return "", err
	}
	res, err := s.web.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("/metrics: %s: %s", res.Status, b)
	}
	return string(b), err
}

// timed returns how long a scrape takes.
func (s *scraper) timed(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	if _, err := s.scrape(t.Context()); err != nil {
		t.Error(err)
	}
	return time.Since(began)
}

var memberIs = regexp.MustCompile(`(?m)^kmsd_member_state\{group="([^"]*)",member="([^"]*)",state="([^"]*)"\} 1$`)

// words is what one way of watching has said of members: group/member state.
type words struct {
	mu   sync.Mutex // guards said
	said map[string]bool
}

func (w *words) say(group, member string, state any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.said == nil {
		w.said = make(map[string]bool)
	}
	w.said[fmt.Sprintf("%s/%s %v", group, member, state)] = true
}

func (w *words) has(word string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said[word]
}

// A member's death and return, seen through every way of watching at once.
func TestEventsStatusAndMetricsUseTheSameWords(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	var events, status, numbers words
	var watchers sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer watchers.Wait()
	defer cancel()

	began := time.Now()
	stream := c.EventsAfter(ctx, 1000) // so that none is missed while the stream opens
	watchers.Go(func() {
		for e := range stream {
			if e.Type == api.EventMember && e.Time.After(began) {
				events.say(e.Group, e.Member, e.To)
			}
		}
	})
	watchers.Go(func() { watchStatus(ctx, t, s, &status) })
	prometheus := newScraper(t, s)
	watchers.Go(func() {
		for pause := time.NewTicker(50 * time.Millisecond); ctx.Err() == nil; <-pause.C {
			text, err := prometheus.scrape(ctx)
			if err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			for _, m := range memberIs.FindAllStringSubmatch(text, -1) {
				numbers.say(m[1], m[2], m[3])
			}
		}
	})

	settled := func() error {
		for name, w := range map[string]*words{"status": &status, "metrics": &numbers} {
			if !w.has("default/hsm-b active") {
				return fmt.Errorf("%s has not shown the member", name)
			}
		}
		return nil
	}
	await(t, recoveredIn, func(ctx context.Context) error { return devserver.Poll(ctx, settled) })

	// It stays away long enough for whoever looks once a second.
	m, err := devserver.Member(group(t, c), "hsm-b")
	if err != nil {
		t.Fatal(err)
	}
	send(t, m.DriverPID, syscall.SIGSTOP)
	want := "default/hsm-b probing"
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			for name, w := range map[string]*words{"events": &events, "status": &status, "metrics": &numbers} {
				if !w.has(want) {
					return fmt.Errorf("%s never said %q", name, want)
				}
			}
			return nil
		})
	})
	send(t, m.DriverPID, syscall.SIGCONT)
	awaitWhole(t, c, recoveredIn)
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			if !events.has("default/hsm-b active") {
				return fmt.Errorf("no event says that the member is back")
			}
			return nil
		})
	})
	cancel()
	watchers.Wait()
	for word := range numbers.said {
		if strings.Contains(word, "hsm-b") && !strings.HasSuffix(word, "active") && !events.said[word] {
			t.Errorf("metrics say %q, events %v", word, events.said)
		}
	}

	// The log of the service remembers it, and kmsd's own log has a line of it.
	past, err := c.Log(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(past, func(e api.Event) bool {
		return e.Type == api.EventMember && e.Member == "hsm-b" && e.To == string(api.MemberProbing) && e.From == string(api.MemberActive)
	})
	if i < 0 {
		t.Fatalf("the log does not remember it: %+v", past)
	}
	var logged api.Event
	await(t, recoveredIn, func(ctx context.Context) error { // whoever listens is told first
		return devserver.Poll(ctx, func() (err error) {
			logged, err = haLine(s.Log, past[i])
			return err
		})
	})
	if l := logged; l.From != past[i].From || l.To != past[i].To || l.CKR != past[i].CKR || l.Cause != past[i].Cause || l.Group != past[i].Group {
		t.Errorf("the HA log says %+v, the event is %+v", logged, past[i])
	}
}

// haLine looks in kmsd's log for the line of the HA log of a member's event.
func haLine(log string, of api.Event) (api.Event, error) {
	lines, err := os.ReadFile(log)
	if err != nil {
		return api.Event{}, err
	}
	for line := range strings.Lines(string(lines)) {
		var l struct {
			Module string `json:"@module"`
			api.Event
		}
		if json.Unmarshal([]byte(line), &l) == nil && l.Module == "kmsd.ha" && l.Time.Equal(of.Time) && l.Member == of.Member {
			return l.Event, nil
		}
	}
	return api.Event{}, fmt.Errorf("the HA log has no line of %+v", of)
}

// watchStatus reads what "kmsd status --watch" shows until ctx ends.
func watchStatus(ctx context.Context, t *testing.T, s *devserver.Server, said *words) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "kmsd"), "status", "--watch", "-o", "json")
	cmd.Env = append(environment(), "KMSD_ADDR="+s.Env.Addr, "KMSD_CACERT="+s.Env.CACert, "KMSD_TOKEN="+s.Env.Token)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Error(err)
		return
	}
	defer cmd.Wait() // ended by ctx, so its exit code says nothing
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var st api.Status
		if err := json.Unmarshal(lines.Bytes(), &st); err != nil {
			if ctx.Err() == nil {
				t.Errorf("status --watch: %v in %s", err, lines.Text())
			}
			return
		}
		for _, g := range st.Groups {
			for _, m := range g.Members {
				said.say(g.Name, m.Name, m.State)
			}
		}
	}
}

// When every HSM hangs, /metrics still answers at once: it never asks one.
func TestMetricsAnswerWhileEveryMemberHangs(t *testing.T) {
	s, healthy := start(t), start(t)
	prometheus, control := newScraper(t, s), newScraper(t, healthy)
	c := dial(t, s)
	createKey(t, c, "shop")
	same := &openLoad{c: c, key: "shop"} // what needs no HSM, of the same kmsd
	for _, m := range group(t, c).Members {
		send(t, m.DriverPID, syscall.SIGSTOP)
	}
	var hung, well outcome
	for range 16 {
		var all sync.WaitGroup // at the same time, so that a pause of the machine's is in all
		all.Go(func() { hung.times = append(hung.times, prometheus.timed(t)) })
		all.Go(func() { well.times = append(well.times, control.timed(t)) })
		all.Go(func() { same.read(time.Now()) })
		all.Wait()
		wait(t, 260*time.Millisecond) // an answer is made anew every 250 ms
	}
	read := same.take()
	t.Logf("median %v, longest %v; where no member hangs %v, %v; a key %v, %v", hung.quantile(0.5), hung.quantile(1),
		well.quantile(0.5), well.quantile(1), read.quantile(0.5), read.quantile(1))
	// What the machine takes, it takes from both. Whoever waits for an HSM waits until it has
	// been silent for the probe interval, and a fraction of that is seen in most scrapes.
	// In the first half the members that hang are not known to, in the second they are.
	for _, part := range []float64{0.5, 0.75} {
		if h, w := hung.quantile(part), well.quantile(part); h > probeInterval/20+share*w {
			t.Errorf("the part %v of the scrapes took %v, and %v where no member hangs", part, h, w)
		}
	}
	if h, w := hung.quantile(1), max(well.quantile(1), read.quantile(1)); h > probeInterval/2+share*w {
		t.Errorf("a scrape took %v, and %v at most what needs no HSM; it has waited for one", h, w)
	}
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			text, err := prometheus.scrape(ctx)
			if err == nil && !strings.Contains(text, `kmsd_group_state{group="default",state="lost"} 1`) {
				err = fmt.Errorf("the group is not lost:\n%s", text)
			}
			return err
		})
	})
}
