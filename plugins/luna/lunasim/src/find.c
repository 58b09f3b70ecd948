/* Searches. What this library answers itself, SoftHSM cannot search by. */
#include "sim.h"

#include <stdlib.h>

static int ours(CK_ATTRIBUTE_TYPE type)
{
	return type == CKA_LABEL || type == CKA_OUID || type == CKA_SENSITIVE || type == CKA_EXTRACTABLE ||
	       type == CKA_ALWAYS_SENSITIVE || type == CKA_NEVER_EXTRACTABLE || type == CKA_VALUE_LEN;
}

static void forget_find(struct find *f)
{
	for (N i = 0; i < f->n; i++)
		free(f->want[i].pValue);
	free(f->want);
	*f = (struct find){ NULL, 0 };
}

static CK_RV do_C_FindObjectsInit(struct session *s, A t, N n)
{
	CK_ATTRIBUTE rest[64];
	N m = 0;
	if ((t == NULL && n != 0) || n > 64)
		return CKR_ARGUMENTS_BAD;
	struct find find = { calloc(n + 1, sizeof(CK_ATTRIBUTE)), 0 };
	CK_RV rv = find.want == NULL ? CKR_HOST_MEMORY : CKR_OK;
	for (N i = 0; rv == CKR_OK && i < n; i++) {
		if (t[i].pValue == NULL && t[i].ulValueLen != 0)
			rv = CKR_ATTRIBUTE_VALUE_INVALID;
		else if (!ours(t[i].type))
			rest[m++] = t[i];
		else if (t[i].ulValueLen > 4096)
			rv = CKR_ATTRIBUTE_VALUE_INVALID;
		else {
			CK_ATTRIBUTE *a = &find.want[find.n++];
			*a = t[i];
			if ((a->pValue = calloc(1, a->ulValueLen + 1)) == NULL)
				rv = CKR_HOST_MEMORY;
			else if (a->ulValueLen > 0)
				memcpy(a->pValue, t[i].pValue, a->ulValueLen);
		}
	}
	if (rv == CKR_OK)
		rv = real->C_FindObjectsInit(s->h, rest, m);
	if (rv != CKR_OK) {
		forget_find(&find);
		return rv;
	}
	forget_find(&s->find);
	s->find = find;
	return CKR_OK;
}
CALL(C_FindObjectsInit, READ, (S h, A t, N n), (s, t, n))

static int matches(S h, O o, const struct find *f)
{
	for (N i = 0; i < f->n; i++) {
		unsigned char value[4096];
		CK_ATTRIBUTE a = { f->want[i].type, value, sizeof value };
		if (attributes(h, o, &a, 1) != CKR_OK || a.ulValueLen != f->want[i].ulValueLen ||
		    memcmp(value, f->want[i].pValue, a.ulValueLen) != 0)
			return 0;
	}
	return 1;
}

static CK_RV do_C_FindObjects(struct session *s, O *out, N most, NP n)
{
	if (out == NULL || n == NULL)
		return CKR_ARGUMENTS_BAD;
	*n = 0;
	while (*n < most) {
		N got = 0;
		CK_RV rv = real->C_FindObjects(s->h, out + *n, most - *n, &got);
		if (rv != CKR_OK)
			return rv;
		if (got == 0)
			break;
		N kept = *n;
		for (N i = 0; i < got; i++)
			if (matches(s->h, out[*n + i], &s->find))
				out[kept++] = out[*n + i];
		*n = kept;
	}
	return CKR_OK;
}
CALL(C_FindObjects, READ, (S h, O *out, N most, NP n), (s, out, most, n))

static CK_RV do_C_FindObjectsFinal(struct session *s)
{
	forget_find(&s->find);
	return real->C_FindObjectsFinal(s->h);
}
CALL(C_FindObjectsFinal, READ, (S h), (s))

/*
 * OUIDs by handle: SoftHSM gives no handle twice between C_Initialize and C_Finalize, and
 * no object changes its OUID. Without it every search would read every label. Guarded by
 * the lock for writing.
 */
static struct { O handle; unsigned char ouid[OUID_SIZE]; } known[1 << 14];

void forget_handles(void) { memset(known, 0, sizeof known); }

static const unsigned char *ouid_of(S h, O o)
{
	struct tail tail;
	N at = o % (sizeof known / sizeof *known);
	if (known[at].handle != o) {
		if (read_tail(h, o, &tail, NULL, NULL) != CKR_OK)
			return NULL;
		known[at].handle = o;
		memcpy(known[at].ouid, tail.ouid, OUID_SIZE);
	}
	return known[at].ouid;
}

