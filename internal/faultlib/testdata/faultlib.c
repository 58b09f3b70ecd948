/*
 * A PKCS#11 library that misbehaves when it is told to. It stands before a real one
 * (REAL, given to the compiler), hands every call on, and carries out the faults that
 * are written in the file beside it, named as this library with ".ctl" behind it.
 *
 * The file is an array of struct fault. It is mapped, so a look at it costs nothing,
 * and a fault is taken once even when many processes use the library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "fault.h"
#include "pkcs11go.h"

/* ANSWER: arg is the return value; SLEEP, OCCUPY: milliseconds; HANG: 1 while it lasts */
enum { CLOSE = 1, LOGOUT, ANSWER, HANG, SLEEP, EMPTY, OCCUPY };

#define FAULTS 16

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;
static struct fault *faults;
static CK_SLOT_ID slot; /* of the last session that was opened */

/*
 * Calls hold it for reading, and what takes sessions away for writing: the real
 * library does not survive that while a call uses them, and a real device has a lock
 * of its own there. What occupies the device holds it for writing too.
 */
static pthread_rwlock_t inside;

static struct fault *take(uint32_t what, const char *function, int session)
{
	return fault_take(faults, FAULTS, what, function, session);
}

/* Does what is to be done before a call. An answer other than CKR_OK is the call's. */
static CK_RV enter(const char *function, CK_SESSION_HANDLE session)
{
	struct fault *f = take(HANG, function, session != 0);
	while (f != NULL && __atomic_load_n(&f->arg, __ATOMIC_ACQUIRE) != 0)
		nap(2);
	if ((f = take(SLEEP, function, session != 0)) != NULL)
		nap(f->arg);
	if ((f = take(OCCUPY, function, session != 0)) != NULL) {
		pthread_rwlock_wrlock(&inside);
		nap(f->arg);
		pthread_rwlock_unlock(&inside);
	}
	if (take(CLOSE, function, session != 0) != NULL) {
		pthread_rwlock_wrlock(&inside);
		real->C_CloseAllSessions(slot);
		pthread_rwlock_unlock(&inside);
	}
	if (session != 0 && take(LOGOUT, function, 1) != NULL) {
		pthread_rwlock_wrlock(&inside);
		real->C_Logout(session);
		pthread_rwlock_unlock(&inside);
	}
	if ((f = take(ANSWER, function, session != 0)) != NULL)
		return f->arg;
	return CKR_OK;
}

