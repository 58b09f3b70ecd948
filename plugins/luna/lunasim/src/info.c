/* What the partition says of itself: slots, token, mechanisms, policies, firmware, storage. */
#include "sim.h"

#include <stdio.h>

/* Pads a string with blanks, as PKCS#11 wants it. */
static void text(unsigned char *out, size_t n, const char *s)
{
	size_t len = strlen(s);
	memset(out, ' ', n);
	memcpy(out, s, len < n ? len : n);
}

/* Answers for calls that need no session. */
static CK_RV enter_slot(const char *function, CK_SLOT_ID slot)
{
	CK_RV rv = enter(function, 0);
	if (rv != CKR_OK)
		return rv;
	hold_all(READ);
	rv = initialised ? check_slot(slot) : CKR_CRYPTOKI_NOT_INITIALIZED;
	if (rv != CKR_OK)
		release_all();
	return rv;
}

static CK_RV leave_slot(const char *function, CK_RV rv)
{
	release_all();
	return leave(function, rv);
}

EXPORT CK_RV C_GetInfo(CK_INFO_PTR info)
{
	CK_RV rv = info == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetInfo", 0);
	if (rv != CKR_OK)
		return rv;
	*info = (CK_INFO){ .cryptokiVersion = { 2, 40 }, .libraryVersion = { 10, 7 } };
	text(info->manufacturerID, sizeof info->manufacturerID, "SafeNet");
	text(info->libraryDescription, sizeof info->libraryDescription, "Luna double on SoftHSM");
	return leave_slot("C_GetInfo", CKR_OK);
}

/* Virtual slots come after physical ones (row 15), or alone (row 13). */
EXPORT CK_RV C_GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR slots, NP n)
{
	(void)present;
	CK_RV rv = n == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetSlotList", 0);
	if (rv != CKR_OK)
		return rv;
	N count = check_slot(1) == CKR_OK ? 2 : 1, room = *n;
	*n = count;
	if (slots != NULL && room < count)
		rv = CKR_BUFFER_TOO_SMALL;
	for (N i = 0; slots != NULL && rv == CKR_OK && i < count; i++)
		slots[i] = i;
	return leave_slot("C_GetSlotList", rv);
}

static int is_virtual(CK_SLOT_ID slot) { return sw(SW_HA_SLOT) && (slot == 1 || sw(SW_HA_ONLY)); }

EXPORT CK_RV C_GetSlotInfo(CK_SLOT_ID slot, CK_SLOT_INFO_PTR info)
{
	CK_RV rv = info == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetSlotInfo", slot);
	if (rv != CKR_OK)
		return rv;
	*info = (CK_SLOT_INFO){ .flags = CKF_TOKEN_PRESENT | CKF_HW_SLOT };
	text(info->slotDescription, sizeof info->slotDescription, is_virtual(slot) ? "HA Virtual Card Slot" : "Net Token Slot");
	text(info->manufacturerID, sizeof info->manufacturerID, "SafeNet");
	return leave_slot("C_GetSlotInfo", CKR_OK);
}

/* The flags of a PIN that was given wrong (PKCS#11 2.40, section 3.2). */
static CK_FLAGS pin_flags(void)
{
	uint32_t failed = __atomic_load_n(&state->failed[0], __ATOMIC_ACQUIRE), limit = sw(SW_LOGIN_LIMIT);
	if (failed >= limit)
		return CKF_USER_PIN_LOCKED;
	if (!sw(SW_PIN_FLAGS) || failed == 0)
		return 0;
	return failed + 1 == limit ? CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY : CKF_USER_PIN_COUNT_LOW;
}

EXPORT CK_RV C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
	char model[32], serial[32];
	CK_RV rv = info == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetTokenInfo", slot);
	if (rv != CKR_OK)
		return rv;
	uint32_t fw = firmware();
	int virtual = is_virtual(slot);
	snprintf(model, sizeof model, "LunaSA %u.%u.%u", fw >> 16, fw >> 8 & 0xff, fw & 0xff);
	snprintf(serial, sizeof serial, "%s%s", virtual ? "1" : "", state->serial); /* row 10 */
	*info = (CK_TOKEN_INFO){
		.flags = CKF_RNG | CKF_LOGIN_REQUIRED | CKF_USER_PIN_INITIALIZED | CKF_TOKEN_INITIALIZED | pin_flags(),
		.ulMinPinLen = 7, .ulMaxPinLen = 255, /* guess */
		.ulTotalPublicMemory = CK_UNAVAILABLE_INFORMATION, .ulFreePublicMemory = CK_UNAVAILABLE_INFORMATION,
		.ulTotalPrivateMemory = CK_UNAVAILABLE_INFORMATION, .ulFreePrivateMemory = CK_UNAVAILABLE_INFORMATION,
		.firmwareVersion = { (CK_BYTE)(fw >> 16), (CK_BYTE)(fw >> 8) },
	};
	text(info->label, sizeof info->label, virtual ? state->ha_label : state->label);
	text(info->manufacturerID, sizeof info->manufacturerID, "SafeNet");
	text(info->model, sizeof info->model, virtual ? "LunaVirtual" : model);
	text(info->serialNumber, sizeof info->serialNumber, serial);
	return leave_slot("C_GetTokenInfo", CKR_OK);
}

