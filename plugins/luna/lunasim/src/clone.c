/*
 * What every cloning protocol asks first, and CPv1 and CPv3, which share two functions
 * (section 5.1). One transfer carries one object. Between its calls the state is in the
 * session; a call out of turn, or a blob that is not the one expected, ends it. What
 * bReplicate means is not known (section 7.3): it is taken and makes no difference. Both
 * use the primary domain (guess).
 */
#include "sim.h"

enum { FW_7_7 = 0x070700, FW_7_8 = 0x070800 };

/* Whether this partition clones at all, and by this protocol. */
CK_RV may_transfer(int protocol)
{
	CK_RV rv = officer_only();
	if (rv != CKR_OK)
		return rv;
	if (!allows(state->hsm_policy, HSM_CLONING) || !allows(state->hsm_policy, HSM_NETWORK_REPLICATION)) /* row 28 */
		return CKR_OPERATION_NOT_ALLOWED;
	/* Section 5.1: each protocol has its first firmware; policy 42 forces CPv1. Both codes but the last are guesses. */
	if ((protocol == CPV3 && firmware() < FW_7_7) || (protocol == CPV4 && firmware() < FW_7_8))
		return CKR_FUNCTION_NOT_SUPPORTED;
	int forced = allows(state->token_policy, ALLOW_CPV1);
	if (protocol != CPV1 && forced)
		return CKR_PROTOCOL_DISABLED;
	if (protocol == CPV1 && !forced && firmware() >= FW_7_7)
		return CKR_PROTOCOL_DISABLED;
	return state->domain[0][0] == 0 ? CKR_CLONING_PARAMETER_MISSING : CKR_OK;
}

/* Rows 29 and 36: policies 0 and 4 say which keys are cloned; key-export partitions clone no private ones. */
CK_RV may_enter(CK_OBJECT_CLASS class)
{
	if ((class == CKO_PRIVATE_KEY && !allows(state->token_policy, PRIVATE_CLONING)) ||
	    (class == CKO_SECRET_KEY && !allows(state->token_policy, SECRET_CLONING)))
		return CKR_OPERATION_NOT_ALLOWED;
	return CKR_OK;
}

CK_RV may_leave(S h, O o)
{
	CK_OBJECT_CLASS class;
	CK_RV rv = class_of(h, o, &class);
	return rv == CKR_OK ? may_enter(class) : rv;
}

/* Row 22: firmware from 7.7.0 on gives nothing to older (the code is a guess). */
CK_RV newer_gives_nothing(uint32_t theirs)
{
	return firmware() >= FW_7_7 && theirs < FW_7_7 ? CKR_OPERATION_NOT_ALLOWED : CKR_OK;
}

/* Runs one step of a transfer: with an engine, and with its output in a buffer. */
struct step {
	struct session *s;
	struct engine e;
	struct buf body, out;
	struct transfer next; /* what the transfer becomes when the output is delivered */
};

static CK_RV begin(struct step *st, struct session *s, int protocol)
{
	memset(st, 0, sizeof *st);
	st->s = s, st->next = s->transfer;
	CK_RV rv = may_transfer(protocol);
	return rv == CKR_OK ? engine_open(&st->e) : rv;
}

/* Delivers; a question for the size changes nothing, and a failure ends the transfer. */
static CK_RV end(struct step *st, CK_RV rv, B out, NP n)
{
	if (rv == CKR_OK) {
		rv = deliver(&st->out, out, n);
		if (rv == CKR_OK && out != NULL)
			st->s->transfer = st->next;
	} else
		st->s->transfer.phase = IDLE;
	wipe(&st->body);
	wipe(&st->out);
	if (st->e.h != 0)
		engine_close(&st->e);
	return rv;
}

static CK_RV twc(struct step *st, CK_ULONG type)
{
	put32(&st->body, (uint32_t)type);
	put32(&st->body, firmware());
	put(&st->body, state->serial, sizeof state->serial);
	return frame(&st->e, CPV1, 0, &st->body, &st->out);
}