/* Defines a function that hands the call on. */
#define PASS(name, session, parameters, arguments)          \
	static CK_RV my_##name parameters                       \
	{                                                       \
		CK_RV rv = enter(#name, session);                   \
		if (rv == CKR_OK) {                                 \
			pthread_rwlock_rdlock(&inside);                 \
			rv = real->name arguments;                      \
			pthread_rwlock_unlock(&inside);                 \
		}                                                   \
		return rv;                                          \
	}

typedef CK_SESSION_HANDLE S;
typedef CK_OBJECT_HANDLE O;
typedef CK_ATTRIBUTE_PTR A;
typedef CK_MECHANISM_PTR M;
typedef CK_BYTE_PTR B;
typedef CK_ULONG N;
typedef CK_ULONG_PTR NP;

PASS(C_Initialize, 0, (CK_VOID_PTR args), (args))
PASS(C_Finalize, 0, (CK_VOID_PTR reserved), (reserved))
PASS(C_CloseSession, s, (S s), (s))
PASS(C_GetSessionInfo, s, (S s, CK_SESSION_INFO_PTR i), (s, i))
PASS(C_Login, s, (S s, CK_USER_TYPE u, B pin, N n), (s, u, pin, n))
PASS(C_CreateObject, s, (S s, A a, N n, O *o), (s, a, n, o))
PASS(C_CopyObject, s, (S s, O from, A a, N n, O *o), (s, from, a, n, o))
PASS(C_DestroyObject, s, (S s, O o), (s, o))
PASS(C_GetAttributeValue, s, (S s, O o, A a, N n), (s, o, a, n))
PASS(C_SetAttributeValue, s, (S s, O o, A a, N n), (s, o, a, n))
PASS(C_FindObjectsInit, s, (S s, A a, N n), (s, a, n))
PASS(C_FindObjectsFinal, s, (S s), (s))
PASS(C_EncryptInit, s, (S s, M m, O k), (s, m, k))
PASS(C_Encrypt, s, (S s, B in, N n, B out, NP m), (s, in, n, out, m))
PASS(C_DecryptInit, s, (S s, M m, O k), (s, m, k))
PASS(C_Decrypt, s, (S s, B in, N n, B out, NP m), (s, in, n, out, m))
PASS(C_SignInit, s, (S s, M m, O k), (s, m, k))
PASS(C_Sign, s, (S s, B in, N n, B out, NP m), (s, in, n, out, m))
PASS(C_GenerateKey, s, (S s, M m, A a, N n, O *k), (s, m, a, n, k))
PASS(C_GenerateKeyPair, s, (S s, M m, A a, N n, A b, N l, O *p, O *q), (s, m, a, n, b, l, p, q))
PASS(C_WrapKey, s, (S s, M m, O w, O k, B out, NP n), (s, m, w, k, out, n))
PASS(C_UnwrapKey, s, (S s, M m, O w, B in, N n, A a, N l, O *k), (s, m, w, in, n, a, l, k))
PASS(C_GenerateRandom, s, (S s, B out, N n), (s, out, n))

static CK_RV my_C_OpenSession(CK_SLOT_ID id, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, S *s)
{
	CK_RV rv = enter("C_OpenSession", 0);
	if (rv == CKR_OK) {
		pthread_rwlock_rdlock(&inside);
		slot = id;
		rv = real->C_OpenSession(id, flags, app, notify, s);
		pthread_rwlock_unlock(&inside);
	}
	return rv;
}

static CK_RV my_C_FindObjects(S s, O *found, N most, NP n)
{
	CK_RV rv = enter("C_FindObjects", s);
	if (rv == CKR_OK && take(EMPTY, "C_FindObjects", 1) != NULL) {
		*n = 0;
		return CKR_OK;
	}
	if (rv == CKR_OK) {
		pthread_rwlock_rdlock(&inside);
		rv = real->C_FindObjects(s, found, most, n);
		pthread_rwlock_unlock(&inside);
	}
	return rv;
}

static int map(void)
{
	Dl_info self;
	char path[4096];
	if (dladdr(&list, &self) == 0)
		return 0;
	snprintf(path, sizeof path, "%s.ctl", self.dli_fname);
	int fd = open(path, O_RDWR);
	if (fd < 0)
		return 0;
	faults = mmap(NULL, FAULTS * sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return faults != MAP_FAILED;
}

static int load(void)
{
	void *lib = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList get = lib ? (CK_C_GetFunctionList)dlsym(lib, "C_GetFunctionList") : NULL;
	if (get == NULL || get(&real) != CKR_OK || !map())
		return 0;
	/* A steady stream of readers must not keep a fault waiting. */
	pthread_rwlockattr_t attr;
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&inside, &attr);

	list = *real;
#define TAKE(name) list.name = my_##name
	TAKE(C_Initialize), TAKE(C_Finalize), TAKE(C_OpenSession), TAKE(C_CloseSession);
	TAKE(C_GetSessionInfo), TAKE(C_Login), TAKE(C_CreateObject), TAKE(C_CopyObject);
	TAKE(C_DestroyObject), TAKE(C_GetAttributeValue), TAKE(C_SetAttributeValue);
	TAKE(C_FindObjectsInit), TAKE(C_FindObjects), TAKE(C_FindObjectsFinal);
	TAKE(C_EncryptInit), TAKE(C_Encrypt), TAKE(C_DecryptInit), TAKE(C_Decrypt);
	TAKE(C_SignInit), TAKE(C_Sign), TAKE(C_GenerateKey), TAKE(C_GenerateKeyPair);
	TAKE(C_WrapKey), TAKE(C_UnwrapKey), TAKE(C_GenerateRandom);
	return 1;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int loaded;

static void load_once(void) { loaded = load(); }

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	pthread_once(&once, load_once);
	if (!loaded)
		return CKR_GENERAL_ERROR;
	*out = &list;
	return CKR_OK;
}
