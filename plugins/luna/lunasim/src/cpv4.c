/*
 * CPv4 (section 5.1): the target says hello, the source answers, the target finishes,
 * and a tunnel stands that carries any number of objects, many in one call. The order of
 * the calls, and that both Extract and Insert get the second hello as input, is P's.
 */
#include "sim.h"

#include <stdlib.h>

enum { HELLO = 1, ANSWERED = 2, BLOB = 3 };
enum { MAX_TUNNELS = 256, MAX_BLOBS = 1 << 16 };
enum { STEP_START = 2, STEP_ANSWERED = 3, STEP_DONE = 4 }; /* P: the first call answers 2; the others are guesses */

struct tunnel {
	unsigned char ouid[OUID_SIZE], key[32], hello[32]; /* hello: digest of the source's */
	S h;       /* the session that it belongs to; 0: the slot is free */
	int gives; /* it is the source's end */
	uint32_t sent;
	unsigned char *seen; /* a bit for each number that was inserted; the target's end */
};

static struct tunnel tunnels[MAX_TUNNELS]; /* guarded by the lock for writing */

static void drop(struct tunnel *t)
{
	free(t->seen);
	explicit_bzero(t, sizeof *t);
}

void forget_tunnels(S h)
{
	for (int i = 0; i < MAX_TUNNELS; i++)
		if (tunnels[i].h != 0 && (h == 0 || tunnels[i].h == h))
			drop(&tunnels[i]);
}

static struct tunnel *find(S h, const void *ouid, N len, int gives)
{
	for (int i = 0; ouid != NULL && len == OUID_SIZE && i < MAX_TUNNELS; i++)
		if (tunnels[i].h == h && memcmp(tunnels[i].ouid, ouid, len) == 0 && (gives < 0 || tunnels[i].gives == gives))
			return &tunnels[i];
	return NULL;
}

static CK_RV dig(S h, int gives, const unsigned char *ouid, const unsigned char key[32], const unsigned char hello[32])
{
	struct tunnel *t = NULL;
	for (int i = 0; t == NULL && i < MAX_TUNNELS; i++)
		if (tunnels[i].h == 0)
			t = &tunnels[i];
	if (t == NULL)
		return CKR_SESSION_COUNT; /* guess */
	*t = (struct tunnel){ .h = h, .gives = gives, .seen = gives ? NULL : calloc(1, MAX_BLOBS / 8) };
	if (!gives && t->seen == NULL) {
		drop(t);
		return CKR_HOST_MEMORY;
	}
	memcpy(t->ouid, ouid, OUID_SIZE);
	memcpy(t->key, key, 32);
	memcpy(t->hello, hello, 32);
	return CKR_OK;
}

/* What stands for a domain in a hello, and tells nothing of it. */
static CK_RV tag(struct engine *e, int which, unsigned char out[32]) { return domain_key(e, which, "cpv4 tag", NULL, 0, out); }

static CK_RV ready(struct engine *e)
{
	CK_RV rv = may_transfer(CPV4);
	if (rv == CKR_OK && !sw(SW_CLOCK))
		rv = CKR_ATTESTATION_EXPIRED; /* D-cpv4use: the clock must be set */
	return rv == CKR_OK ? engine_open(e) : rv;
}

static CK_RV hello(struct engine *e, unsigned char ours[16], struct buf *out)
{
	struct buf body = { NULL, 0, 0, 0 };
	uint32_t domains = 0;
	CK_RV rv = random_bytes(e, ours, 16);
	while (domains < MAX_DOMAINS && state->domain[domains][0] != 0)
		domains++;
	put(&body, ours, 16);
	put32(&body, firmware());
	put32(&body, sw(SW_SUITES));
	put32(&body, domains);
	for (uint32_t i = 0; rv == CKR_OK && i < domains; i++) {
		unsigned char t[32];
		rv = tag(e, (int)i, t);
		put(&body, t, sizeof t);
	}
	if (rv == CKR_OK)
		rv = frame(e, CPV4, HELLO, &body, out);
	wipe(&body);
	return rv;
}

