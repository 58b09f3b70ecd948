package kms

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"kmsd/kms/api"
	"kmsd/kms/backup"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// site is the members of a configuration with nobody to look after them: for work that
// is done while no service runs, when there is no catalog to compare them with.
type site struct {
	groups []*siteGroup
	tasks  sync.WaitGroup // in-process drivers that are being closed
}

// siteGroup is a group of it. Its fields do not change once it is open.
type siteGroup struct {
	name      string
	minCopies int
	members   []string      // all that are configured
	tokens    []*token      // of those that are there
	away      []memberFault // of the others
}

type memberFault struct {
	member string
	err    error
}

// token is a member that is there.
type token struct {
	name string
	conn group.Conn
	info pluginproto.TokenInfo
}

// noCatalog stands where a configuration has its catalog, and is never asked.
type noCatalog struct{ catalog.Store }

// siteConfig is a configuration for work without a catalog.
func siteConfig(cfg Config) (Config, error) {
	cfg.Catalog = noCatalog{}
	cfg, err := cfg.checked()
	if err != nil {
		return Config{}, api.NewError(api.CodeBadRequest, fmt.Sprintf("checking the configuration: %v", err), err)
	}
	return cfg, nil
}

// openSite connects to every member. That one is not there is no error. A wrong PIN
// costs one try.
func openSite(ctx context.Context, cfg Config) (*site, error) {
	refused, err := newPINs()
	if err != nil {
		return nil, err
	}
	s := &site{}
	c := &connector{driverDir: cfg.DriverDir, insecure: cfg.Insecure, log: cfg.Logger, pins: refused, tasks: &s.tasks}
	var mu sync.Mutex // guards the tokens of groups, and who is away
	var connecting sync.WaitGroup
	for _, gc := range cfg.Groups {
		g := &siteGroup{name: gc.Name, minCopies: gc.MinCopies}
		if g.minCopies == 0 {
			g.minCopies = min(2, len(gc.Members))
		}
		s.groups = append(s.groups, g)
		for _, m := range gc.Members {
			g.members = append(g.members, m.Name)
			connecting.Go(func() {
				conn, info, err := c.connect(ctx, gc, m, new(atomic.Int64))
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					g.away = append(g.away, memberFault{m.Name, err})
					return
				}
				g.tokens = append(g.tokens, &token{name: m.Name, conn: conn, info: info})
			})
		}
	}
	connecting.Wait()
	for _, g := range s.groups {
		slices.SortFunc(g.tokens, func(a, b *token) int { return strings.Compare(a.name, b.name) })
		slices.SortFunc(g.away, func(a, b memberFault) int { return strings.Compare(a.member, b.member) })
	}
	return s, nil
}

// close ends the drivers. One that does not end well, as that of a token that was lost, is
// killed; what was done on the others is no worse for it.
func (s *site) close() {
	for _, g := range s.groups {
		for _, t := range g.tokens {
			if err := t.conn.Close(); err != nil {
				t.conn.Kill()
			}
		}
	}
	s.tasks.Wait()
}

// group returns a group by its name, nil when it is not configured.
func (s *site) group(name string) *siteGroup {
	for _, g := range s.groups {
		if g.name == name {
			return g
		}
	}
	return nil
}

// fits makes sure that the keys of a backup can go to the members that are there: of
// each of its groups at least one, and all of its domain.
func (s *site) fits(h backup.Header) error {
	for _, had := range h.Groups {
		g := s.group(had.Name)
		if g == nil {
			return badRequest("the backup has keys of group %q, which is not configured", had.Name)
		}
		if err := g.fits(had); err != nil {
			return err
		}
	}
	return nil
}

func (g *siteGroup) fits(had backup.Group) error {
	if len(g.tokens) == 0 {
		return api.NewError(api.CodeGroupLost, fmt.Sprintf("no member of group %s is there: %s", g.name, g.whyAway()), nil)
	}
	serials := make(map[string]string, len(g.tokens)) // :: serial number → member
	for _, t := range g.tokens {
		if !bytes.Equal(t.info.DomainCheck, had.DomainCheck) {
			e := api.NewError(api.CodeState, fmt.Sprintf(
				"the domain of group %s is another one: its check value is %x on member %s, and the backup was made under %x",
				g.name, t.info.DomainCheck, t.name, had.DomainCheck), nil)
			e.Member, e.Hint = t.name, "configure the domain secret that the group had when the backup was made"
			return e
		}
		if other, twice := serials[t.info.Serial]; twice {
			return badRequest("members %s and %s of group %s have the same token, of serial number %s", other, t.name, g.name, t.info.Serial)
		}
		serials[t.info.Serial] = t.name
	}
	return nil
}

// whyAway says why members are not there.
func (g *siteGroup) whyAway() string {
	texts := make([]string, len(g.away))
	for i, f := range g.away {
		texts[i] = f.member + ": " + f.err.Error()
	}
	return strings.Join(texts, "; ")
}

// take has a token take a blob, or prove it only.
func (t *token) take(ctx context.Context, b backup.Blob, prove bool) error {
	id, err := pluginproto.ParseKeyID(b.Identity)
	if err != nil {
		return err
	}
	protocol, ok := aloneProtocol(t.info, func(p pluginproto.CloneProtocol) bool {
		return p.Takes && (p.Name == b.Protocol || b.Protocol == "")
	})
	if !ok {
		return fmt.Errorf("member %s: it does not take keys from a file as key %s is in it (%q)", t.name, id, b.Protocol)
	}
	req := pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: protocol, Keys: []pluginproto.KeyID{id}, Blob: b.Blob, Prove: prove}
	copy(req.Transfer[:], b.Transfer)
	reply, err := t.conn.CloneStep(ctx, req)
	switch {
	case err != nil:
		return fmt.Errorf("member %s: %w", t.name, err)
	case !reply.Done || len(reply.Keys) != 1 || reply.Keys[0].Object == nil:
		return fmt.Errorf("member %s: it is not content with what the backup has of key %s", t.name, id)
	}
	if o := reply.Keys[0].Object; string(o.Type) != b.Type || !bytes.Equal(o.CheckValue, b.CheckValue) {
		return fmt.Errorf("member %s: key %s has check value %x, and %x in the backup", t.name, id, o.CheckValue, b.CheckValue)
	}
	return nil
}