/* Finds a token object by its OUID; 0 where there is none. The lock is held for writing. */
CK_RV by_ouid(S h, const unsigned char *ouid, O *found)
{
	CK_BBOOL yes = CK_TRUE;
	CK_ATTRIBUTE token = { CKA_TOKEN, &yes, sizeof yes };
	*found = 0;
	CK_RV rv = real->C_FindObjectsInit(h, &token, 1);
	while (rv == CKR_OK) {
		O some[64];
		N n = 0;
		rv = real->C_FindObjects(h, some, 64, &n);
		if (rv != CKR_OK || n == 0)
			break;
		for (N i = 0; i < n && *found == 0; i++) {
			const unsigned char *has = ouid_of(h, some[i]);
			if (has != NULL && memcmp(has, ouid, OUID_SIZE) == 0)
				*found = some[i];
		}
	}
	real->C_FindObjectsFinal(h);
	return rv;
}

/*
 * OUIDs by handle and handles by OUID (section 5.2). There is one container in a slot.
 * Element types are the library's, where CK_CRYPTOKI_ELEMENT is 0 (trap in section 5.3).
 */
static CK_RV slot_engine(const char *function, CK_SLOT_ID slot, struct engine *e)
{
	CK_RV rv = enter(function, 0);
	if (rv != CKR_OK)
		return rv;
	hold_all(WRITE);
	rv = initialised ? check_slot(slot) : CKR_CRYPTOKI_NOT_INITIALIZED;
	if (rv == CKR_OK && role() == NOBODY)
		rv = CKR_USER_NOT_LOGGED_IN;
	if (rv == CKR_OK)
		rv = engine_open(e);
	if (rv != CKR_OK)
		release_all();
	return rv;
}

static CK_RV uid_of(const char *function, CK_SLOT_ID slot, CK_ULONG type, CK_ULONG handle, CK_BYTE *ouid)
{
	struct engine e;
	CK_RV rv = ouid == NULL ? CKR_ARGUMENTS_BAD : slot_engine(function, slot, &e);
	if (rv != CKR_OK)
		return rv;
	struct tail tail;
	rv = type != CK_CRYPTOKI_ELEMENT ? CKR_OBJECT_TYPE_INVALID : read_tail(e.h, handle, &tail, NULL, NULL);
	if (rv == CKR_OK)
		memcpy(ouid, tail.ouid, OUID_SIZE);
	engine_close(&e);
	release_all();
	return leave(function, rv);
}

static CK_RV handle_of(const char *function, CK_SLOT_ID slot, const CK_BYTE *ouid, CK_ULONG *type, CK_ULONG *handle)
{
	struct engine e;
	CK_RV rv = ouid == NULL || type == NULL || handle == NULL ? CKR_ARGUMENTS_BAD : slot_engine(function, slot, &e);
	if (rv != CKR_OK)
		return rv;
	O found;
	if ((rv = by_ouid(e.h, ouid, &found)) == CKR_OK) {
		if (found == 0)
			rv = CKR_OBJECT_HANDLE_INVALID; /* guess */
		else
			*type = CK_CRYPTOKI_ELEMENT, *handle = found;
	}
	engine_close(&e);
	release_all();
	return leave(function, rv);
}

EXPORT CK_RV CA_GetObjectUID(CK_SLOT_ID slot, CK_ULONG container, CK_ULONG type, CK_ULONG handle, CK_BYTE *ouid)
{
	return container > 1 ? CKR_ARGUMENTS_BAD : uid_of("CA_GetObjectUID", slot, type, handle, ouid);
}

EXPORT CK_RV CA_GetObjectHandle(CK_SLOT_ID slot, CK_ULONG container, CK_BYTE *ouid, CK_ULONG *type, CK_ULONG *handle)
{
	return container > 1 ? CKR_ARGUMENTS_BAD : handle_of("CA_GetObjectHandle", slot, ouid, type, handle);
}

EXPORT CK_RV CA_GetTokenObjectUID(CK_SLOT_ID slot, CK_ULONG type, CK_ULONG handle, CK_BYTE *ouid)
{
	return uid_of("CA_GetTokenObjectUID", slot, type, handle, ouid);
}

EXPORT CK_RV CA_GetTokenObjectHandle(CK_SLOT_ID slot, CK_BYTE *ouid, CK_ULONG *type, CK_ULONG *handle)
{
	return handle_of("CA_GetTokenObjectHandle", slot, ouid, type, handle);
}
