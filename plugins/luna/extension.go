package main

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// extension is what a Luna partition does beside PKCS#11.
type extension struct {
	lib *vendor.Library

	// What Describe has found out, and told of; it does not change while the connection stands.
	part partition
	box  *uint // number of the partition on its HSM; nil when it is not known
}

var _ p11.Extension = (*extension)(nil)

// Prepare gives this process a login of its own. Luna shares a login between all sessions
// with one application ID, whoever opened them; a driver that found itself logged in could
// not tell whether its PIN is right. A library with neither function has an ID for each
// process (read), and C_Login says so if it has not.
func (x *extension) Prepare() error {
	if x.lib.Has(vendor.RandomizeApplicationID) {
		return x.lib.RandomizeApplicationID()
	}
	if !x.lib.Has(vendor.SetApplicationID) {
		return nil
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	return x.lib.SetApplicationID(binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:]))
}

// Describe implements [p11.Extension].
func (x *extension) Describe(at p11.Place, info *pluginproto.TokenInfo) error {
	firmware, err := x.firmware(at, info.Firmware)
	if err != nil {
		return err
	}
	if x.part, err = readPolicies(x.lib, at.Slot); err != nil {
		return err
	}
	x.part.firmware = firmware
	info.Firmware = firmware.String()
	if box, err := x.lib.Container(at.Session); err == nil {
		x.box = &box
	} else if !withheld(err) {
		return err
	}
	if x.part.keyExport() {
		return &pluginproto.Error{
			Class: pluginproto.ClassMember, Permanent: true, Op: "looking at the partition's policies",
			Msg: "it is a key-export partition: its keys leave it wrapped (policy 1 or 5 is on) and are never cloned (0 and 4 are off), " +
				"so a second HSM could never hold them; use a partition that clones" +
				x.part.remedy(policyPrivateCloning, policySecretCloning),
		}
	}
	info.Cloning = x.part.offers(x.lib.Missing).protocols
	info.Facts, err = x.factsOf(at, x.part)
	return err
}

// firmware returns the HSM's firmware. CK_TOKEN_INFO has two numbers of it.
func (x *extension) firmware(at p11.Place, short string) (version3, error) {
	major, minor, sub, err := x.lib.Firmware(at.Slot)
	if err == nil {
		return version3{major, minor, sub}, nil
	}
	if !withheld(err) {
		return version3{}, err
	}
	var v version3
	if _, err := fmt.Sscanf(short, "%d.%d", &v[0], &v[1]); err != nil {
		return version3{}, fmt.Errorf("reading the firmware version %q: %w", short, err)
	}
	return v, nil
}

// withheld reports whether err means that the library or the HSM does not say something,
// which it need not, rather than trouble with either.
func withheld(err error) bool {
	for _, ckr := range []pkcs11.Error{
		pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_ARGUMENTS_BAD, ckrUserNotAuthorized, ckrOperationNotAllowed,
	} {
		if errors.Is(err, ckr) {
			return true
		}
	}
	return false
}

// UID implements [p11.Extension].
func (x *extension) UID(at p11.Place, object pkcs11.ObjectHandle) ([]byte, error) {
	uid, err := x.lib.UID(at.Slot, at.Session, object)
	if withheld(err) {
		return nil, nil
	}
	return uid, err
}

// ByUID implements [p11.Extension].
func (x *extension) ByUID(at p11.Place, uid []byte) (pkcs11.ObjectHandle, bool, error) {
	object, err := x.lib.ByUID(at.Slot, at.Session, uid)
	// What is answered for an identity that is not there is not written anywhere.
	if withheld(err) || errors.Is(err, pkcs11.Error(pkcs11.CKR_OBJECT_HANDLE_INVALID)) {
		return 0, false, nil
	}
	return object, object != 0, err
}

// Source implements [p11.Extension].
func (x *extension) Source(protocol string, at p11.Place, objects int) (p11.Source, error) {
	switch protocol {
	case cpv1, cpv1New:
		return &cpv1Source{lib: x.lib, at: at}, nil
	case cpv3:
		return &cpv3Source{lib: x.lib, at: at}, nil
	case cpv4:
		return &cpv4Source{tunnel: tunnel{lib: x.lib, at: at}}, nil
	case sim:
		return &simSource{lib: x.lib, at: at}, nil
	}
	return nil, errProtocol(protocol)
}

// Target implements [p11.Extension].
func (x *extension) Target(protocol string, at p11.Place, objects int) (p11.Target, error) {
	switch protocol {
	case cpv1, cpv1New:
		return &cpv1Target{lib: x.lib, at: at}, nil
	case cpv3:
		return &cpv3Target{lib: x.lib, at: at}, nil
	case cpv4:
		return &cpv4Target{tunnel: tunnel{lib: x.lib, at: at}, objects: objects}, nil
	case sim:
		return &simTarget{lib: x.lib, at: at, objects: objects}, nil
	}
	return nil, errProtocol(protocol)
}

func errProtocol(name string) error {
	return pluginproto.Errorf(pluginproto.ClassCaller, "cloning keys", "a Luna has no protocol %q (known: %s)",
		name, strings.Join([]string{cpv4, cpv3, cpv1New, cpv1, sim}, ", "))
}