EXPORT CK_RV CA_GetTokenCertificates(CK_SLOT_ID slot, CK_ULONG type, CK_BYTE *cert, CK_ULONG *n)
{
	CK_RV rv = enter("CA_GetTokenCertificates", 0);
	if (rv != CKR_OK)
		return rv;
	if (n == NULL)
		return CKR_ARGUMENTS_BAD;
	/* Section 7.3: which type CPv1 wants is not known. */
	int known = type == CKHSC_CERT_TYPE_TWC3 || type == CKHSC_CERT_TYPE_ECC_TWC;
	if (!known || (sw(SW_TWC) != 0 && sw(SW_TWC) != type))
		return CKR_ARGUMENTS_BAD;
	struct step st = { .s = NULL };
	hold_all(WRITE);
	rv = initialised ? check_slot(slot) : CKR_CRYPTOKI_NOT_INITIALIZED;
	if (rv == CKR_OK && (rv = engine_open(&st.e)) == CKR_OK) {
		if ((rv = twc(&st, type)) == CKR_OK)
			rv = deliver(&st.out, cert, n);
		engine_close(&st.e);
	}
	release_all();
	wipe(&st.body);
	wipe(&st.out);
	return leave("CA_GetTokenCertificates", rv);
}

static CK_RV do_CA_GenerateCloningKEV(struct session *s, B out, NP n)
{
	struct step st;
	if (n == NULL)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = begin(&st, s, CPV1);
	if (rv == CKR_OK)
		rv = random_bytes(&st.e, st.next.kev, KEV_SIZE);
	st.next.phase = IDLE, st.next.has_kev = 1;
	put(&st.out, st.next.kev, KEV_SIZE);
	return end(&st, rv, out, n);
}
CA_CALL(CA_GenerateCloningKEV, WRITE, (S h, B out, NP n), (s, out, n))

static CK_RV do_CA_CloneAsSourceInit(struct session *s, B in, N in_len, B out, NP n)
{
	struct step st;
	if (n == NULL || in != NULL || in_len != 0)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = begin(&st, s, CPV3);
	if (rv == CKR_OK)
		rv = random_bytes(&st.e, st.next.ours, sizeof st.next.ours);
	if (rv == CKR_OK) {
		put32(&st.body, firmware());
		put(&st.body, st.next.ours, sizeof st.next.ours);
		rv = frame(&st.e, CPV3, 1, &st.body, &st.out);
	}
	st.next.phase = V3_SOURCE;
	return end(&st, rv, out, n);
}
CA_CALL(CA_CloneAsSourceInit, WRITE, (S h, B in, N in_len, B out, NP n, CK_BBOOL replicate UNUSED), (s, in, in_len, out, n))

static CK_RV target_v3(struct step *st, B in, N len)
{
	struct reader r;
	CK_RV rv = unframe(&st->e, CPV3, 1, in, len, &r);
	if (rv != CKR_OK || (rv = random_bytes(&st->e, st->next.ours, sizeof st->next.ours)) != CKR_OK)
		return rv;
	(void)get32(&r); /* their firmware: what is newer may come from anywhere */
	memcpy(st->next.theirs, get(&r, 16), 16);
	put32(&st->body, firmware());
	put(&st->body, st->next.theirs, 16);
	put(&st->body, st->next.ours, 16);
	st->next.phase = V3_TARGET;
	return frame(&st->e, CPV3, 2, &st->body, &st->out);
}

static CK_RV target_v1(struct step *st, B cert, N cert_len, B kev, N kev_len)
{
	struct reader r;
	unsigned char sums[2][32];
	CK_RV rv = unframe(&st->e, CPV1, 0, cert, cert_len, &r);
	if (rv != CKR_OK)
		return rv;
	if (kev_len != KEV_SIZE)
		return CKR_DATA_INVALID;
	if (!sw(SW_KEV) && (!st->s->transfer.has_kev || memcmp(kev, st->s->transfer.kev, KEV_SIZE) != 0))
		return CKR_DATA_INVALID; /* section 7.3: by this reading it is the target's own */
	if ((rv = random_bytes(&st->e, st->next.ours, 16)) != CKR_OK || (rv = digest(&st->e, cert, cert_len, sums[0])) != CKR_OK ||
	    (rv = digest(&st->e, kev, kev_len, sums[1])) != CKR_OK)
		return rv;
	memcpy(st->next.kev, kev, KEV_SIZE);
	st->next.has_kev = 1, st->next.phase = V1_TARGET;
	put32(&st->body, firmware());
	put(&st->body, sums, sizeof sums);
	put(&st->body, st->next.ours, 16);
	return frame(&st->e, CPV1, 1, &st->body, &st->out);
}

