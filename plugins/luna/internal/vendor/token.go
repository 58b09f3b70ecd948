package vendor

// #include "vendor.h"
import "C"

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// RandomizeApplicationID gives this process a login state that no other process shares. It
// comes before the first session.
func (l *Library) RandomizeApplicationID() error {
	f, err := l.need(RandomizeApplicationID)
	if err != nil {
		return err
	}
	return check(RandomizeApplicationID, C.ca_nothing(f))
}

// SetApplicationID does the same with a number of the caller's, for a library that cannot
// choose one.
func (l *Library) SetApplicationID(hi, lo uint64) error {
	f, err := l.need(SetApplicationID)
	if err != nil {
		return err
	}
	return check(SetApplicationID, C.ca_set_application_id(f, C.ulong_t(hi), C.ulong_t(lo)))
}

// Firmware returns the version of the HSM's firmware, 7, 8, 4.
func (l *Library) Firmware(slot uint) (major, minor, sub uint, err error) {
	f, err := l.need(GetFirmwareVersion)
	if err != nil {
		return 0, 0, 0, err
	}
	var a, b, c C.ulong_t
	err = check(GetFirmwareVersion, C.ca_firmware(f, C.ulong_t(slot), &a, &b, &c))
	return uint(a), uint(b), uint(c), err
}

// Container returns the number of the partition that a session is in.
func (l *Library) Container(session pkcs11.SessionHandle) (uint, error) {
	f, err := l.need(GetSessionInfo)
	if err != nil {
		return 0, err
	}
	var hi, lo, container, level C.ulong_t
	err = check(GetSessionInfo, C.ca_session_info(f, C.ulong_t(session), &hi, &lo, &container, &level))
	return uint(container), err
}

// Status is how a partition is.
type Status struct {
	Activated bool
	// Wrong credentials in a row.
	OfficerFails, UserFails uint
}

// containerActivated is LUNA_CF_CONTAINER_ACTIVATED, a flag of CA_GetContainerStatus.
const containerActivated = 0x1

// Status returns how a partition is now.
func (l *Library) Status(slot, container uint) (Status, error) {
	f, err := l.need(GetContainerStatus)
	if err != nil {
		return Status{}, err
	}
	var flags, so, officer, user C.ulong_t
	err = check(GetContainerStatus, C.ca_container_status(f, C.ulong_t(slot), C.ulong_t(container), &flags, &so, &officer, &user))
	return Status{
		Activated:    flags&containerActivated != 0,
		OfficerFails: uint(officer),
		UserFails:    uint(user),
	}, err
}

// Storage is the room for objects, in bytes.
type Storage struct{ Total, Used, Free, Objects uint }

// ContainerStorage returns the room in a partition.
func (l *Library) ContainerStorage(slot, container uint) (Storage, error) {
	f, err := l.need(GetContainerStorageInformation)
	if err != nil {
		return Storage{}, err
	}
	var five [5]C.ulong_t
	err = check(GetContainerStorageInformation, C.ca_container_storage(f, C.ulong_t(slot), C.ulong_t(container), &five[0]))
	return storage(five), err
}

// TokenStorage returns the room in a slot's token, for a library that does not say it of the
// partition.
func (l *Library) TokenStorage(slot uint) (Storage, error) {
	f, err := l.need(GetTokenStorageInformation)
	if err != nil {
		return Storage{}, err
	}
	var five [5]C.ulong_t
	err = check(GetTokenStorageInformation, C.ca_token_storage(f, C.ulong_t(slot), &five[0]))
	return storage(five), err
}

// storage reads what both functions answer. The first number is the overhead of a partition.
func storage(five [5]C.ulong_t) Storage {
	return Storage{Total: uint(five[1]), Used: uint(five[2]), Free: uint(five[3]), Objects: uint(five[4])}
}

// UIDSize is the size of a Luna object's identity, in bytes.
const UIDSize = 12

// UID returns the identity that the HSM gave to an object when it was made, and which goes
// with it to other HSMs.
func (l *Library) UID(slot uint, session pkcs11.SessionHandle, object pkcs11.ObjectHandle) ([]byte, error) {
	uid := make([]byte, UIDSize)
	if f, err := l.need(GetTokenObjectUID); err == nil {
		err = check(GetTokenObjectUID, C.ca_token_object_uid(f, C.ulong_t(slot), element, C.ulong_t(object), pointer(uid)))
		return uid, err
	}
	f, err := l.need(GetObjectUID)
	if err != nil {
		return nil, err
	}
	container, err := l.Container(session)
	if err != nil {
		return nil, err
	}
	err = check(GetObjectUID, C.ca_object_uid(f, C.ulong_t(slot), C.ulong_t(container), element, C.ulong_t(object), pointer(uid)))
	return uid, err
}

// ByUID returns the object with an identity.
func (l *Library) ByUID(slot uint, session pkcs11.SessionHandle, uid []byte) (pkcs11.ObjectHandle, error) {
	if len(uid) != UIDSize {
		return 0, fmt.Errorf("looking for an object by an identity of %d bytes: %w", len(uid), pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD))
	}
	var kind, object C.ulong_t
	if f, err := l.need(GetTokenObjectHandle); err == nil {
		err = check(GetTokenObjectHandle, C.ca_token_object_handle(f, C.ulong_t(slot), pointer(uid), &kind, &object))
		return pkcs11.ObjectHandle(object), err
	}
	f, err := l.need(GetObjectHandle)
	if err != nil {
		return 0, err
	}
	container, err := l.Container(session)
	if err != nil {
		return 0, err
	}
	err = check(GetObjectHandle, C.ca_object_handle(f, C.ulong_t(slot), C.ulong_t(container), pointer(uid), &kind, &object))
	return pkcs11.ObjectHandle(object), err
}
