/* Roles: who is logged in, who may be, and what each may do. */
#include "sim.h"

static enum role who; /* guarded by the lock, as own_appid */
static int own_appid; /* this process has chosen an application ID */

enum role role(void) { return who; }

void forget_login(void) { who = NOBODY; }

void forget_appid(void) { own_appid = 0; }

/* Looks at the PIN and counts the wrong ones in the partition, for every process (P: CA_GetContainerStatus). */
static CK_RV check_pin(int user, const unsigned char *pin, N n)
{
	const char *right = state->pin[user];
	uint32_t limit = sw(SW_LOGIN_LIMIT);
	if (right[0] == 0)
		return CKR_USER_PIN_NOT_INITIALIZED;
	if (__atomic_load_n(&state->failed[user], __ATOMIC_ACQUIRE) >= limit)
		return CKR_PIN_LOCKED;
	if (pin == NULL || n != strlen(right) || memcmp(pin, right, n) != 0) {
		__atomic_add_fetch(&state->failed[user], 1, __ATOMIC_ACQ_REL);
		return CKR_PIN_INCORRECT;
	}
	__atomic_store_n(&state->failed[user], 0, __ATOMIC_RELEASE);
	return CKR_OK;
}

static CK_RV log_in(struct session *s, enum role as)
{
	int fd = lock_partition();
	CK_RV rv = real->C_Login(s->h, CKU_USER, (B)token_pin, strlen(token_pin));
	unlock_partition(fd);
	if (rv == CKR_OK)
		who = as;
	return rv;
}

static CK_RV do_C_Login(struct session *s, CK_USER_TYPE user, B pin, N n)
{
	if (user != CKU_USER && user != CKU_LIMITED_USER)
		return CKR_USER_TYPE_INVALID;
	if (!activated())
		return sw(SW_DEACTIVATED_CODE);
	enum role as = user == CKU_USER ? OFFICER : USER;
	if (who != NOBODY)
		return who == as ? CKR_USER_ALREADY_LOGGED_IN : CKR_USER_ANOTHER_ALREADY_LOGGED_IN;
	if (sw(SW_APPID_SHARED) && !own_appid) { /* D-appid: the login of the other process is ours, whatever the PIN */
		CK_RV rv = log_in(s, as);
		return rv == CKR_OK ? CKR_USER_ALREADY_LOGGED_IN : rv;
	}
	CK_RV rv = check_pin(as == USER, pin, n);
	return rv == CKR_OK ? log_in(s, as) : rv;
}
CALL(C_Login, WRITE, (S h, CK_USER_TYPE u, B pin, N n), (s, u, pin, n))

EXPORT CK_RV C_Logout(S h)
{
	CK_RV rv = enter("C_Logout", h);
	if (rv != CKR_OK)
		return rv;
	hold_everything();
	rv = initialised ? real->C_Logout(h) : CKR_CRYPTOKI_NOT_INITIALIZED;
	if (rv == CKR_OK)
		who = NOBODY;
	release_everything();
	return leave("C_Logout", rv);
}

static CK_RV choose_appid(const char *function)
{
	CK_RV rv = enter(function, 0);
	if (rv == CKR_OK) {
		hold_all(WRITE);
		own_appid = 1;
		release_all();
	}
	return leave(function, rv);
}

EXPORT CK_RV CA_SetApplicationID(CK_ULONG hi, CK_ULONG lo)
{
	(void)hi, (void)lo;
	return choose_appid("CA_SetApplicationID");
}

EXPORT CK_RV CA_RandomizeApplicationID(void) { return choose_appid("CA_RandomizeApplicationID"); }

CK_RV officer_only(void)
{
	if (who == NOBODY)
		return CKR_USER_NOT_LOGGED_IN;
	return who == OFFICER ? CKR_OK : CKR_USER_NOT_AUTHORIZED;
}

CK_RV may_make(int token)
{
	if (who == USER && !token && sw(SW_CU_SESSION_OBJECTS))
		return CKR_OK;
	return officer_only();
}
