package memdriver

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"slices"
	"sync"
	"time"

	"kmsd/pluginproto"
)

// Options say what kind of driver New makes. The zero value is a good driver on a
// token of its own.
type Options struct {
	// Token is the HSM. Nil means a new one, with the label "mem".
	Token *Token
	// ServiceTime is how long each command takes.
	ServiceTime time.Duration
	// OneAtATime makes commands wait for each other, as a library does that
	// serialises its calls. A probe waits with them.
	OneAtATime bool
	// OneStepClones makes clones have one step at each end, as key wrapping has: what
	// the source says first is all that a target needs.
	OneStepClones bool
	// CloneKeys is how many keys one transfer carries. Zero means 1.
	CloneKeys int
	// CloneProtocol is what the driver calls its clone protocol. Empty: "memory". Tokens
	// with different ones cannot exchange keys.
	CloneProtocol string
	// HiddenDomain makes an equal domain check value prove nothing, as with an HSM that
	// keeps its cloning domain to itself.
	HiddenDomain bool
	// Facts are what the token has to tell.
	Facts []pluginproto.Fact
	// OwnIV makes the token choose the IV of an encryption itself, of so many bytes: 12
	// or 16. Zero means that it takes the caller's.
	OwnIV int
}

// Driver is one driver process on a token. Besides pluginproto.Driver it has what a
// supervisor's process has: Done, Kill and PID.
type Driver struct {
	token  *Token
	opts   Options
	pid    int
	turn   chan struct{} // holds a token while nobody computes; nil without OneAtATime
	until  time.Time     // when the token is done with the last command; for whoever has turn
	done   chan struct{}
	ended  sync.Once // closes done
	clones clones

	mu     sync.Mutex // guards what follows
	open   bool
	lost   error // why every call fails; nil while none has to
	domain []byte
	facts  []pluginproto.Fact
	faults []*Fault
	counts map[Call]int
}

var _ pluginproto.Driver = (*Driver)(nil)

// New makes a driver, not yet open.
func New(opts Options) *Driver {
	if opts.Token == nil {
		opts.Token = NewToken("mem")
	}
	d := &Driver{
		token:  opts.Token,
		opts:   opts,
		pid:    opts.Token.nextPID(),
		done:   make(chan struct{}),
		facts:  opts.Facts,
		counts: make(map[Call]int),
	}
	if opts.OneAtATime {
		d.turn = make(chan struct{}, 1)
		d.turn <- struct{}{}
	}
	return d
}

// Token returns the HSM behind the driver.
func (d *Driver) Token() *Token { return d.token }

// Open implements pluginproto.Driver. The only setting it knows is token_label.
func (d *Driver) Open(ctx context.Context, req pluginproto.OpenRequest) (pluginproto.TokenInfo, error) {
	const op = "opening the token"
	if err := d.begin(ctx, CallOpen, pluginproto.Command{}); err != nil {
		return pluginproto.TokenInfo{}, err
	}
	for name, value := range req.Settings {
		if name != "token_label" {
			return pluginproto.TokenInfo{}, permanent(op, "there is no setting %q", name)
		}
		if value != d.token.label {
			return pluginproto.TokenInfo{}, permanent(op, "there is no token %q", value)
		}
	}
	if len(req.Domain) < sha256.Size {
		return pluginproto.TokenInfo{}, permanent(op, "the domain secret has %d bytes, at least %d are needed", len(req.Domain), sha256.Size)
	}
	if err := d.token.login(req.PIN); err != nil {
		return pluginproto.TokenInfo{}, err
	}
	domain, err := hkdf.Key(sha256.New, req.Domain, nil, "kmsd memory token domain", 32)
	if err != nil {
		return pluginproto.TokenInfo{}, permanent(op, "deriving the domain key: %v", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open {
		return pluginproto.TokenInfo{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "it is open already")
	}
	d.open, d.domain = true, domain
	return pluginproto.TokenInfo{
		Label:        d.token.label,
		Serial:       d.token.serial,
		Manufacturer: "kmsd",
		Model:        "memory",
		Firmware:     "1.0",
		DomainCheck:  mac(domain, []byte(checkBlock))[:checkSize],
		Driver:       "memory 1.0",
		Mechanisms: []pluginproto.Mechanism{
			pluginproto.AESGCM, pluginproto.RSAPKCS1v15, pluginproto.RSAPSS, pluginproto.RSAOAEP, pluginproto.ECDSA, pluginproto.HMAC,
		},
		Cloning: []pluginproto.CloneProtocol{d.protocol()},
		Facts:   slices.Clone(d.facts),
	}, nil
}

// List implements pluginproto.Driver.
func (d *Driver) List(ctx context.Context) ([]pluginproto.Object, error) {
	if err := d.begin(ctx, CallList, pluginproto.Command{}); err != nil {
		return nil, err
	}
	return d.token.objects(), nil
}

// Inspect implements pluginproto.Driver.
func (d *Driver) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	if err := d.begin(ctx, CallInspect, pluginproto.Command{}); err != nil {
		return pluginproto.Object{}, err
	}
	k, ok := d.token.find(id)
	if !ok {
		return pluginproto.Object{}, absent("inspecting key", id)
	}
	return k.object(id), nil
}

// Generate implements pluginproto.Driver.
func (d *Driver) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	if err := d.begin(ctx, CallGenerate, pluginproto.Command{}); err != nil {
		return pluginproto.Object{}, err
	}
	k, err := newKey(spec.Type, spec.Label)
	if err != nil {
		return pluginproto.Object{}, err
	}
	var added bool
	if err := d.change(func() { _, added = d.token.add(spec.ID, k) }); err != nil {
		return pluginproto.Object{}, err
	}
	if !added {
		return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassCaller, "generating key "+spec.ID.String(), "the identity is taken")
	}
	return k.object(spec.ID), nil
}

