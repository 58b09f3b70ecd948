/* The lock around SoftHSM, the library's beginning and end, and sessions. */
#include "sim.h"

#include <stdlib.h>

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
void hold_everything(void)
{
	pthread_once(&once, make_lock);
	pthread_rwlock_wrlock(&living);
	hold_all(WRITE);
}

void release_everything(void)
{
	release_all();
	pthread_rwlock_unlock(&living);
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
	forget_login();
}

void lose_sessions(void)
{
	hold_everything();
	if (initialised) {
		real->C_CloseAllSessions(real_slot);
		forget_all();
	}
	release_everything();
}

void put_out(void)
{
	hold_all(READ);
	int somebody = role() != NOBODY;
	release_all();
	if (!somebody)
		return;
	hold_everything();
	if (initialised && role() != NOBODY && sessions != NULL) {
		real->C_Logout(sessions->h);
		forget_login();
	}
	release_everything();
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
	else if ((rv = start_softhsm(&real_slot)) == CKR_OK) {
		initialised = 1;
		remember_policies();
	}
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
		forget_appid();
		initialised = 0;
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
			forget_login(); /* PKCS#11 2.40 section 5.6: the last session takes the login along */
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