EXPORT CK_RV C_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR list, NP n)
{
	static const CK_MECHANISM_TYPE own[] = { CKM_LUNA_AES_KW, CKM_LUNA_AES_KWP };
	CK_RV rv = n == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetMechanismList", slot);
	if (rv != CKR_OK)
		return rv;
	N room = *n, have = 0;
	if ((rv = real->C_GetMechanismList(real_slot, NULL, &have)) == CKR_OK) {
		*n = have + 2;
		if (list != NULL && room < *n)
			rv = CKR_BUFFER_TOO_SMALL;
		else if (list != NULL && (rv = real->C_GetMechanismList(real_slot, list, &have)) == CKR_OK)
			memcpy(list + have, own, sizeof own);
	}
	return leave_slot("C_GetMechanismList", rv);
}

EXPORT CK_RV C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
	CK_RV rv = info == NULL ? CKR_ARGUMENTS_BAD : enter_slot("C_GetMechanismInfo", slot);
	if (rv != CKR_OK)
		return rv;
	if (type == CKM_LUNA_AES_KW || type == CKM_LUNA_AES_KWP)
		*info = (CK_MECHANISM_INFO){ 16, 32, CKF_HW | CKF_WRAP | CKF_UNWRAP };
	else
		rv = real->C_GetMechanismInfo(real_slot, type, info);
	return leave_slot("C_GetMechanismInfo", rv);
}

EXPORT CK_RV CA_GetFirmwareVersion(CK_SLOT_ID slot, CK_ULONG *major, CK_ULONG *minor, CK_ULONG *sub)
{
	CK_RV rv = major == NULL || minor == NULL || sub == NULL ? CKR_ARGUMENTS_BAD : enter_slot("CA_GetFirmwareVersion", slot);
	if (rv != CKR_OK)
		return rv;
	uint32_t fw = firmware();
	*major = fw >> 16, *minor = fw >> 8 & 0xff, *sub = fw & 0xff;
	return leave_slot("CA_GetFirmwareVersion", CKR_OK);
}

enum set { TOKEN_POLICIES, TOKEN_CAPABILITIES, HSM_POLICIES, HSM_CAPABILITIES, SETS };

/* A partition allows no more than its HSM does (D-caps). */
static int beyond_hsm(int id) { return (id == PRIVATE_CLONING || id == SECRET_CLONING) && !allows(state->hsm_policy, HSM_CLONING); }

static uint32_t setting(enum set which, int id)
{
	uint32_t *const sets[] = { state->token_policy, state->token_capability, state->hsm_policy, state->hsm_capability };
	uint32_t v = policy(sets[which], id);
	return which <= TOKEN_CAPABILITIES && v != NO_POLICY && beyond_hsm(id) ? 0 : v;
}

static uint32_t kept[SETS][POLICIES]; /* guarded by the lock */

void remember_policies(void)
{
	for (int which = 0; which < SETS; which++)
		for (int i = 0; i < POLICIES; i++)
			kept[which][i] = setting(which, i);
}

/* Gives {id: value} in two arrays; both lengths follow the two-call rule. */
static CK_RV policy_set(const char *function, CK_SLOT_ID slot, enum set which, NP ids, NP n, NP values, NP m)
{
	CK_RV rv = n == NULL || m == NULL ? CKR_ARGUMENTS_BAD : enter_slot(function, slot);
	if (rv != CKR_OK)
		return rv;
	N told[POLICIES], named[POLICIES], count = 0, room = *n < *m ? *n : *m;
	for (int i = 0; i < POLICIES; i++) {
		uint32_t v = sw(SW_POLICIES_KEPT) ? kept[which][i] : setting(which, i);
		if (v != NO_POLICY)
			named[count] = (N)i, told[count++] = v;
	}
	*n = *m = count;
	if (ids != NULL && values != NULL && room < count)
		rv = CKR_BUFFER_TOO_SMALL;
	else if (ids != NULL && values != NULL) {
		memcpy(ids, named, count * sizeof *ids);
		memcpy(values, told, count * sizeof *values);
	}
	return leave_slot(function, rv);
}