static CK_RV do_CA_MigrationStartSessionNegotiation(struct session *s, N len, NP step, NP n, B out)
{
	struct engine e;
	struct buf made = { NULL, 0, 0, 0 };
	unsigned char ours[16];
	if (step == NULL || n == NULL || len != 0)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = ready(&e);
	if (rv != CKR_OK)
		return rv;
	if ((rv = hello(&e, ours, &made)) == CKR_OK && (rv = deliver(&made, out, n)) == CKR_OK) {
		*step = STEP_START;
		if (out != NULL) {
			s->transfer = (struct transfer){ .phase = V4_TARGET };
			memcpy(s->transfer.ours, ours, sizeof ours);
		}
	}
	wipe(&made);
	engine_close(&e);
	return rv;
}
CA_CALL(CA_MigrationStartSessionNegotiation, WRITE, (S h, N len, B in UNUSED, NP step, NP n, B out), (s, len, step, n, out))

/* Finds a domain that both have: the source's first that the target has too (row 24). */
static CK_RV common_domain(struct engine *e, struct reader *r, int *which, unsigned char out[32])
{
	uint32_t theirs = get32(r);
	const unsigned char *tags = theirs <= MAX_DOMAINS ? get(r, 32 * theirs) : NULL;
	if (tags == NULL || r->bad)
		return CKR_SESSION_NEGOTIATION_INVALID;
	for (int i = 0; i < MAX_DOMAINS && state->domain[i][0] != 0; i++) {
		CK_RV rv = tag(e, i, out);
		if (rv != CKR_OK)
			return rv;
		for (uint32_t k = 0; k < theirs; k++)
			if (memcmp(out, tags + 32 * k, 32) == 0) {
				*which = i;
				return CKR_OK;
			}
	}
	return CKR_SESSION_NEGOTIATION_NO_PSK;
}

static CK_RV tunnel_key(struct engine *e, int which, const void *target, const void *source, uint32_t suites, const void *ouid, unsigned char key[32])
{
	const struct part parts[] = { { target, 16 }, { source, 16 }, { &suites, sizeof suites }, { ouid, OUID_SIZE } };
	return domain_key(e, which, "cpv4", parts, 4, key);
}

/* What one end knows when the second hello is written or read. */
struct deal {
	unsigned char ouid[OUID_SIZE], key[32], hello[32];
};

static CK_RV answer_hello(struct engine *e, const void *in, N len, struct buf *out, struct deal *d)
{
	struct reader r;
	unsigned char ours[16], domain[32];
	int which = 0;
	CK_RV rv = unframe(e, CPV4, HELLO, in, len, &r);
	if (rv != CKR_OK)
		return rv == CKR_DATA_INVALID ? CKR_SESSION_NEGOTIATION_INVALID : rv;
	const unsigned char *theirs = get(&r, 16);
	uint32_t fw = get32(&r), suites = get32(&r) & sw(SW_SUITES);
	if ((rv = newer_gives_nothing(fw)) != CKR_OK || (rv = common_domain(e, &r, &which, domain)) != CKR_OK)
		return rv;
	if (suites == 0)
		return CKR_SESSION_NEGOTIATION_NO_ALGS;
	if ((rv = random_bytes(e, ours, sizeof ours)) != CKR_OK || (rv = random_bytes(e, d->ouid, sizeof d->ouid)) != CKR_OK ||
	    (rv = tunnel_key(e, which, theirs, ours, suites, d->ouid, d->key)) != CKR_OK)
		return rv;
	struct buf body = { NULL, 0, 0, 0 };
	put(&body, theirs, 16);
	put(&body, ours, sizeof ours);
	put32(&body, suites);
	put(&body, domain, sizeof domain);
	put(&body, d->ouid, sizeof d->ouid);
	if ((rv = frame(e, CPV4, ANSWERED, &body, out)) == CKR_OK)
		rv = digest(e, out->p, out->n, d->hello);
	wipe(&body);
	return rv;
}