static CK_RV do_CA_CloneAsTargetInit(struct session *s, B in, N in_len, B kev, N kev_len, B out, NP n)
{
	struct step st;
	if (n == NULL || in == NULL)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = begin(&st, s, kev == NULL ? CPV3 : CPV1);
	if (rv == CKR_OK)
		rv = kev == NULL ? target_v3(&st, in, in_len) : target_v1(&st, in, in_len, kev, kev_len);
	return end(&st, rv, out, n);
}
CA_CALL(CA_CloneAsTargetInit, WRITE, (S h, B in, N in_len, B kev, N kev_len, CK_BBOOL replicate UNUSED, B out, NP n),
	(s, in, in_len, kev, kev_len, out, n))

/* The key of a transfer: of the domain, of both ends' random numbers and, in CPv1, of the KEV. */
static CK_RV transfer_key(struct engine *e, int protocol, const void *source, const void *target, const void *kev, unsigned char key[32])
{
	const struct part parts[] = { { source, 16 }, { target, 16 }, { kev, kev == NULL ? 0 : 32 } };
	return domain_key(e, 0, protocol == CPV1 ? "cpv1" : "cpv3", parts, 3, key);
}

static CK_RV source_v3(struct step *st, O o, B in, N len)
{
	struct reader r;
	unsigned char theirs[16], key[32];
	CK_RV rv = unframe(&st->e, CPV3, 2, in, len, &r);
	if (rv != CKR_OK || (rv = newer_gives_nothing(get32(&r))) != CKR_OK)
		return rv;
	if (st->s->transfer.phase != V3_SOURCE || memcmp(get(&r, 16), st->s->transfer.ours, 16) != 0)
		return CKR_DATA_INVALID;
	memcpy(theirs, get(&r, 16), 16);
	if ((rv = transfer_key(&st->e, CPV3, st->s->transfer.ours, theirs, NULL, key)) != CKR_OK)
		return rv;
	put(&st->body, st->s->transfer.ours, 16);
	put(&st->body, theirs, 16);
	if ((rv = seal(&st->e, key, st->s->h, o, &st->body)) != CKR_OK)
		return rv;
	return frame(&st->e, CPV3, 3, &st->body, &st->out);
}

/* Whether a certificate that the target was given is this partition's: its digest is in part 1. */
static CK_RV our_certificate(struct step *st, const unsigned char *sum)
{
	const CK_ULONG types[] = { CKHSC_CERT_TYPE_TWC3, CKHSC_CERT_TYPE_ECC_TWC };
	CK_RV rv = CKR_DATA_INVALID;
	for (int i = 0; i < 2 && rv != CKR_OK; i++) {
		unsigned char ours[32];
		if (twc(st, types[i]) == CKR_OK && digest(&st->e, st->out.p, st->out.n, ours) == CKR_OK && memcmp(ours, sum, 32) == 0)
			rv = CKR_OK;
		wipe(&st->body);
		wipe(&st->out);
	}
	return rv;
}

static CK_RV source_v1(struct step *st, O o, B in, N len)
{
	struct reader r;
	unsigned char ours[16], sums[2][32], kev[32], key[32];
	CK_RV rv = unframe(&st->e, CPV1, 1, in, len, &r);
	if (rv != CKR_OK || (rv = newer_gives_nothing(get32(&r))) != CKR_OK)
		return rv;
	memcpy(sums, get(&r, sizeof sums), sizeof sums);
	const unsigned char *theirs = get(&r, 16);
	if (r.bad || (rv = our_certificate(st, sums[0])) != CKR_OK)
		return CKR_DATA_INVALID;
	if (sw(SW_KEV) && (!st->s->transfer.has_kev || digest(&st->e, st->s->transfer.kev, KEV_SIZE, kev) != CKR_OK ||
	                   memcmp(kev, sums[1], 32) != 0))
		return CKR_DATA_INVALID; /* by the other reading of section 7.3 it is the source's own */
	if ((rv = random_bytes(&st->e, ours, sizeof ours)) != CKR_OK ||
	    (rv = transfer_key(&st->e, CPV1, ours, theirs, sums[1], key)) != CKR_OK)
		return rv;
	put(&st->body, theirs, 16);
	put(&st->body, ours, 16);
	if ((rv = seal(&st->e, key, st->s->h, o, &st->body)) != CKR_OK)
		return rv;
	return frame(&st->e, CPV1, 2, &st->body, &st->out);
}

