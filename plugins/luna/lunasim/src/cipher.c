/* Commands with keys: handed on, but for the IVs that a Luna chooses itself. */
#include "sim.h"

/* How IVs of AES-GCM come about now: in FIPS mode the HSM makes and appends them, unless a test says otherwise. */
static uint32_t gcm_mode(void)
{
	uint32_t mode = sw(SW_GCM_IV);
	return mode != GCM_AUTO ? mode : fips() ? GCM_APPENDED : GCM_CALLER;
}

/* Starts an encryption with an IV of the HSM's own. */
static CK_RV own_iv(struct session *s, const CK_GCM_PARAMS *asked, uint32_t mode, O key)
{
	unsigned char iv[16];
	CK_GCM_PARAMS params = *asked;
	N len = mode == GCM_PARAMS ? sw(SW_GCM_IV_LEN) : sizeof iv;
	if (len > sizeof iv || (mode == GCM_PARAMS && (asked->pIv == NULL || asked->ulIvLen < len)))
		return CKR_MECHANISM_PARAM_INVALID;
	if (mode == GCM_REFUSED && asked->pIv != NULL && asked->ulIvLen != 0)
		return CKR_MECHANISM_PARAM_INVALID;
	CK_RV rv = real->C_GenerateRandom(s->h, iv, len);
	if (rv != CKR_OK)
		return rv;
	params.pIv = iv, params.ulIvLen = len, params.ulIvBits = 8 * len;
	CK_MECHANISM mech = { CKM_AES_GCM, &params, sizeof params };
	if ((rv = real->C_EncryptInit(s->h, &mech, key)) != CKR_OK)
		return rv;
	if (mode == GCM_PARAMS)
		memcpy(asked->pIv, iv, len);
	else
		memcpy(s->iv, iv, s->iv_len = len);
	return CKR_OK;
}

static CK_RV do_C_EncryptInit(struct session *s, M mech, O key)
{
	uint32_t mode = gcm_mode();
	if (mech == NULL)
		return CKR_ARGUMENTS_BAD;
	if (mech->mechanism != CKM_AES_GCM || mode == GCM_CALLER)
		s->iv_len = 0;
	else if (mech->pParameter == NULL || mech->ulParameterLen != sizeof(CK_GCM_PARAMS))
		return CKR_MECHANISM_PARAM_INVALID;
	else
		return own_iv(s, mech->pParameter, mode, key);
	return real->C_EncryptInit(s->h, mech, key);
}
CALL(C_EncryptInit, READ, (S h, M m, O k), (s, m, k))

/* Ciphertext, tag, then the IV (Thales, CKM_AES_GCM). */
static CK_RV do_C_Encrypt(struct session *s, B in, N len, B out, NP n)
{
	if (n == NULL)
		return CKR_ARGUMENTS_BAD;
	if (s->iv_len == 0)
		return real->C_Encrypt(s->h, in, len, out, n);
	N size = 0, room = *n;
	CK_RV rv = real->C_Encrypt(s->h, in, len, NULL, &size);
	if (rv != CKR_OK)
		return rv;
	*n = size + s->iv_len;
	if (out == NULL)
		return CKR_OK;
	if (room < *n)
		return CKR_BUFFER_TOO_SMALL;
	size = room - s->iv_len;
	if ((rv = real->C_Encrypt(s->h, in, len, out, &size)) == CKR_OK) {
		memcpy(out + size, s->iv, s->iv_len);
		*n = size + s->iv_len;
	}
	s->iv_len = 0;
	return rv;
}
CALL(C_Encrypt, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))

/* An IV is appended to an encryption in one part only (guess; nothing was found on many parts). */
static CK_RV do_C_EncryptUpdate(struct session *s, B in, N len, B out, NP n)
{
	return s->iv_len != 0 ? CKR_FUNCTION_NOT_SUPPORTED : real->C_EncryptUpdate(s->h, in, len, out, n);
}
CALL(C_EncryptUpdate, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))

/* Defines a function that hands the call on. */
#define PASS(name, parameters, arguments)                                       \
	static CK_RV do_##name parameters { return real->name arguments; }