static CK_RV read_answer(struct engine *e, struct session *s, const void *in, N len, struct deal *d)
{
	struct reader r;
	unsigned char ours[32];
	CK_RV rv = unframe(e, CPV4, ANSWERED, in, len, &r);
	if (rv != CKR_OK)
		return rv == CKR_DATA_INVALID ? CKR_SESSION_NEGOTIATION_INVALID : rv;
	const unsigned char *target = get(&r, 16), *source = get(&r, 16);
	uint32_t suites = get32(&r);
	const unsigned char *domain = get(&r, 32);
	memcpy(d->ouid, get(&r, OUID_SIZE), OUID_SIZE);
	if (r.bad || s->transfer.phase != V4_TARGET || memcmp(target, s->transfer.ours, 16) != 0)
		return CKR_SESSION_NEGOTIATION_INVALID;
	for (int i = 0; i < MAX_DOMAINS && state->domain[i][0] != 0; i++)
		if (tag(e, i, ours) == CKR_OK && memcmp(ours, domain, 32) == 0) {
			if ((rv = digest(e, in, len, d->hello)) != CKR_OK)
				return rv;
			return tunnel_key(e, i, target, source, suites, d->ouid, d->key);
		}
	return CKR_SESSION_NEGOTIATION_NO_PSK;
}

/* Gives the tunnel's OUID, of which a caller may ask the length. */
static CK_RV give_ouid(const unsigned char *ouid, NP n, B out)
{
	struct buf b = { (unsigned char *)ouid, OUID_SIZE, OUID_SIZE, 0 };
	return n == NULL ? CKR_OK : deliver(&b, out, n);
}

static CK_RV source_hello(struct session *s, struct engine *e, const void *in, N len, NP step, NP n, B out, NP ouid_len, B ouid)
{
	struct buf made = { NULL, 0, 0, 0 };
	struct deal d;
	CK_RV rv = answer_hello(e, in, len, &made, &d);
	if (rv == CKR_OK && (rv = give_ouid(d.ouid, ouid_len, ouid)) == CKR_OK && (rv = deliver(&made, out, n)) == CKR_OK) {
		*step = STEP_ANSWERED;
		if (out != NULL)
			rv = dig(s->h, 1, d.ouid, d.key, d.hello);
	}
	wipe(&made);
	return rv;
}

/* The third call has no output, so a question for its length is the call. P leaves its answer unchecked. */
static CK_RV target_done(struct session *s, struct engine *e, const void *in, N len, const void *given, N given_len, NP step, NP n, NP ouid_len, B ouid)
{
	struct deal d;
	CK_RV rv = read_answer(e, s, in, len, &d);
	if (rv == CKR_OK && given != NULL && (given_len != OUID_SIZE || memcmp(given, d.ouid, OUID_SIZE) != 0))
		rv = CKR_SESSION_ID_INVALID;
	s->transfer.phase = IDLE;
	if (rv == CKR_OK)
		rv = dig(s->h, 0, d.ouid, d.key, d.hello);
	if (rv != CKR_OK)
		return rv;
	*step = STEP_DONE, *n = 0;
	if ((rv = give_ouid(d.ouid, ouid_len, ouid)) != CKR_OK)
		return rv;
	return sw(SW_THIRD_CALL);
}

struct negotiation {
	N step, len, given_len;
	B in, given;
	NP out_step, n, status, ouid_len;
	B out, ouid;
};

