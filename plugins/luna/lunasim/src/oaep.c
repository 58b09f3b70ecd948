/*
 * RSA-OAEP with the SHA-2 hashes, which a Luna has and SoftHSM 2.6.1 has not: a raw private
 * operation of SoftHSM's, and the padding taken off here (RFC 8017, section 7.1.2). It takes
 * the time that it takes; a real HSM must not.
 */
#include "sim.h"

enum { MODULUS = 512 };

static N digest_size(CK_MECHANISM_TYPE hash) { return hash == CKM_SHA256 ? 32 : hash == CKM_SHA384 ? 48 : hash == CKM_SHA512 ? 64 : 0; }

CK_RV oaep_init(struct session *s, M mech, O key)
{
	const CK_RSA_PKCS_OAEP_PARAMS *p = mech->pParameter;
	if (p == NULL || mech->ulParameterLen != sizeof *p || p->ulSourceDataLen != 0)
		return CKR_MECHANISM_PARAM_INVALID;
	if (digest_size(p->hashAlg) == 0) /* SHA-1 is SoftHSM's own */
		return real->C_DecryptInit(s->h, mech, key);
	CK_RV rv = real->C_DecryptInit(s->h, &(CK_MECHANISM){ CKM_RSA_X_509, NULL, 0 }, key);
	s->oaep = rv == CKR_OK ? p->hashAlg : 0;
	return rv;
}

/* Xors MGF1 of a seed into out (appendix B.2.1). */
static CK_RV mask(S h, CK_MECHANISM_TYPE hash, const unsigned char *seed, N seed_len, unsigned char *out, N len)
{
	unsigned char sum[64], text[MODULUS + 4];
	N size = digest_size(hash);
	memcpy(text, seed, seed_len);
	for (N at = 0, block = 0; at < len; at += size, block++) {
		N n = sizeof sum;
		const unsigned char counter[4] = { 0, 0, (unsigned char)(block >> 8), (unsigned char)block };
		memcpy(text + seed_len, counter, 4);
		CK_MECHANISM m = { hash, NULL, 0 };
		CK_RV rv = real->C_DigestInit(h, &m);
		if (rv != CKR_OK || (rv = real->C_Digest(h, text, seed_len + 4, sum, &n)) != CKR_OK)
			return rv;
		for (N i = 0; i < size && at + i < len; i++)
			out[at + i] ^= sum[i];
	}
	return CKR_OK;
}

/* Takes the padding off a block, from which *message and *len are then a part. */
static CK_RV unpad(S h, CK_MECHANISM_TYPE hash, unsigned char *block, N size, unsigned char **message, N *len)
{
	unsigned char empty[64];
	N n = digest_size(hash), sum = sizeof empty, at = 2 * n + 1;
	CK_MECHANISM m = { hash, NULL, 0 };
	CK_RV rv;
	if (size < 2 * n + 2)
		return CKR_ENCRYPTED_DATA_INVALID;
	unsigned char *seed = block + 1, *data = block + 1 + n;
	if ((rv = mask(h, hash, data, size - n - 1, seed, n)) != CKR_OK || (rv = mask(h, hash, seed, n, data, size - n - 1)) != CKR_OK ||
	    (rv = real->C_DigestInit(h, &m)) != CKR_OK || (rv = real->C_Digest(h, block, 0, empty, &sum)) != CKR_OK)
		return rv;
	while (at < size && block[at] == 0)
		at++;
	if (block[0] != 0 || memcmp(data, empty, n) != 0 || at == size || block[at] != 1)
		return CKR_ENCRYPTED_DATA_INVALID;
	*message = block + at + 1, *len = size - at - 1;
	return CKR_OK;
}

CK_RV oaep_decrypt(struct session *s, B in, N in_len, B out, NP n)
{
	unsigned char raw[MODULUS], block[MODULUS] = { 0 }, *message;
	N size = sizeof raw, len, room = *n;
	struct engine e;
	if (in_len > MODULUS)
		return CKR_ENCRYPTED_DATA_LEN_RANGE;
	if (out == NULL || room < in_len) { /* the message is shorter, but nobody knows by how much */
		*n = in_len;
		return out == NULL ? CKR_OK : CKR_BUFFER_TOO_SMALL;
	}
	CK_MECHANISM_TYPE hash = s->oaep;
	s->oaep = 0;
	CK_RV rv = real->C_Decrypt(s->h, in, in_len, raw, &size);
	if (rv != CKR_OK || (rv = engine_open(&e)) != CKR_OK)
		return rv;
	memcpy(block + in_len - size, raw, size); /* a library may leave leading zeros out */
	if ((rv = unpad(e.h, hash, block, in_len, &message, &len)) == CKR_OK)
		memcpy(out, message, *n = len);
	engine_close(&e);
	explicit_bzero(raw, sizeof raw);
	explicit_bzero(block, sizeof block);
	return rv;
}
