package p11

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// conn is one connection to the token: everything that dies with the sessions.
// A lost one is replaced whole, never mended. Nothing in it but index, ivs and keys changes.
type conn struct {
	lib   *pkcs11.Ctx
	c11   *crypto11.Context
	place place
	codes Codes
	user  uint      // the CKU that is logged in
	role  string    // what the settings call that user; "" where they do not say
	ext   Extension // nil where the library has nothing beside PKCS#11
	info  pluginproto.TokenInfo

	// keeper owns the session objects; it runs no commands of its own once the connection
	// is made.
	keeper pkcs11.SessionHandle
	// workers holds one session for each worker, by the worker's number.
	workers []pkcs11.SessionHandle

	domainKey pkcs11.ObjectHandle // wraps and unwraps clones; 0 with an extension, whose keys are never wrapped
	probeKey  pkcs11.ObjectHandle // AES-256 for probes; 0 where whoever is logged in may make no key

	index index // where keys are on the token

	transfers map[transferID]*transfer // that wait for their next step; used by the rare lane's worker alone

	ivs atomic.Pointer[ivUse] // how the token treats the IV of an encryption; nil: not known yet

	mu   sync.Mutex                       // guards keys
	keys map[pluginproto.KeyID]*cachedKey // :: key identity → handles, valid for this connection only
}

// secrets are what has to be kept to make a connection anew. They are wiped when
// the driver is closed.
type secrets struct {
	pin    []byte
	domain *domain
}

func (s *secrets) wipe() {
	clear(s.pin)
	s.domain.wipe()
}

// crypto11 keeps one session and pools the rest, all of which it opens before it
// uses one again.
const crypto11Sessions = 4

// dial makes a connection: library, token, login, sessions, session objects.
func (q Quirks) dial(s settings, sec *secrets) (_ *conn, err error) {
	others := s.apart()
	defer others.end() // may be called twice
	others.reading()
	lib, err := load(s)
	if err != nil {
		return nil, err
	}
	c := &conn{lib: lib, codes: q.Codes, user: s.user, role: s.role, keys: map[pluginproto.KeyID]*cachedKey{}, transfers: map[transferID]*transfer{}}
	c.index.forget()
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if q.Extend != nil {
		if c.ext, err = q.Extend(s.module); err != nil {
			return nil, c.codes.fail("looking for what the library has beside PKCS#11", err)
		}
	}
	if c.place, err = q.locate(lib, s); err != nil {
		return nil, err
	}
	// The flags are about CKU_USER's PIN and nobody else's.
	if err := checkPIN(c.place.info.Flags); err != nil && s.user == pkcs11.CKU_USER {
		return nil, err
	}
	if err := c.configure(s); err != nil {
		return nil, err
	}
	others.writing()
	if err := c.login(s, sec.pin); err != nil {
		return nil, err
	}
	others.end()
	for range q.workers() {
		h, err := c.session()
		if err != nil {
			return nil, err
		}
		c.workers = append(c.workers, h)
	}
	if err := c.makeSessionKeys(sec.domain); err != nil {
		return nil, err
	}
	switch {
	case q.CallersIV:
		c.ivs.Store(&ivUse{given: pluginproto.GCMIVSize})
	case c.probeKey != 0:
		// A token that is short of something now is asked again by the first command.
		if _, err := c.ivUse(c.keeper, c.probeKey); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassBusy {
			return nil, err
		}
	}
	return c, c.describe(q, s)
}

// configure lets crypto11 initialise the library.
func (c *conn) configure(s settings) (err error) {
	slot := int(c.place.slot)
	c.c11, err = crypto11.Configure(&crypto11.Config{
		Path:              s.module,
		SlotNumber:        &slot,
		MaxSessions:       crypto11Sessions,
		LoginNotSupported: true, // logged in by login
	})
	if err != nil || c.ext == nil {
		return c.codes.fail("configuring the token "+s.target(), err)
	}
	// crypto11 has opened a session, for nothing but to keep a login alive, as our keeper
	// does. It goes, because no session may be older than what an extension prepares.
	if err := c.lib.CloseAllSessions(c.place.slot); err != nil {
		return c.codes.fail("closing the first session", err)
	}
	return c.codes.fail("preparing the library", c.ext.Prepare())
}