static CK_RV do_CA_MigrationContinueSessionNegotiation(struct session *s, const struct negotiation *g)
{
	struct engine e;
	if (g->in == NULL || g->out_step == NULL || g->n == NULL || (g->ouid != NULL && g->ouid_len == NULL))
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = ready(&e);
	if (rv != CKR_OK)
		return rv;
	if (g->status != NULL)
		*g->status = 0; /* section 7.3: its values are not known */
	if (g->step == STEP_START)
		rv = source_hello(s, &e, g->in, g->len, g->out_step, g->n, g->out, g->ouid_len, g->ouid);
	else if (g->step == STEP_ANSWERED)
		rv = target_done(s, &e, g->in, g->len, g->given, g->given_len, g->out_step, g->n, g->ouid_len, g->ouid);
	else
		rv = CKR_SESSION_NEGOTIATION_INVALID;
	engine_close(&e);
	return rv;
}
CA_CALL(CA_MigrationContinueSessionNegotiation, WRITE,
	(S h, N step, N len, B in, N given_len, B given, NP out_step, NP n, B out, NP status, NP ouid_len, B ouid),
	(s, &(struct negotiation){ step, len, given_len, in, given, out_step, n, status, ouid_len, out, ouid }))

static CK_RV do_CA_MigrationCloseSession(struct session *s, N len, B ouid)
{
	struct tunnel *t = find(s->h, ouid, len, -1);
	if (t == NULL)
		return CKR_SESSION_ID_INVALID;
	drop(t);
	return CKR_OK;
}
CA_CALL(CA_MigrationCloseSession, WRITE, (S h, N len, B ouid), (s, len, ouid))

/* Finds the tunnel that a batch goes through. */
static CK_RV enter_tunnel(struct session *s, int gives, B in, N in_len, B ouid, N ouid_len, struct engine *e, struct tunnel **t)
{
	unsigned char sum[32];
	CK_RV rv = ready(e);
	if (rv != CKR_OK)
		return rv;
	if ((*t = find(s->h, ouid, ouid_len, gives)) == NULL)
		rv = CKR_SESSION_ID_INVALID;
	else if (sw(SW_TUNNELS_EXPIRED))
		rv = CKR_SESSION_ID_EXPIRED;
	else if (in == NULL || digest(e, in, in_len, sum) != CKR_OK || memcmp(sum, (*t)->hello, 32) != 0)
		rv = CKR_SESSION_NEGOTIATION_INVALID; /* guess: P gives the second hello to both calls */
	if (rv != CKR_OK)
		engine_close(e);
	return rv;
}

static CK_RV extract_one(struct session *s, struct engine *e, struct tunnel *t, N type, O o, B out, NP n)
{
	struct buf body = { NULL, 0, 0, 0 }, made = { NULL, 0, 0, 0 };
	unsigned char key[32];
	uint32_t number = t->sent;
	CK_RV rv = type != CK_CRYPTOKI_ELEMENT ? CKR_OBJECT_TYPE_INVALID : may_leave(s->h, o);
	if (rv == CKR_OK && number >= MAX_BLOBS)
		rv = CKR_SESSION_ID_EXPIRED;
	if (rv == CKR_OK)
		rv = hmac(e, t->key, 32, &(struct part){ &number, sizeof number }, 1, key);
	if (rv == CKR_OK) {
		put(&body, t->ouid, OUID_SIZE);
		put32(&body, number);
		rv = seal(e, key, s->h, o, &body);
	}
	if (rv == CKR_OK && (rv = frame(e, CPV4, BLOB, &body, &made)) == CKR_OK && (rv = deliver(&made, out, n)) == CKR_OK && out != NULL)
		t->sent++;
	wipe(&body);
	wipe(&made);
	return rv;
}

/*
 * Every object has its own result. Without CONTINUE_ON_ERR the first failure is the last
 * attempt; the others are CKR_CLONE_NOT_ATTEMPTED, and the call answers the failure
 * (guess). With it the call answers CKR_OK (P).
 */
static int go_on(CK_RV rv, N flags, CK_RV *first)
{
	if (rv != CKR_OK && *first == CKR_OK && !(flags & CKF_CPV4_CONTINUE_ON_ERR))
		*first = rv;
	return *first == CKR_OK;
}