static CK_RV do_CA_CloneAsSource(struct session *s, N type, O o, B in, N len, B out, NP n)
{
	struct step st;
	if (n == NULL || in == NULL)
		return CKR_ARGUMENTS_BAD;
	int protocol = len > 4 && in[4] == CPV1 ? CPV1 : CPV3;
	CK_RV rv = begin(&st, s, protocol);
	if (rv == CKR_OK)
		rv = type != CK_CRYPTOKI_ELEMENT ? CKR_OBJECT_TYPE_INVALID : may_leave(s->h, o);
	if (rv == CKR_OK)
		rv = protocol == CPV3 ? source_v3(&st, o, in, len) : source_v1(&st, o, in, len);
	st.next.phase = IDLE, st.next.has_kev = 0;
	return end(&st, rv, out, n);
}
CA_CALL(CA_CloneAsSource, WRITE, (S h, N type, N o, B in, N len, CK_BBOOL replicate UNUSED, B out, NP n), (s, type, o, in, len, out, n))

static CK_RV accept(struct step *st, int protocol, B in, N len, O *made)
{
	struct reader r;
	const struct transfer *t = &st->s->transfer;
	unsigned char sum[32], key[32];
	CK_RV rv = unframe(&st->e, protocol, protocol == CPV3 ? 3 : 2, in, len, &r);
	if (rv != CKR_OK)
		return rv;
	const unsigned char *first = get(&r, 16), *second = get(&r, 16);
	const unsigned char *source = protocol == CPV3 ? first : second, *target = protocol == CPV3 ? second : first;
	if (r.bad || memcmp(target, t->ours, 16) != 0 || (protocol == CPV3 && memcmp(source, t->theirs, 16) != 0))
		return CKR_DATA_INVALID;
	if (protocol == CPV1 && (rv = digest(&st->e, t->kev, KEV_SIZE, sum)) != CKR_OK)
		return rv;
	if ((rv = transfer_key(&st->e, protocol, source, target, protocol == CPV1 ? sum : NULL, key)) != CKR_OK)
		return rv;
	const struct how how = { 1, sw(SW_DOMAIN_CODE), may_enter }; /* row 23: another domain is found at the target */
	return unseal(&st->e, key, &r, &how, st->s->h, made);
}

static CK_RV do_CA_CloneAsTarget(struct session *s, B kev, N kev_len, B in, N len, N type, O *made)
{
	struct step st;
	if (made == NULL || in == NULL)
		return CKR_ARGUMENTS_BAD;
	int protocol = kev != NULL ? CPV1 : CPV3;
	CK_RV rv = begin(&st, s, protocol);
	if (rv == CKR_OK && type != CK_CRYPTOKI_ELEMENT)
		rv = CKR_OBJECT_TYPE_INVALID;
	else if (rv == CKR_OK && s->transfer.phase != (protocol == CPV1 ? V1_TARGET : V3_TARGET))
		rv = CKR_OPERATION_NOT_INITIALIZED; /* guess */
	else if (rv == CKR_OK && protocol == CPV1 && (kev_len != KEV_SIZE || memcmp(kev, s->transfer.kev, KEV_SIZE) != 0))
		rv = CKR_DATA_INVALID;
	if (rv == CKR_OK)
		rv = accept(&st, protocol, in, len, made);
	s->transfer.phase = IDLE, s->transfer.has_kev = 0;
	N none = 0;
	return end(&st, rv, NULL, &none);
}
CA_CALL(CA_CloneAsTarget, WRITE, (S h, B kev, N kev_len, B in, N len, N type, N handle UNUSED, CK_BBOOL replicate UNUSED, O *made),
	(s, kev, kev_len, in, len, type, made))

/* Both sessions must be of one library (section 5.1), which has one partition: there is nothing to clone to. */
static CK_RV do_CA_CloneObject(struct session *s, S source)
{
	CK_SESSION_INFO info;
	CK_RV rv = may_transfer(CPV1);
	if (rv == CKR_OK || rv == CKR_PROTOCOL_DISABLED)
		rv = source == s->h ? CKR_OK : real->C_GetSessionInfo(source, &info);
	return rv == CKR_OK ? CKR_OBJECT_ALREADY_EXISTS : rv;
}
CA_CALL(CA_CloneObject, WRITE, (S h, S source, N type UNUSED, O o UNUSED, O *made UNUSED), (s, source))
