/* The bytes that travel between two HSMs: frames, and objects sealed in them. */
#include "sim.h"

#include <stdlib.h>

/* What every HSM of the maker has in common, and a relay has not. */
static const char factory[] = "lunasim factory root";

void put(struct buf *b, const void *p, size_t n)
{
	if (b->bad)
		return;
	if (b->n + n > b->cap) {
		size_t cap = (b->n + n) * 2 + 256;
		unsigned char *grown = malloc(cap);
		if (grown == NULL) {
			b->bad = 1;
			return;
		}
		if (b->n > 0)
			memcpy(grown, b->p, b->n);
		wipe(&(struct buf){ b->p, b->n, b->cap, 0 });
		b->p = grown, b->cap = cap;
	}
	if (n > 0)
		memcpy(b->p + b->n, p, n);
	b->n += n;
}

void put32(struct buf *b, uint32_t v) { put(b, &v, sizeof v); }

void wipe(struct buf *b)
{
	if (b->p != NULL)
		explicit_bzero(b->p, b->cap);
	free(b->p);
	*b = (struct buf){ NULL, 0, 0, 0 };
}

/* Takes n bytes; where there are fewer, zeros, and the reader is bad. */
const unsigned char *get(struct reader *r, size_t n)
{
	static const unsigned char zeros[256];
	if (r->bad || n > r->n) {
		r->bad = 1;
		return n <= sizeof zeros ? zeros : NULL;
	}
	const unsigned char *p = r->p;
	r->p += n, r->n -= n;
	return p;
}

uint32_t get32(struct reader *r)
{
	uint32_t v;
	memcpy(&v, get(r, sizeof v), sizeof v);
	return v;
}

/* The two-call rule of PKCS#11 2.40, section 5.2, for an output that is ready. */
CK_RV deliver(const struct buf *b, B out, NP n)
{
	N room = *n;
	if (b->bad)
		return CKR_HOST_MEMORY;
	*n = b->n;
	if (out == NULL)
		return CKR_OK;
	if (room < b->n)
		return CKR_BUFFER_TOO_SMALL;
	memcpy(out, b->p, b->n);
	return CKR_OK;
}

/* Frames: "LSIM", protocol, phase, length, body, MAC of the maker. */
CK_RV frame(struct engine *e, unsigned char protocol, unsigned char phase, struct buf *body, struct buf *out)
{
	unsigned char kind[2] = { protocol, phase }, mac[32];
	if (body->bad)
		return CKR_HOST_MEMORY;
	CK_RV rv = hmac(e, factory, sizeof factory, (struct part[]){ { kind, 2 }, { body->p, body->n } }, 2, mac);
	if (rv != CKR_OK)
		return rv;
	put(out, "LSIM", 4);
	put(out, kind, sizeof kind);
	put32(out, (uint32_t)body->n);
	put(out, body->p, body->n);
	put(out, mac, sizeof mac);
	return out->bad ? CKR_HOST_MEMORY : CKR_OK;
}

/* A frame that is not of this protocol and phase, or was altered, is CKR_DATA_INVALID (guess). */
CK_RV unframe(struct engine *e, unsigned char protocol, unsigned char phase, const void *p, N n, struct reader *body)
{
	struct reader r = { p, n, p == NULL };
	unsigned char kind[2] = { protocol, phase }, mac[32];
	int ours = memcmp(get(&r, 4), "LSIM", 4) == 0 && memcmp(get(&r, 2), kind, 2) == 0;
	uint32_t len = get32(&r);
	if (!ours || r.bad || r.n != (size_t)len + sizeof mac)
		return CKR_DATA_INVALID;
	*body = (struct reader){ r.p, len, 0 };
	CK_RV rv = hmac(e, factory, sizeof factory, (struct part[]){ { kind, 2 }, { body->p, body->n } }, 2, mac);
	if (rv != CKR_OK)
		return rv;
	return memcmp(mac, body->p + len, sizeof mac) == 0 ? CKR_OK : CKR_DATA_INVALID;
}