static CK_RV do_CA_Extract(struct session *s, M mech)
{
	struct engine e;
	struct tunnel *t;
	if (mech == NULL || mech->mechanism != CKM_CPV4_EXTRACT)
		return CKR_MECHANISM_INVALID;
	const CK_CPV4_EXTRACT_PARAMS *p = mech->pParameter;
	if (p == NULL || mech->ulParameterLen != sizeof *p || p->numberOfObjects == 0 || p->objectType == NULL || p->objectHandle == NULL ||
	    p->result == NULL || p->keyBlobLen == NULL || p->keyBlob == NULL)
		return CKR_MECHANISM_PARAM_INVALID;
	CK_RV first = CKR_OK, rv = enter_tunnel(s, 1, p->input, p->inputLength, p->sessionOuid, p->sessionOuidLen, &e, &t);
	if (rv != CKR_OK)
		return rv;
	int on = 1;
	for (N i = 0; i < p->numberOfObjects; i++) {
		rv = on ? extract_one(s, &e, t, p->objectType[i], p->objectHandle[i], p->keyBlob[i], &p->keyBlobLen[i]) : CKR_CLONE_NOT_ATTEMPTED;
		if ((p->result[i] = rv) != CKR_OK)
			p->keyBlobLen[i] = 0;
		on = go_on(rv, p->extractionFlags, &first);
	}
	engine_close(&e);
	return first;
}
CA_CALL(CA_Extract, WRITE, (S h, M mech), (s, mech))

static CK_RV insert_one(struct session *s, struct engine *e, struct tunnel *t, N type, N storage, const void *in, N len, O *made)
{
	struct reader r;
	unsigned char key[32];
	if (type != CK_CRYPTOKI_ELEMENT)
		return CKR_OBJECT_TYPE_INVALID;
	CK_RV rv = unframe(e, CPV4, BLOB, in, len, &r);
	if (rv != CKR_OK)
		return rv;
	int ours = memcmp(get(&r, OUID_SIZE), t->ouid, OUID_SIZE) == 0;
	uint32_t number = get32(&r);
	if (!ours || r.bad || number >= MAX_BLOBS || (t->seen[number / 8] & 1 << number % 8))
		return CKR_DATA_INVALID; /* of another tunnel, or it was here before */
	if ((rv = hmac(e, t->key, 32, &(struct part){ &number, sizeof number }, 1, key)) != CKR_OK)
		return rv;
	const struct how how = { storage == 1, CKR_DATA_INVALID, may_enter }; /* P: 1 is the token, it seems */
	rv = unseal(e, key, &r, &how, s->h, made);
	if (rv == CKR_OK)
		t->seen[number / 8] |= (unsigned char)(1 << number % 8);
	return rv;
}

static CK_RV do_CA_Insert(struct session *s, M mech)
{
	struct engine e;
	struct tunnel *t;
	if (mech == NULL || mech->mechanism != CKM_CPV4_INSERT)
		return CKR_MECHANISM_INVALID;
	const CK_CPV4_INSERT_PARAMS *p = mech->pParameter;
	if (p == NULL || mech->ulParameterLen != sizeof *p || p->numberOfObjects == 0 || p->objectType == NULL || p->storageType == NULL ||
	    p->keyBlobLen == NULL || p->keyBlob == NULL || p->result == NULL || p->objectHandle == NULL)
		return CKR_MECHANISM_PARAM_INVALID;
	CK_RV first = CKR_OK, rv = enter_tunnel(s, 0, p->input, p->inputLength, p->sessionOuid, p->sessionOuidLen, &e, &t);
	if (rv != CKR_OK)
		return rv;
	int on = 1;
	for (N i = 0; i < p->numberOfObjects; i++) {
		p->objectHandle[i] = 0;
		rv = on ? insert_one(s, &e, t, p->objectType[i], p->storageType[i], p->keyBlob[i], p->keyBlobLen[i], &p->objectHandle[i])
		        : CKR_CLONE_NOT_ATTEMPTED;
		p->result[i] = rv;
		on = go_on(rv, p->insertionFlags, &first);
	}
	engine_close(&e);
	return first;
}
CA_CALL(CA_Insert, WRITE, (S h, M mech), (s, mech))
