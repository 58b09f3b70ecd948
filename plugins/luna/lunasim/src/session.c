/* Faults, sessions, logins and the lock around SoftHSM. */
#include "sim.h"

#include <stdlib.h>
#include <time.h>

/*
 * Calls hold inside for reading, and for writing what changes sessions, logins or objects:
 * SoftHSM 2.6.1 loses objects or crashes when one thread writes what another reads.
 *
 * The making of a key, which may take many seconds, holds living alone, so that nobody
 * waits for it but what ends sessions or logins, which holds both for writing.
 *
 * They are taken in the order living, inside, a session's own lock.
 */
static pthread_rwlock_t living, inside;
static pthread_once_t once = PTHREAD_ONCE_INIT;

int initialised; /* guarded by inside, as all below */
CK_SLOT_ID real_slot;
static struct session *sessions;
static enum role who;
static uint32_t power;   /* the power cycles that this process has seen */
static int own_appid;    /* it has chosen an application ID */

/* A steady stream of readers must not keep a writer waiting. */
static void make_lock(void)
{
	pthread_rwlockattr_t attr;
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&inside, &attr);
	pthread_rwlock_init(&living, &attr);
}

void hold_all(int how)
{
	pthread_once(&once, make_lock);
	if (how == WRITE)
		pthread_rwlock_wrlock(&inside);
	else
		pthread_rwlock_rdlock(&inside);
}

void release_all(void) { pthread_rwlock_unlock(&inside); }

void keep_sessions(void)
{
	pthread_once(&once, make_lock);
	pthread_rwlock_rdlock(&living);
}

void unkeep_sessions(void) { pthread_rwlock_unlock(&living); }

/* Waits for the keys that are being made, too. */
static void hold_everything(void)
{
	pthread_once(&once, make_lock);
	pthread_rwlock_wrlock(&living);
	hold_all(WRITE);
}

static void release_everything(void)
{
	release_all();
	pthread_rwlock_unlock(&living);
}

enum role role(void) { return who; }