// SetAttributes implements pluginproto.Driver.
func (d *Driver) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	if err := d.begin(ctx, CallSetAttributes, pluginproto.Command{}); err != nil {
		return err
	}
	k, ok := d.token.find(id)
	if !ok {
		return absent("changing key", id)
	}
	label := k.label
	if attrs.Label != nil {
		label = *attrs.Label
	}
	if err := d.change(func() { ok = d.token.setLabel(id, label) }); err != nil {
		return err
	}
	if !ok {
		return absent("changing key", id)
	}
	return nil
}

// Destroy implements pluginproto.Driver.
func (d *Driver) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	if err := d.begin(ctx, CallDestroy, pluginproto.Command{}); err != nil {
		return err
	}
	var there bool
	if err := d.change(func() { there = d.token.Lose(id) }); err != nil {
		return err
	}
	if !there {
		return absent("destroying key", id)
	}
	return nil
}

// CloneStep implements pluginproto.Driver.
func (d *Driver) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if err := d.begin(ctx, CallCloneStep, pluginproto.Command{}); err != nil {
		return pluginproto.CloneReply{}, err
	}
	return d.clone(req)
}

// Facts implements pluginproto.Driver.
func (d *Driver) Facts(ctx context.Context) ([]pluginproto.Fact, error) {
	if err := d.begin(ctx, CallFacts, pluginproto.Command{}); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.facts), nil
}

// Tell changes the facts.
func (d *Driver) Tell(facts ...pluginproto.Fact) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.facts = facts
}

// Do implements pluginproto.Driver.
func (d *Driver) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if err := cmd.Check(); err != nil {
		return pluginproto.Result{}, err
	}
	if err := d.begin(ctx, CallDo, cmd); err != nil {
		return pluginproto.Result{}, err
	}
	service := d.opts.ServiceTime * time.Duration(max(1, len(cmd.Items)))
	if d.turn != nil {
		came := time.Now()
		select {
		case <-d.turn:
			defer func() { d.turn <- struct{}{} }()
		case <-ctx.Done():
			return pluginproto.Result{}, ctx.Err()
		}
		// A token begins with what waits the moment it is done with the last command,
		// however late this process wakes up to see it.
		if d.until.Before(came) {
			d.until = came
		}
		d.until = d.until.Add(service)
		service = time.Until(d.until)
	}
	if d.opts.ServiceTime > 0 {
		if err := d.pause(ctx, service); err != nil {
			return pluginproto.Result{}, err
		}
		if err := d.broken(CallDo); err != nil {
			return pluginproto.Result{}, err
		}
	}
	return d.run(cmd)
}

// Close implements pluginproto.Driver.
func (d *Driver) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.domain)
	d.open, d.domain = false, nil
	return nil
}

func permanent(op, format string, args ...any) error {
	e := pluginproto.Errorf(pluginproto.ClassMember, op, format, args...)
	e.Permanent = true
	return e
}