EXPORT CK_RV CA_GetTokenPolicies(CK_SLOT_ID slot, NP ids, NP n, NP values, NP m)
{
	return policy_set("CA_GetTokenPolicies", slot, TOKEN_POLICIES, ids, n, values, m);
}

EXPORT CK_RV CA_GetTokenCapabilities(CK_SLOT_ID slot, NP ids, NP n, NP values, NP m)
{
	return policy_set("CA_GetTokenCapabilities", slot, TOKEN_CAPABILITIES, ids, n, values, m);
}

EXPORT CK_RV CA_GetContainerPolicySet(CK_SLOT_ID slot, N container, NP ids, NP n, NP values, NP m)
{
	return container > 1 ? CKR_ARGUMENTS_BAD : policy_set("CA_GetContainerPolicySet", slot, TOKEN_POLICIES, ids, n, values, m);
}

EXPORT CK_RV CA_GetHSMPolicySet(CK_SLOT_ID slot, NP ids, NP n, NP values, NP m)
{
	return policy_set("CA_GetHSMPolicySet", slot, HSM_POLICIES, ids, n, values, m);
}

EXPORT CK_RV CA_GetHSMCapabilitySet(CK_SLOT_ID slot, NP ids, NP n, NP values, NP m)
{
	return policy_set("CA_GetHSMCapabilitySet", slot, HSM_CAPABILITIES, ids, n, values, m);
}

/* Wrong logins in a row, by role, as Thales' headers name them; the security officer's are never any. */
EXPORT CK_RV CA_GetContainerStatus(CK_SLOT_ID slot, N container, NP flags, NP so_fails, NP user_fails, NP limited_fails)
{
	CK_RV rv = container > 1 || flags == NULL || so_fails == NULL || user_fails == NULL || limited_fails == NULL
	                   ? CKR_ARGUMENTS_BAD
	                   : enter_slot("CA_GetContainerStatus", slot);
	if (rv != CKR_OK)
		return rv;
	*flags = (activated() ? LUNA_CF_CONTAINER_ACTIVATED : 0) | (state->domain[0][0] != 0 ? LUNA_CF_KCV_CREATED : 0);
	*so_fails = 0;
	*user_fails = __atomic_load_n(&state->failed[0], __ATOMIC_ACQUIRE);
	*limited_fails = __atomic_load_n(&state->failed[1], __ATOMIC_ACQUIRE);
	return leave_slot("CA_GetContainerStatus", CKR_OK);
}

/* Overhead, total, used and free bytes, number of objects; the token's are its one container's. */
static CK_RV give_storage(const char *function, CK_SLOT_ID slot, NP overhead, NP total, NP used, NP left, NP objects)
{
	enum { PLENTY = 2 << 20 };
	CK_RV rv = overhead == NULL || total == NULL || used == NULL || left == NULL || objects == NULL ? CKR_ARGUMENTS_BAD
	                                                                                               : enter_slot(function, slot);
	if (rv != CKR_OK)
		return rv;
	storage(objects, used);
	*overhead = 0;
	*total = sw(SW_LIMIT_BYTES) != 0 ? sw(SW_LIMIT_BYTES) : PLENTY;
	if (sw(SW_LIMIT_BYTES) == 0 && sw(SW_LIMIT_OBJECTS) != 0) /* a limit of objects is shown as room for as many of 1,000 bytes */
		*total = 1000UL * sw(SW_LIMIT_OBJECTS), *used = 1000UL * *objects;
	*left = *used < *total ? *total - *used : 0;
	return leave_slot(function, CKR_OK);
}

EXPORT CK_RV CA_GetTokenStorageInformation(CK_SLOT_ID slot, NP overhead, NP total, NP used, NP left, NP objects)
{
	return give_storage("CA_GetTokenStorageInformation", slot, overhead, total, used, left, objects);
}

EXPORT CK_RV CA_GetContainerStorageInformation(CK_SLOT_ID slot, N container, NP overhead, NP total, NP used, NP left, NP objects)
{
	return container > 1 ? CKR_ARGUMENTS_BAD
	                     : give_storage("CA_GetContainerStorageInformation", slot, overhead, total, used, left, objects);
}

/* Application ID, container number and authentication level of a session. */
static CK_RV do_CA_GetSessionInfo(struct session *s, NP hi, NP lo, NP container, NP level)
{
	(void)s;
	if (hi == NULL || lo == NULL || container == NULL || level == NULL)
		return CKR_ARGUMENTS_BAD;
	*hi = 0, *lo = 0, *container = 1, *level = role();
	return CKR_OK;
}
CA_CALL(CA_GetSessionInfo, READ, (S h, NP hi, NP lo, NP container, NP level), (s, hi, lo, container, level))