static int taken(struct fault *f, uint32_t what, const char *function, int session)
{
	uint32_t n = __atomic_load_n(&f->left, __ATOMIC_ACQUIRE);
	if (n == 0 || f->what != what)
		return 0;
	if (strcmp(f->function, function) != 0 && (!session || strcmp(f->function, "*") != 0))
		return 0;
	uint32_t after = __atomic_load_n(&f->after, __ATOMIC_ACQUIRE);
	while (after != 0)
		if (__atomic_compare_exchange_n(&f->after, &after, after - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return 0;
	while (n != 0) {
		uint32_t next = n == FOREVER ? FOREVER : n - 1;
		if (__atomic_compare_exchange_n(&f->left, &n, next, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
			__atomic_add_fetch(&f->fired, 1, __ATOMIC_ACQ_REL);
			return 1;
		}
	}
	return 0;
}

static struct fault *take(uint32_t what, const char *function, S h)
{
	for (int i = 0; i < FAULTS; i++)
		if (taken(&state->faults[i], what, function, h != 0))
			return &state->faults[i];
	return NULL;
}

static void nap(uint32_t ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };
	while (nanosleep(&t, &t) != 0)
		;
}

static void forget(struct session *s)
{
	forget_tunnels(s->h);
	for (N i = 0; i < s->find.n; i++)
		free(s->find.want[i].pValue);
	free(s->find.want);
	pthread_mutex_destroy(&s->mu);
	free(s);
}

static void forget_all(void)
{
	while (sessions != NULL) {
		struct session *next = sessions->next;
		forget(sessions);
		sessions = next;
	}
	who = NOBODY;
}

static void lose_sessions(void)
{
	hold_everything();
	if (initialised) {
		real->C_CloseAllSessions(real_slot);
		forget_all();
	}
	release_everything();
}

static void put_out(void)
{
	hold_all(READ);
	int somebody = who != NOBODY;
	release_all();
	if (!somebody)
		return;
	hold_everything();
	if (initialised && who != NOBODY && sessions != NULL) {
		real->C_Logout(sessions->h);
		who = NOBODY;
	}
	release_everything();
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

/* Finds a session and keeps it and SoftHSM; NULL, and nothing kept, where there is none. */
struct session *hold(S h, int how, int vendor)
{
	hold_all(how);
	struct session *s = sessions;
	while (s != NULL && s->h != h)
		s = s->next;
	if (!initialised || s == NULL) {
		release_all();
		return NULL;
	}
	pthread_mutex_lock(&s->mu);
	if (!vendor && sw(SW_STRICT))
		s->transfer.phase = IDLE; /* section 5.1: "never mix phases" */
	return s;
}

CK_RV no_session(void)
{
	hold_all(READ);
	CK_RV rv = initialised ? CKR_SESSION_HANDLE_INVALID : CKR_CRYPTOKI_NOT_INITIALIZED;
	release_all();
	return rv;
}

void release(struct session *s)
{
	pthread_mutex_unlock(&s->mu);
	release_all();
}

CK_RV check_slot(CK_SLOT_ID slot)
{
	int virtual = sw(SW_HA_SLOT), only = virtual && sw(SW_HA_ONLY);
	return slot < (CK_SLOT_ID)(virtual && !only ? 2 : 1) ? CKR_OK : CKR_SLOT_ID_INVALID;
}

EXPORT CK_RV C_Initialize(CK_VOID_PTR args)
{
	(void)args;
	CK_RV rv = open_partition();
	if (rv == CKR_OK)
		rv = enter("C_Initialize", 0);
	if (rv != CKR_OK)
		return rv;
	hold_all(WRITE);
	if (initialised)
		rv = CKR_CRYPTOKI_ALREADY_INITIALIZED;
	else
		initialised = (rv = start_softhsm(&real_slot)) == CKR_OK;
	release_all();
	return leave("C_Initialize", rv);
}

EXPORT CK_RV C_Finalize(CK_VOID_PTR reserved)
{
	CK_RV rv = reserved != NULL ? CKR_ARGUMENTS_BAD : enter("C_Finalize", 0);
	if (rv != CKR_OK && rv != CKR_HSM_TAMPERED) /* a tampered HSM keeps nobody from leaving: guess */
		return rv;
	hold_everything();
	rv = CKR_CRYPTOKI_NOT_INITIALIZED;
	if (initialised) {
		forget_all();
		forget_handles();
		rv = real->C_Finalize(NULL);
		initialised = own_appid = 0;
	}
	release_everything();
	return leave("C_Finalize", rv);
}

EXPORT CK_RV C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, S *out)
{
	(void)app, (void)notify;
	CK_RV rv = enter("C_OpenSession", 0);
	if (rv != CKR_OK)
		return rv;
	if (out == NULL)
		return CKR_ARGUMENTS_BAD;
	hold_all(WRITE);
	if (!initialised)
		rv = CKR_CRYPTOKI_NOT_INITIALIZED;
	else if ((rv = check_slot(slot)) == CKR_OK && (rv = real->C_OpenSession(real_slot, flags, NULL, NULL, out)) == CKR_OK) {
		struct session *s = calloc(1, sizeof *s);
		if (s == NULL) {
			real->C_CloseSession(*out);
			rv = CKR_HOST_MEMORY;
		} else {
			s->h = *out, s->slot = slot, s->next = sessions;
			pthread_mutex_init(&s->mu, NULL);
			sessions = s;
		}
	}
	release_all();
	return leave("C_OpenSession", rv);
}

EXPORT CK_RV C_CloseSession(S h)
{
	CK_RV rv = enter("C_CloseSession", h);
	if (rv != CKR_OK)
		return rv;
	hold_everything();
	struct session **at = &sessions;
	while (*at != NULL && (*at)->h != h)
		at = &(*at)->next;
	if (*at == NULL || !initialised)
		rv = initialised ? CKR_SESSION_HANDLE_INVALID : CKR_CRYPTOKI_NOT_INITIALIZED;
	else {
		struct session *s = *at;
		*at = s->next;
		forget(s);
		rv = real->C_CloseSession(h);
		if (sessions == NULL)
			who = NOBODY; /* PKCS#11 2.40 section 5.6: the last session takes the login along */
	}
	release_everything();
	return leave("C_CloseSession", rv);
}

EXPORT CK_RV C_CloseAllSessions(CK_SLOT_ID slot)
{
	CK_RV rv = enter("C_CloseAllSessions", 0);
	if (rv == CKR_OK)
		rv = check_slot(slot);
	if (rv == CKR_OK)
		lose_sessions();
	return rv;
}

static CK_RV do_C_GetSessionInfo(struct session *s, CK_SESSION_INFO_PTR info)
{
	if (info == NULL)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = real->C_GetSessionInfo(s->h, info);
	info->slotID = s->slot;
	return rv;
}
CALL(C_GetSessionInfo, READ, (S h, CK_SESSION_INFO_PTR i), (s, i))

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
