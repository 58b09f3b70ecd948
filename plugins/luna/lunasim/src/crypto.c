/* SHA-256, HMAC and random bytes, made by SoftHSM in a session that no caller sees. */
#include "sim.h"

#include <string.h>

CK_RV engine_open(struct engine *e)
{
	return real->C_OpenSession(real_slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &e->h);
}

void engine_close(struct engine *e) { real->C_CloseSession(e->h); }

CK_RV random_bytes(struct engine *e, void *p, size_t n) { return real->C_GenerateRandom(e->h, p, n); }

static CK_RV hash(struct engine *e, const struct part *parts, int n, unsigned char out[32])
{
	CK_MECHANISM sha256 = { CKM_SHA256, NULL, 0 };
	N len = 32;
	CK_RV rv = real->C_DigestInit(e->h, &sha256);
	for (int i = 0; rv == CKR_OK && i < n; i++)
		if (parts[i].n > 0)
			rv = real->C_DigestUpdate(e->h, (B)parts[i].p, parts[i].n);
	return rv == CKR_OK ? real->C_DigestFinal(e->h, out, &len) : rv;
}

CK_RV digest(struct engine *e, const void *p, size_t n, unsigned char out[32])
{
	return hash(e, &(struct part){ p, n }, 1, out);
}

/* HMAC-SHA256 (RFC 2104) over parts, at most six, each with its length before it. */
CK_RV hmac(struct engine *e, const void *key, size_t key_len, const struct part *parts, int n, unsigned char out[32])
{
	unsigned char pad[64] = { 0 }, inner[32];
	struct part all[13];
	uint32_t lengths[6];
	int m = 0;
	if (key_len > sizeof pad || n > 6)
		return CKR_GENERAL_ERROR;
	memcpy(pad, key, key_len);
	for (size_t i = 0; i < sizeof pad; i++)
		pad[i] ^= 0x36;
	all[m++] = (struct part){ pad, sizeof pad };
	for (int i = 0; i < n; i++) {
		lengths[i] = (uint32_t)parts[i].n;
		all[m++] = (struct part){ &lengths[i], sizeof lengths[i] };
		all[m++] = parts[i];
	}
	CK_RV rv = hash(e, all, m, inner);
	for (size_t i = 0; i < sizeof pad; i++)
		pad[i] ^= 0x36 ^ 0x5c;
	if (rv == CKR_OK)
		rv = hash(e, (struct part[]){ { pad, sizeof pad }, { inner, sizeof inner } }, 2, out);
	return rv;
}

/* A key that all partitions of a domain derive alike, for one use and one transfer. */
CK_RV domain_key(struct engine *e, int which, const char *use, const struct part *parts, int n, unsigned char out[32])
{
	struct part all[6] = { { use, strlen(use) } };
	const char *domain = state->domain[which];
	if (domain[0] == 0)
		return CKR_CLONING_PARAMETER_MISSING;
	for (int i = 0; i < n && i < 5; i++)
		all[i + 1] = parts[i];
	return hmac(e, domain, strlen(domain), all, n + 1, out);
}