// describe takes down what the token says of itself.
func (c *conn) describe(q Quirks, s settings) (err error) {
	i := c.place.info
	c.info = pluginproto.TokenInfo{
		Label:        i.Label,
		Serial:       i.SerialNumber,
		Manufacturer: i.ManufacturerID,
		Model:        i.Model,
		Firmware:     fmt.Sprintf("%d.%d", i.FirmwareVersion.Major, i.FirmwareVersion.Minor),
		Mechanisms:   c.mechanisms(q),
	}
	if c.ext == nil {
		c.info.Cloning = wrapCloning()
		return nil
	}
	if err := c.ext.Describe(c.at(c.keeper), &c.info); err != nil {
		return c.codes.fail("asking the token about itself", err)
	}
	if c.info.Cloning, err = s.allowed(c.info.Cloning); err != nil {
		return err
	}
	c.info.Facts = append(c.info.Facts, c.facts()...)
	return nil
}

// facts are what the connection itself has to tell an operator.
func (c *conn) facts() (facts []pluginproto.Fact) {
	if c.user != pkcs11.CKU_USER {
		facts = append(facts, pluginproto.Fact{
			Name: settingUser, Warning: true,
			Value: c.role + ": the member uses the keys that it has; none can be made on it, cloned or destroyed",
		})
	}
	if known := c.ivs.Load(); known != nil {
		facts = append(facts, pluginproto.Fact{Name: "GCM IV", Value: known.String()})
	}
	return facts
}

// at is where an extension's call in a session goes.
func (c *conn) at(h pkcs11.SessionHandle) Place { return Place{Slot: c.place.slot, Session: h} }

// login opens the keeper's session and logs the application in. It tries once.
func (c *conn) login(s settings, pin []byte) (err error) {
	if c.keeper, err = c.session(); err != nil {
		return err
	}
	op := "logging in to the token " + s.target()
	// The string is a view of pin, so that wiping pin wipes it; Login copies it
	// into C memory for the call alone.
	err = c.lib.Login(c.keeper, c.user, unsafe.String(unsafe.SliceData(pin), len(pin)))
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		// The library was initialised a moment ago, so nobody can be logged in;
		// going on would mean to take any PIN for the right one.
		e := permanent(op, "somebody is logged in already, in this process or in one that the library takes for the same application, so the PIN cannot be checked")
		e.CKR = pkcs11.CKR_USER_ALREADY_LOGGED_IN
		return e
	}
	return c.codes.fail(op, err)
}

func (c *conn) session() (pkcs11.SessionHandle, error) {
	h, err := c.lib.OpenSession(c.place.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	return h, c.codes.fail("opening a session", err)
}

// makeSessionKeys makes the domain key and the probe key. There are users that may not
// make keys, Luna's Crypto User for one; without a probe key a probe draws random bytes.
func (c *conn) makeSessionKeys(d *domain) (err error) {
	if c.ext == nil {
		if c.domainKey, err = d.importKEK(c.lib, c.keeper); err != nil {
			return c.codes.fail("importing the domain key", err)
		}
	}
	c.probeKey, err = c.lib.GenerateKey(c.keeper,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		})
	err = c.codes.fail("making the probe key", err)
	if c.user != pkcs11.CKU_USER && pluginproto.ClassOf(err) == pluginproto.ClassCaller {
		c.probeKey = 0
		return nil
	}
	return err
}

// alive reports whether every session exists and is logged in and the session
// keys are there.
func (c *conn) alive() bool {
	for _, h := range append([]pkcs11.SessionHandle{c.keeper}, c.workers...) {
		if c.loggedIn(h) != nil {
			return false
		}
	}
	for _, key := range []pkcs11.ObjectHandle{c.domainKey, c.probeKey} {
		if key == 0 {
			continue
		}
		if _, err := c.lib.GetAttributeValue(c.keeper, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)}); err != nil {
			return false
		}
	}
	return true
}

// loggedIn returns why a session is not known to be logged in.
func (c *conn) loggedIn(h pkcs11.SessionHandle) error {
	info, err := c.lib.GetSessionInfo(h)
	if err != nil {
		return err
	}
	switch {
	case info.State == pkcs11.CKS_RW_USER_FUNCTIONS:
	case info.State == pkcs11.CKS_RO_USER_FUNCTIONS && c.user != pkcs11.CKU_USER: // one that may write nothing
	default:
		return pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	return nil
}

// extractable reports whether keys are made so that they can be wrapped.
func (c *conn) extractable() bool { return c.ext == nil }

// close gives everything back. Errors are of no use to anybody: either the
// connection is dead already or the process is about to end.
func (c *conn) close() {
	c.endTransfers(0)
	for _, h := range c.workers {
		_ = c.lib.CloseSession(h)
	}
	if c.keeper != 0 {
		_ = c.lib.CloseSession(c.keeper)
	}
	if c.c11 != nil {
		_ = c.c11.Close() // finalises the library
	}
	c.lib.Destroy()
}
