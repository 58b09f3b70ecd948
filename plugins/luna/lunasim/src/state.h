/*
 * The partition's own memory: one file that every process which has the partition open
 * maps, and that tests write while it runs. lunasim.go writes the same fields, each in
 * this machine's byte order; the two agree on the size or the library does not start.
 */
#ifndef LUNASIM_STATE_H
#define LUNASIM_STATE_H

#include <stdint.h>

#include "fault.h"

#define STATE_MAGIC 0x314d5353u

#define POLICIES 64
#define NO_POLICY UINT32_MAX /* the firmware does not know it */
#define MAX_DOMAINS 3        /* row 24 */

#define FAULTS 32

/* ANSWER, LOSE: arg is the return value; SLEEP: milliseconds; HANG: 1 while it lasts */
enum { CLOSE = 1, LOGOUT, ANSWER, HANG, SLEEP, LOSE };

/* Switches, in the order of lunasim.go. */
enum {
	SW_TAMPERED,           /* 1: every call answers CKR_HSM_TAMPERED */
	SW_ACTIVATED,          /* 0: nobody is let in and who is in is put out */
	SW_DEACTIVATED_CODE,   /* what C_Login then answers */
	SW_POWER,              /* counts power cycles; a change ends every session */
	SW_APPID_SHARED,       /* 1: another process with our application ID is logged in */
	SW_CU_SESSION_OBJECTS, /* 1: the Crypto User may make session objects */
	SW_CREATE_SECRETS,     /* 1: C_CreateObject takes key values, outside of FIPS mode */
	SW_COPY,               /* 1: C_CopyObject is allowed */
	SW_GCM_IV,             /* a GCM_* value */
	SW_GCM_TAG_CODE,       /* what a ciphertext that does not authenticate is answered with */
	SW_GCM_IV_LEN,         /* bytes of an IV that comes back in the parameter: 12 or 16 */
	SW_LIMIT_OBJECTS,      /* 0: none */
	SW_LIMIT_BYTES,        /* 0: none */
	SW_LOGIN_LIMIT,        /* wrong PINs until the lock */
	SW_PIN_FLAGS,          /* 1: CK_TOKEN_INFO says how many tries are left */
	SW_HA_SLOT,            /* 1: there is a virtual slot */
	SW_HA_ONLY,            /* 1: only the virtual slot is shown, where there is one */
	SW_STRICT,             /* 1: any other call on the session breaks a transfer */
	SW_EXISTS,             /* an EXISTS_* value */
	SW_THIRD_CALL,         /* 0, or what the third CPv4 negotiation call answers although the tunnel stands */
	SW_TWC,                /* certificate type that CA_GetTokenCertificates gives; 0: both */
	SW_KEV,                /* 0: the target makes the KEV; 1: the source does */
	SW_DOMAIN_CODE,        /* what a key of another domain is answered with by CPv1 and CPv3 */
	SW_CLOCK,              /* 0: the clock is not set */
	SW_SUITES,             /* a bit for each cipher suite of CPv4 */
	SW_TUNNELS_EXPIRED,    /* 1: the CPv4 sessions that stand have run out */
	SW_SMK,                /* the number of the SIM masking key; 0: there is none */
	SW_MFA,                /* 1: it is a PED that lets people in, and a power cycle may end that */
	SW_POLICIES_KEPT,      /* 1: a process is told the policies as they were when it began */
	SWITCHES
};

enum { GCM_AUTO, GCM_CALLER, GCM_APPENDED, GCM_PARAMS, GCM_REFUSED };
enum { EXISTS_REFUSED, EXISTS_DUPLICATE, EXISTS_OVERWRITE };

struct state {
	uint32_t magic, size;
	uint32_t firmware[3];
	uint32_t failed[2]; /* wrong PINs in a row: of the Crypto Officer, of the Crypto User */
	uint32_t sw[SWITCHES];
	uint32_t token_policy[POLICIES];
	uint32_t hsm_policy[POLICIES];
	uint32_t token_capability[POLICIES]; /* 0: the policy cannot be on */
	uint32_t hsm_capability[POLICIES];
	char domain[MAX_DOMAINS][36]; /* "": none */
	char label[36], serial[20], ha_label[36];
	char pin[2][68]; /* as failed; "": the role has none */
	struct fault faults[FAULTS];
};

#endif
