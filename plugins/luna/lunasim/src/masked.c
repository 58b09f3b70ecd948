/*
 * SIM: keys masked under the partition's SIM masking key (SMK) and kept outside, as long
 * as anybody likes. A blob goes in as often as it is wanted, wherever the same SMK is.
 */
#include "sim.h"

#include <stdlib.h>

enum { MASKED = 1, SIM_VERSION = 1 };

/* Row 36: SIM is a kind of partition of its own; policies 3 and 7 say which keys. */
static CK_RV may_mask(CK_OBJECT_CLASS class)
{
	if (class == CKO_PRIVATE_KEY)
		return allows(state->token_policy, PRIVATE_MASKING) ? CKR_OK : CKR_OPERATION_NOT_ALLOWED;
	return allows(state->token_policy, SECRET_MASKING) ? CKR_OK : CKR_OPERATION_NOT_ALLOWED;
}

static CK_RV ready(struct engine *e)
{
	CK_RV rv = officer_only();
	if (rv == CKR_OK && !allows(state->token_policy, PRIVATE_MASKING) && !allows(state->token_policy, SECRET_MASKING))
		rv = CKR_OPERATION_NOT_ALLOWED;
	if (rv == CKR_OK && sw(SW_SMK) == 0)
		rv = CKR_SMK_ID_NOT_FOUND;
	return rv == CKR_OK ? engine_open(e) : rv;
}

static CK_RV masking_key(struct engine *e, uint32_t smk, unsigned char key[32])
{
	static const char root[] = "lunasim SIM masking key";
	return hmac(e, root, sizeof root, &(struct part){ &smk, sizeof smk }, 1, key);
}

/* Lists every key there is, which a count of zero means (H15). */
static CK_RV all_keys(S h, O *out, N *n)
{
	CK_BBOOL yes = CK_TRUE;
	CK_ATTRIBUTE token = { CKA_TOKEN, &yes, sizeof yes };
	N got = MAX_SIM_OBJECTS, kept = 0;
	CK_RV rv = real->C_FindObjectsInit(h, &token, 1);
	if (rv == CKR_OK)
		rv = real->C_FindObjects(h, out, MAX_SIM_OBJECTS, &got);
	real->C_FindObjectsFinal(h);
	for (N i = 0; rv == CKR_OK && i < got; i++) {
		struct tail tail;
		if (read_tail(h, out[i], &tail, NULL, NULL) == CKR_OK && (tail.flags & MANAGED))
			out[kept++] = out[i];
	}
	*n = kept;
	return rv;
}

static CK_RV mask(struct engine *e, S h, const O *keys, N n, struct buf *out)
{
	struct buf body = { NULL, 0, 0, 0 };
	unsigned char key[32];
	uint32_t smk = sw(SW_SMK);
	CK_RV rv = masking_key(e, smk, key);
	put32(&body, SIM_VERSION);
	put32(&body, smk);
	put32(&body, (uint32_t)n);
	for (N i = 0; rv == CKR_OK && i < n; i++) {
		CK_OBJECT_CLASS class;
		if ((rv = class_of(h, keys[i], &class)) == CKR_OK && (rv = may_mask(class)) == CKR_OK)
			rv = seal(e, key, h, keys[i], &body);
	}
	if (rv == CKR_OK)
		rv = frame(e, SIM, MASKED, &body, out);
	wipe(&body);
	return rv;
}

static CK_RV do_CA_SIMExtract(struct session *s, N n, const O *keys, N form, CK_BBOOL remove, NP size, B out)
{
	struct engine e;
	struct buf made = { NULL, 0, 0, 0 };
	O *list = NULL;
	if (size == NULL || (keys == NULL && n != 0) || n > MAX_SIM_OBJECTS)
		return CKR_ARGUMENTS_BAD;
	if (form != CKA_SIM_NO_AUTHORIZATION)
		return CKR_SIM_AUTHFORM_INVALID;
	CK_RV rv = ready(&e);
	if (rv != CKR_OK)
		return rv;
	if ((list = calloc(MAX_SIM_OBJECTS, sizeof *list)) == NULL)
		rv = CKR_HOST_MEMORY;
	else if (n == 0)
		rv = all_keys(e.h, list, &n);
	else
		memcpy(list, keys, n * sizeof *list);
	if (rv == CKR_OK && (rv = mask(&e, s->h, list, n, &made)) == CKR_OK && (rv = deliver(&made, out, size)) == CKR_OK)
		for (N i = 0; remove && out != NULL && i < n; i++) /* LS asks for the length with TRUE, and keeps its keys */
			real->C_DestroyObject(s->h, list[i]);
	free(list);
	wipe(&made);
	engine_close(&e);
	return rv;
}
CA_CALL(CA_SIMExtract, WRITE,
	(S h, N n, O *keys, N secrets UNUSED, N subset UNUSED, N form, NP sizes UNUSED, B *values UNUSED, CK_BBOOL remove, NP size, B out),
	(s, n, keys, form, remove, size, out))

/* Opens a blob and makes its keys, all or none. */
static CK_RV unmask(struct engine *e, S h, struct reader *r, uint32_t n, O *made)
{
	const struct how how = { 1, CKR_SIM_CORRUPT_DATA, may_mask };
	unsigned char key[32];
	uint32_t done = 0;
	CK_RV rv = masking_key(e, sw(SW_SMK), key);
	while (rv == CKR_OK && done < n && (rv = unseal(e, key, r, &how, h, &made[done])) == CKR_OK)
		done++;
	while (rv != CKR_OK && done > 0)
		real->C_DestroyObject(h, made[--done]);
	return rv;
}

static CK_RV do_CA_SIMInsert(struct session *s, N form, N size, B blob, NP n, O *out)
{
	struct engine e;
	struct reader r;
	if (blob == NULL || n == NULL)
		return CKR_ARGUMENTS_BAD;
	if (form != CKA_SIM_NO_AUTHORIZATION)
		return CKR_SIM_AUTHFORM_INVALID;
	CK_RV rv = ready(&e);
	if (rv != CKR_OK)
		return rv;
	if ((rv = unframe(&e, SIM, MASKED, blob, size, &r)) == CKR_DATA_INVALID)
		rv = CKR_SIM_CORRUPT_DATA;
	uint32_t version = 0, smk = 0, count = 0;
	if (rv == CKR_OK)
		version = get32(&r), smk = get32(&r), count = get32(&r);
	if (rv == CKR_OK && (r.bad || version != SIM_VERSION || count > MAX_SIM_OBJECTS))
		rv = CKR_SIM_CORRUPT_DATA;
	if (rv == CKR_OK && smk != sw(SW_SMK))
		rv = CKR_SMK_ID_NOT_FOUND;
	if (rv == CKR_OK) {
		N have = *n;
		*n = count;
		if (out != NULL)
			rv = have < count ? CKR_BUFFER_TOO_SMALL : unmask(&e, s->h, &r, count, out);
	}
	engine_close(&e);
	return rv;
}
CA_CALL(CA_SIMInsert, WRITE,
	(S h, N subset UNUSED, N form, NP sizes UNUSED, B *values UNUSED, N size, B blob, NP n, O *out), (s, form, size, blob, n, out))
