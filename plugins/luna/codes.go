package main

import (
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// own is where Luna's own return values begin.
const own = pkcs11.CKR_VENDOR_DEFINED

// Return values that the driver itself looks at.
const (
	ckrOperationNotAllowed = own + 0x30
	ckrUserNotAuthorized   = own + 0x1A
)

// codes are Luna's own return values. Thales' bindings give the names and numbers; when each
// is answered is inferred from its name, but where a line says that it was read. A value that
// only tells the two ends of a clone that they do not fit is the caller's class: both
// partitions are as well as they were.
var codes = p11.Codes{
	// PKCS#11's own, which a deactivated partition may answer (inferred).
	pkcs11.CKR_USER_NOT_LOGGED_IN: {Class: pluginproto.ClassMember, Gone: true,
		Hint: "the partition has forgotten the login: if it is deactivated, activate it (lunacm: role login)"},

	own + 0x08: {Class: pluginproto.ClassCaller, // CKR_CLONING_PARAMETER_ALREADY_EXISTS
		Hint: "the partition has a cloning domain already"},
	own + 0x09: {Class: pluginproto.ClassCaller, // CKR_CLONING_PARAMETER_MISSING
		Hint: "the partition has no cloning domain: give it the domain of the other members (red key or domain string)"},
	own + 0x17: {Class: pluginproto.ClassCaller, // CKR_SIM_AUTHORIZATION_FAILED
		Hint: "the key's SIM blob wants an authorisation, and kmsd makes none that do"},
	own + 0x18: {Class: pluginproto.ClassCaller, // CKR_SIM_VERSION_UNSUPPORTED
		Hint: "the HSM does not read SIM blobs of that version: bring both HSMs to one firmware"},
	own + 0x19: {Class: pluginproto.ClassCaller, // CKR_SIM_CORRUPT_DATA
		Hint: "the SIM blob was altered on its way"},
	own + 0x1D: {Class: pluginproto.ClassCaller, // CKR_SIM_AUTHFORM_INVALID
		Hint: "the HSM does not take SIM blobs without authorisation"},
	ckrUserNotAuthorized: {Class: pluginproto.ClassCaller, // CKR_USER_NOT_AUTHORIZED
		Hint: "the role may not do that: a Crypto User cannot make, change, destroy or clone keys; set user to crypto-officer"},
	own + 0x1F: {Class: pluginproto.ClassMember, // CKR_UNABLE_TO_CONNECT
		Hint: "the Luna client does not reach the HSM: look at the network, and whether the client is registered with it"},
	own + 0x20: {Class: pluginproto.ClassMember, Gone: true, // CKR_PARTITION_DISABLED
		Hint: "the partition is deactivated: activate it (lunacm: role login)"},
	own + 0x24: {Class: pluginproto.ClassMember, // CKR_TIMEOUT
		Hint: "the HSM did not answer the Luna client in time"},
	own + 0x2A: {Class: pluginproto.ClassBusy, // CKR_HSM_STORAGE_FULL
		Hint: "the HSM has no room for another object: destroy what is not needed, or make partitions smaller"},
	own + 0x2B: {Class: pluginproto.ClassMember, // CKR_DEVICE_TIMEOUT
		Hint: "the HSM did not answer the Luna client in time"},
	own + 0x2C: {Class: pluginproto.ClassBusy, // CKR_CONTAINER_OBJECT_STORAGE_FULL
		Hint: "the partition has no room for another object: destroy what is not needed, or make the partition larger"},
	ckrOperationNotAllowed: {Class: pluginproto.ClassCaller, // CKR_OPERATION_NOT_ALLOWED
		Hint: "a policy of the partition or of the HSM forbids it: compare them with those of the other members"},
	own + 0x41: {Class: pluginproto.ClassBusy}, // CKR_AGAIN
	own + 0x68: {Class: pluginproto.ClassMember, // CKR_ACCESS_ID_INVALID
		Hint: "the HSM does not take the driver's application ID: look at AppId in Chrystoki.conf"},
	own + 0x69: {Class: pluginproto.ClassMember, // CKR_ACCESS_ID_ALREADY_EXISTS
		Hint: "another program has the driver's application ID: take AppId out of Chrystoki.conf"},
	own + 0x6F: {Class: pluginproto.ClassCaller, Exists: true, // CKR_OBJECT_ALREADY_EXISTS
		Hint: "the partition holds the object already"},
	own + 0x76: {Class: pluginproto.ClassMember, Permanent: true, // CKR_HSM_TAMPERED
		Hint: "the HSM has found that it was tampered with: the HSM's security officer has to look at it"},
	own + 0x99: {Class: pluginproto.ClassCaller, // CKR_SMK_ID_NOT_FOUND
		Hint: "the partitions have different SIM masking keys (SMK): clone the SMK of the first member to the others"},
	own + 0x9F: {Class: pluginproto.ClassMember, // CKR_ACCESS_ID_CONFLICT
		Hint: "another program has the driver's application ID: take AppId out of Chrystoki.conf"},
	own + 0x100: {Class: pluginproto.ClassCaller}, // CKR_KEY_INVALID_FOR_HA_LOGIN; kmsd does not use that login
	own + 0x106: {Class: pluginproto.ClassUnknown, // CKR_FAILED_TO_CLONE_AN_OBJECT
		Hint: "an object was not cloned, and the HSM does not say why"},
	own + 0x107: {Class: pluginproto.ClassUnknown, // CKR_CLONE_NOT_ATTEMPTED
		Hint: "the HSM gave up before it came to this object"},
	own + 0x108: {Class: pluginproto.ClassCaller, // CKR_SESSION_NEGOTIATION_NO_PSK (read)
		Hint: "the partitions have no cloning domain in common: give them the same one (red key or domain string)"},
	own + 0x109: {Class: pluginproto.ClassCaller, // CKR_SESSION_NEGOTIATION_NO_ROOTS
		Hint: "the HSMs trust no certificate authority in common"},
	own + 0x10A: {Class: pluginproto.ClassCaller, // CKR_SESSION_NEGOTIATION_NO_ALGS (read)
		Hint: "the partitions have no cloning cipher suite in common: enable one on both"},
	own + 0x10B: {Class: pluginproto.ClassBusy, // CKR_SESSION_NEGOTIATION_EXPIRED
		Hint: "the other HSM took too long to answer"},
	own + 0x10C: {Class: pluginproto.ClassCaller, // CKR_SESSION_NEGOTIATION_INVALID
		Hint: "the HSM does not take what the other one said"},
	own + 0x10D: {Class: pluginproto.ClassUnknown, // CKR_SESSION_ID_INVALID
		Hint: "the HSM does not know the cloning tunnel, or not any more"},
	own + 0x10E: {Class: pluginproto.ClassUnknown, // CKR_SESSION_ID_EXISTS
		Hint: "the HSM has a cloning tunnel of that name already"},
	own + 0x10F: {Class: pluginproto.ClassBusy, // CKR_SESSION_ID_EXPIRED
		Hint: "the cloning tunnel has run out"},
	own + 0x110: {Class: pluginproto.ClassCaller, // CKR_ATTESTATION_EXPIRED (read)
		Hint: "set the HSM's clock: this cloning protocol needs it"},
	own + 0x111: {Class: pluginproto.ClassCaller, // CKR_PROTOCOL_DISABLED (read)
		Hint: "the partition's policy 42 (allow CPv1) rules out this cloning protocol: on allows CPv1 alone, off the others; " +
			"to take keys from firmware before 7.7.0, turn it on for as long as that takes"},
	own + 0x112: {Class: pluginproto.ClassCaller, // CKR_OBJECT_TYPE_INVALID
		Hint: "the HSM does not clone objects of that kind"},
	own + 0x114: {Class: pluginproto.ClassCaller, // CKR_OBJECT_READ_ONLY
		Hint: "the object cannot be changed"},
	own + 0x116: {Class: pluginproto.ClassCaller, Hint: noneInCommon}, // CKR_SESSION_NEGOTIATION_NO_SESSION_DURATION
	own + 0x118: {Class: pluginproto.ClassCaller, Hint: noneInCommon}, // CKR_SESSION_NEGOTIATION_NO_KDF
	own + 0x119: {Class: pluginproto.ClassCaller, Hint: noneInCommon}, // CKR_SESSION_NEGOTIATION_NO_ENCODING
	own + 0x11A: {Class: pluginproto.ClassCaller, Hint: noneInCommon}, // CKR_SESSION_NEGOTIATION_NO_CHAIN_ATT
	own + 0x11B: {Class: pluginproto.ClassCaller, Hint: noneInCommon}, // CKR_SESSION_NEGOTIATION_NO_EPHEMERAL_KEY
	own + 0x136: {Class: pluginproto.ClassCaller, // CKR_KEY_NOT_ACTIVE
		Hint: "the key is outside of its dates, or was deactivated"},
	own + 0x900:  {Class: pluginproto.ClassCaller}, // LUNA_RET_HA_NOT_SUPPORTED; kmsd does not use that login
	own + 0x901:  {Class: pluginproto.ClassCaller}, // LUNA_RET_HA_USER_NOT_INITIALIZED; the same
	own + 0x1604: {Class: pluginproto.ClassBusy},   // CKR_BUSY

	0x10A0B: {Class: pluginproto.ClassCaller, // LUNA_RET_OPERATION_RESTRICTED (read)
		Hint: "functionality modules are enabled on the one HSM and not on the other: keys go from an HSM with them to one without, not back"},
}

const noneInCommon = "the HSMs have nothing in common to agree on: bring both to one firmware"