/* What an object is made of. A flag of SoftHSM's own is set anew where it arrives. */
static const CK_ATTRIBUTE_TYPE carried[] = {
	CKA_CLASS, CKA_KEY_TYPE, CKA_CERTIFICATE_TYPE, CKA_LABEL, CKA_ID, CKA_SUBJECT, CKA_ISSUER, CKA_SERIAL_NUMBER, CKA_APPLICATION,
	CKA_OBJECT_ID, CKA_PRIVATE, CKA_MODIFIABLE,
	CKA_ENCRYPT, CKA_DECRYPT, CKA_SIGN, CKA_VERIFY, CKA_WRAP, CKA_UNWRAP, CKA_DERIVE, CKA_SIGN_RECOVER, CKA_VERIFY_RECOVER,
	CKA_VALUE, CKA_MODULUS, CKA_PUBLIC_EXPONENT, CKA_PRIVATE_EXPONENT, CKA_PRIME_1, CKA_PRIME_2, CKA_EXPONENT_1,
	CKA_EXPONENT_2, CKA_COEFFICIENT, CKA_EC_PARAMS, CKA_EC_POINT,
};
enum { CARRIED = sizeof carried / sizeof *carried };

static CK_RV flatten(S h, O o, struct buf *out)
{
	CK_RV rv = CKR_OK;
	for (int i = 0; rv == CKR_OK && i < CARRIED; i++) {
		unsigned char *v;
		N n;
		rv = read_attribute(h, o, carried[i], &v, &n);
		if (rv == CKR_ATTRIBUTE_TYPE_INVALID) {
			rv = CKR_OK;
			continue;
		}
		if (rv != CKR_OK)
			break;
		put32(out, (uint32_t)carried[i]);
		put32(out, (uint32_t)n);
		put(out, v, n);
		explicit_bzero(v, n);
		free(v);
	}
	return out->bad ? CKR_HOST_MEMORY : rv;
}

/* Runs AES-256-GCM under a key that exists for as long as this takes. Nobody sees it: the lock is held for writing. */
static CK_RV gcm(struct engine *e, int encrypt, const unsigned char key[32], const unsigned char iv[12], const void *in, N n, struct buf *out)
{
	CK_OBJECT_CLASS class = CKO_SECRET_KEY;
	CK_KEY_TYPE type = CKK_AES;
	CK_BBOOL yes = CK_TRUE, no = CK_FALSE;
	CK_ATTRIBUTE t[] = {
		{ CKA_CLASS, &class, sizeof class }, { CKA_KEY_TYPE, &type, sizeof type }, { CKA_TOKEN, &no, sizeof no },
		{ CKA_PRIVATE, &yes, sizeof yes },   { CKA_ENCRYPT, &yes, sizeof yes },    { CKA_DECRYPT, &yes, sizeof yes },
		{ CKA_VALUE, (void *)key, 32 },
	};
	CK_GCM_PARAMS params = { (B)iv, 12, 96, NULL, 0, 128 };
	CK_MECHANISM mech = { CKM_AES_GCM, &params, sizeof params };
	O o;
	N got = n + 64;
	B made = malloc(got);
	if (made == NULL)
		return CKR_HOST_MEMORY;
	CK_RV rv = real->C_CreateObject(e->h, t, sizeof t / sizeof *t, &o);
	if (rv == CKR_OK) {
		rv = encrypt ? real->C_EncryptInit(e->h, &mech, o) : real->C_DecryptInit(e->h, &mech, o);
		if (rv == CKR_OK)
			rv = encrypt ? real->C_Encrypt(e->h, (B)in, n, made, &got) : real->C_Decrypt(e->h, (B)in, n, made, &got);
		real->C_DestroyObject(e->h, o);
	}
	if (rv == CKR_OK)
		put(out, made, got);
	explicit_bzero(made, n + 64);
	free(made);
	return rv;
}

