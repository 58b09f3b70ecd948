/* What a test does to the HSM: faults of calls, and what befalls all of it. */
#include "sim.h"

static uint32_t power; /* the power cycles that this process has seen */

static struct fault *take(uint32_t what, const char *function, S h)
{
	return fault_take(state->faults, FAULTS, what, function, h != 0);
}

/* Whether anybody is let in: a partition that needs a PED has to be activated, which policy 22 allows (row 27). */
int activated(void) { return sw(SW_ACTIVATED) && (!sw(SW_MFA) || allows(state->token_policy, ACTIVATION)); }

/* What has happened to the HSM since the last call. */
static CK_RV look_at_hsm(void)
{
	if (sw(SW_TAMPERED))
		return CKR_HSM_TAMPERED; /* for everything: row "permanent" of section 3 */
	uint32_t cycles = sw(SW_POWER);
	if (__atomic_exchange_n(&power, cycles, __ATOMIC_ACQ_REL) != cycles)
		lose_sessions();
	if (!activated())
		put_out();
	return CKR_OK;
}

/* Does what is to be done before a call. An answer other than CKR_OK is the call's. */
CK_RV enter(const char *function, S h)
{
	if (state == NULL)
		return CKR_CRYPTOKI_NOT_INITIALIZED;
	struct fault *f = take(HANG, function, h);
	while (f != NULL && __atomic_load_n(&f->arg, __ATOMIC_ACQUIRE) != 0)
		nap(2);
	if ((f = take(SLEEP, function, h)) != NULL)
		nap(f->arg);
	if (take(CLOSE, function, h) != NULL)
		lose_sessions();
	if (h != 0 && take(LOGOUT, function, h) != NULL)
		put_out();
	if ((f = take(ANSWER, function, h)) != NULL)
		return f->arg;
	return look_at_hsm();
}

/* The answer of a call that was carried out may get lost on its way. */
CK_RV leave(const char *function, CK_RV rv)
{
	struct fault *f = take(LOSE, function, 0);
	return f != NULL ? f->arg : rv;
}
