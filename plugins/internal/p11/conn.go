package p11

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// conn is one connection to the token: everything that dies with the sessions.
// A lost one is replaced whole, never mended. Nothing in it but index and keys changes.
type conn struct {
	lib   *pkcs11.Ctx
	c11   *crypto11.Context
	place place

	// keeper owns the session objects; it runs no commands of its own.
	keeper pkcs11.SessionHandle
	// workers holds one session for each worker, by the worker's number.
	workers []pkcs11.SessionHandle

	domainKey pkcs11.ObjectHandle // wraps and unwraps clones
	probeKey  pkcs11.ObjectHandle // AES-256 for probes

	index index // where keys are on the token

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
func dial(s settings, sec *secrets, workers int) (_ *conn, err error) {
	others := s.apart()
	defer others.end() // may be called twice
	others.reading()
	lib, err := load(s)
	if err != nil {
		return nil, err
	}
	c := &conn{lib: lib, keys: map[pluginproto.KeyID]*cachedKey{}}
	c.index.forget()
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.place, err = locate(lib, s); err != nil {
		return nil, err
	}
	if err := checkPIN(c.place.info.Flags); err != nil {
		return nil, err
	}
	slot := int(c.place.slot)
	c.c11, err = crypto11.Configure(&crypto11.Config{
		Path:              s.module,
		SlotNumber:        &slot,
		MaxSessions:       crypto11Sessions,
		LoginNotSupported: true, // logged in below
	})
	if err != nil {
		return nil, fail("configuring the token "+s.target(), err)
	}
	others.writing()
	if err := c.login(s, sec.pin); err != nil {
		return nil, err
	}
	others.end()
	for range workers {
		h, err := c.session()
		if err != nil {
			return nil, err
		}
		c.workers = append(c.workers, h)
	}
	if err := c.makeSessionKeys(sec.domain); err != nil {
		return nil, err
	}
	return c, nil
}

// login opens the keeper's session and logs the application in. It tries once.
func (c *conn) login(s settings, pin []byte) (err error) {
	if c.keeper, err = c.session(); err != nil {
		return err
	}
	op := "logging in to the token " + s.target()
	// The string is a view of pin, so that wiping pin wipes it; Login copies it
	// into C memory for the call alone.
	err = c.lib.Login(c.keeper, pkcs11.CKU_USER, unsafe.String(unsafe.SliceData(pin), len(pin)))
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		// The library was initialised a moment ago, so nobody can be logged in;
		// going on would mean to take any PIN for the right one.
		e := permanent(op, "somebody is logged in already in this process, so the PIN cannot be checked")
		e.CKR = pkcs11.CKR_USER_ALREADY_LOGGED_IN
		return e
	}
	return fail(op, err)
}

func (c *conn) session() (pkcs11.SessionHandle, error) {
	h, err := c.lib.OpenSession(c.place.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	return h, fail("opening a session", err)
}

// makeSessionKeys makes the domain key and the probe key.
func (c *conn) makeSessionKeys(d *domain) (err error) {
	if c.domainKey, err = d.importKEK(c.lib, c.keeper); err != nil {
		return err
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
	return fail("making the probe key", err)
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
		if _, err := c.lib.GetAttributeValue(c.keeper, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)}); err != nil {
			return false
		}
	}
	return true
}

// loggedIn returns why a session is not known to be logged in.
func (c *conn) loggedIn(h pkcs11.SessionHandle) error {
	info, err := c.lib.GetSessionInfo(h)
	if err == nil && info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		err = pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	return err
}

// close gives everything back. Errors are of no use to anybody: either the
// connection is dead already or the process is about to end.
func (c *conn) close() {
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

func (c *conn) tokenInfo() pluginproto.TokenInfo {
	i := c.place.info
	return pluginproto.TokenInfo{
		Label:        i.Label,
		Serial:       i.SerialNumber,
		Manufacturer: i.ManufacturerID,
		Model:        i.Model,
		Firmware:     fmt.Sprintf("%d.%d", i.FirmwareVersion.Major, i.FirmwareVersion.Minor),
	}
}