/* Seals an object under a key. */
CK_RV seal(struct engine *e, const unsigned char key[32], S h, O o, struct buf *out)
{
	struct buf flat = { NULL, 0, 0, 0 };
	unsigned char iv[12];
	CK_RV rv = flatten(h, o, &flat);
	if (rv == CKR_OK)
		rv = random_bytes(e, iv, sizeof iv);
	if (rv == CKR_OK) {
		struct buf sealed = { NULL, 0, 0, 0 };
		rv = gcm(e, 1, key, iv, flat.p, flat.n, &sealed);
		put(out, iv, sizeof iv);
		put32(out, (uint32_t)sealed.n);
		put(out, sealed.p, sealed.n);
		wipe(&sealed);
	}
	wipe(&flat);
	return rv;
}

/* Reads the attributes of a flat object into a template that points into it. */
static CK_RV unflatten(struct reader *r, CK_ATTRIBUTE *t, N *n)
{
	*n = 0;
	while (r->n > 0 && !r->bad) {
		CK_ATTRIBUTE_TYPE type = get32(r);
		N len = get32(r);
		const unsigned char *v = get(r, len);
		if (r->bad || *n == CARRIED)
			return CKR_DATA_INVALID;
		t[(*n)++] = (CK_ATTRIBUTE){ type, (void *)v, len };
	}
	return CKR_OK;
}

/* Makes room for an OUID that is there already: nobody knows what a Luna does (section 7.4). */
static CK_RV settle_existing(S h, const unsigned char *ouid)
{
	O there;
	CK_RV rv = by_ouid(h, ouid, &there);
	if (rv != CKR_OK || there == 0)
		return rv;
	switch (sw(SW_EXISTS)) {
	case EXISTS_DUPLICATE:
		return CKR_OK;
	case EXISTS_OVERWRITE:
		return real->C_DestroyObject(h, there);
	default:
		return CKR_OBJECT_ALREADY_EXISTS;
	}
}

static CK_RV insert(struct engine *e, struct reader *flat, const struct how *how, S h, O *made)
{
	CK_ATTRIBUTE t[CARRIED + 3];
	CK_BBOOL on_token = how->token != 0, yes = CK_TRUE, no = CK_FALSE;
	N n;
	CK_RV rv = unflatten(flat, t, &n);
	if (rv != CKR_OK)
		return rv;
	const CK_ATTRIBUTE *class = attribute(t, n, CKA_CLASS), *label = attribute(t, n, CKA_LABEL);
	if (class == NULL || class->ulValueLen != sizeof(CK_OBJECT_CLASS) || label == NULL || label->ulValueLen < TAIL_SIZE)
		return CKR_DATA_INVALID;
	CK_OBJECT_CLASS is;
	memcpy(&is, class->pValue, sizeof is);
	const unsigned char *tail = (unsigned char *)label->pValue + label->ulValueLen - TAIL_SIZE;
	if (tail[1] & MANAGED) {
		t[n++] = (CK_ATTRIBUTE){ CKA_SENSITIVE, &no, sizeof no };
		t[n++] = (CK_ATTRIBUTE){ CKA_EXTRACTABLE, &yes, sizeof yes };
	}
	t[n++] = (CK_ATTRIBUTE){ CKA_TOKEN, &on_token, sizeof on_token };
	if ((rv = how->may_enter(is)) != CKR_OK || (rv = on_token ? room(1) : CKR_OK) != CKR_OK ||
	    (rv = settle_existing(e->h, tail + 2)) != CKR_OK)
		return rv;
	return real->C_CreateObject(h, t, n, made);
}

/* Opens a sealed object and makes it. */
CK_RV unseal(struct engine *e, const unsigned char key[32], struct reader *in, const struct how *how, S h, O *made)
{
	const unsigned char *iv = get(in, 12);
	uint32_t len = get32(in);
	const unsigned char *sealed = get(in, len);
	if (in->bad || len < 16)
		return CKR_DATA_INVALID;
	struct buf flat = { NULL, 0, 0, 0 };
	CK_RV rv = gcm(e, 0, key, iv, sealed, len, &flat) == CKR_OK ? CKR_OK : how->wrong_key;
	if (rv == CKR_OK)
		rv = insert(e, &(struct reader){ flat.p, flat.n, 0 }, how, h, made);
	wipe(&flat);
	return rv;
}