PASS(C_EncryptFinal, (struct session *s, B out, NP n), (s->h, out, n))
CALL(C_EncryptFinal, READ, (S h, B out, NP n), (s, out, n))

static CK_RV do_C_DecryptInit(struct session *s, M mech, O key)
{
	s->oaep = 0;
	s->opens_gcm = mech != NULL && mech->mechanism == CKM_AES_GCM;
	return mech != NULL && mech->mechanism == CKM_RSA_PKCS_OAEP ? oaep_init(s, mech, key) : real->C_DecryptInit(s->h, mech, key);
}
CALL(C_DecryptInit, READ, (S h, M m, O k), (s, m, k))

/* SoftHSM answers a wrong tag as it does a broken token; what a Luna answers is not known. */
static CK_RV do_C_Decrypt(struct session *s, B in, N len, B out, NP n)
{
	if (s->oaep != 0 && n != NULL)
		return oaep_decrypt(s, in, len, out, n);
	CK_RV rv = real->C_Decrypt(s->h, in, len, out, n);
	return rv == CKR_GENERAL_ERROR && s->opens_gcm ? sw(SW_GCM_TAG_CODE) : rv;
}
CALL(C_Decrypt, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))

PASS(C_DecryptUpdate, (struct session *s, B in, N len, B out, NP n), (s->h, in, len, out, n))
CALL(C_DecryptUpdate, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))
PASS(C_DecryptFinal, (struct session *s, B out, NP n), (s->h, out, n))
CALL(C_DecryptFinal, READ, (S h, B out, NP n), (s, out, n))
PASS(C_DigestInit, (struct session *s, M m), (s->h, m))
CALL(C_DigestInit, READ, (S h, M m), (s, m))
PASS(C_Digest, (struct session *s, B in, N len, B out, NP n), (s->h, in, len, out, n))
CALL(C_Digest, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))
PASS(C_DigestUpdate, (struct session *s, B in, N len), (s->h, in, len))
CALL(C_DigestUpdate, READ, (S h, B in, N len), (s, in, len))
PASS(C_DigestFinal, (struct session *s, B out, NP n), (s->h, out, n))
CALL(C_DigestFinal, READ, (S h, B out, NP n), (s, out, n))
PASS(C_SignInit, (struct session *s, M m, O k), (s->h, m, k))
CALL(C_SignInit, READ, (S h, M m, O k), (s, m, k))
PASS(C_Sign, (struct session *s, B in, N len, B out, NP n), (s->h, in, len, out, n))
CALL(C_Sign, READ, (S h, B in, N len, B out, NP n), (s, in, len, out, n))
PASS(C_SignUpdate, (struct session *s, B in, N len), (s->h, in, len))
CALL(C_SignUpdate, READ, (S h, B in, N len), (s, in, len))
PASS(C_SignFinal, (struct session *s, B out, NP n), (s->h, out, n))
CALL(C_SignFinal, READ, (S h, B out, NP n), (s, out, n))
PASS(C_VerifyInit, (struct session *s, M m, O k), (s->h, m, k))
CALL(C_VerifyInit, READ, (S h, M m, O k), (s, m, k))
PASS(C_Verify, (struct session *s, B in, N len, B sig, N n), (s->h, in, len, sig, n))
CALL(C_Verify, READ, (S h, B in, N len, B sig, N n), (s, in, len, sig, n))
PASS(C_VerifyUpdate, (struct session *s, B in, N len), (s->h, in, len))
CALL(C_VerifyUpdate, READ, (S h, B in, N len), (s, in, len))
PASS(C_VerifyFinal, (struct session *s, B sig, N n), (s->h, sig, n))
CALL(C_VerifyFinal, READ, (S h, B sig, N n), (s, sig, n))
PASS(C_SeedRandom, (struct session *s, B in, N len), (s->h, in, len))
CALL(C_SeedRandom, READ, (S h, B in, N len), (s, in, len))
PASS(C_GenerateRandom, (struct session *s, B out, N len), (s->h, out, len))
CALL(C_GenerateRandom, READ, (S h, B out, N len), (s, out, len))
PASS(C_GetObjectSize, (struct session *s, O o, NP n), (s->h, o, n))
CALL(C_GetObjectSize, READ, (S h, O o, NP n), (s, o, n))
