/* Keys: made, wrapped and unwrapped. */
#include "sim.h"

/*
 * A key is made as a session object, which may take many seconds and keeps nobody from
 * the token, and then copied there. The callers of generate and generate_pair keep the
 * sessions; nothing else is held while the key is made.
 */
static CK_RV place(S h, O made, const CK_ATTRIBUTE *t, N n, O *placed)
{
	CK_BBOOL token = flag(t, n, CKA_TOKEN, CK_FALSE);
	CK_ATTRIBUTE on_token = { CKA_TOKEN, &token, sizeof token };
	if (!token) {
		*placed = made;
		return CKR_OK;
	}
	CK_RV rv = real->C_CopyObject(h, made, &on_token, 1, placed);
	real->C_DestroyObject(h, made);
	return rv;
}

/* Checks a template and writes it as that of a session object. */
static CK_RV prepare(struct template *out, S h, const CK_ATTRIBUTE *t, N n, CK_OBJECT_CLASS class)
{
	unsigned char flags;
	struct tail tail;
	CK_BBOOL token = flag(t, n, CKA_TOKEN, CK_FALSE);
	CK_RV rv = check_template(t, n, class, &flags);
	if (rv == CKR_OK)
		rv = may_make(token);
	if (rv == CKR_OK && token)
		rv = room(1);
	if (rv == CKR_OK && (rv = new_tail(h, flags, &tail)) == CKR_OK && (rv = build(out, t, n, &tail)) == CKR_OK)
		out->token = CK_FALSE;
	return rv;
}

static CK_RV generate(S h, M mech, A t, N n, struct template *session, O *made)
{
	struct session *s = hold(h, READ, 0);
	if (s == NULL)
		return no_session();
	CK_RV rv = prepare(session, h, t, n, CKO_SECRET_KEY);
	release(s);
	if (rv != CKR_OK || (rv = real->C_GenerateKey(h, mech, session->a, session->n, made)) != CKR_OK)
		return rv;
	if ((s = hold(h, WRITE, 0)) == NULL)
		return no_session();
	rv = place(h, *made, t, n, made);
	release(s);
	return rv;
}

EXPORT CK_RV C_GenerateKey(S h, M mech, A t, N n, O *made)
{
	CK_RV rv = enter("C_GenerateKey", h);
	if (rv != CKR_OK)
		return rv;
	if (mech == NULL || made == NULL || (t == NULL && n != 0))
		return CKR_ARGUMENTS_BAD;
	struct template session = { .label = NULL };
	keep_sessions();
	rv = generate(h, mech, t, n, &session, made);
	unkeep_sessions();
	discard(&session);
	return leave("C_GenerateKey", rv);
}

struct half {
	A t;
	N n;
	O made;
	struct template session;
};

static CK_RV generate_pair(S h, M mech, struct half *public, struct half *private)
{
	struct session *s = hold(h, READ, 0);
	if (s == NULL)
		return no_session();
	CK_RV rv = prepare(&public->session, h, public->t, public->n, CKO_PUBLIC_KEY);
	if (rv == CKR_OK)
		rv = prepare(&private->session, h, private->t, private->n, CKO_PRIVATE_KEY);
	release(s);
	if (rv == CKR_OK)
		rv = real->C_GenerateKeyPair(h, mech, public->session.a, public->session.n, private->session.a,
		                             private->session.n, &public->made, &private->made);
	if (rv != CKR_OK)
		return rv;
	if ((s = hold(h, WRITE, 0)) == NULL)
		return no_session();
	if ((rv = place(h, public->made, public->t, public->n, &public->made)) == CKR_OK) {
		rv = place(h, private->made, private->t, private->n, &private->made);
		if (rv != CKR_OK)
			real->C_DestroyObject(h, public->made);
	} else
		real->C_DestroyObject(h, private->made);
	release(s);
	return rv;
}

EXPORT CK_RV C_GenerateKeyPair(S h, M mech, A t, N n, A u, N m, O *public_made, O *private_made)
{
	struct half public = { .t = t, .n = n }, private = { .t = u, .n = m };
	CK_RV rv = enter("C_GenerateKeyPair", h);
	if (rv != CKR_OK)
		return rv;
	if (mech == NULL || public_made == NULL || private_made == NULL || (t == NULL && n != 0) || (u == NULL && m != 0))
		return CKR_ARGUMENTS_BAD;
	keep_sessions();
	rv = generate_pair(h, mech, &public, &private);
	unkeep_sessions();
	discard(&public.session);
	discard(&private.session);
	if (rv == CKR_OK)
		*public_made = public.made, *private_made = private.made;
	return leave("C_GenerateKeyPair", rv);
}

/* A Luna offers AES key wrapping under numbers of its own (trap 5 of section 5.4). */
static CK_MECHANISM translated(const CK_MECHANISM *mech)
{
	CK_MECHANISM m = *mech;
	if (m.mechanism == CKM_LUNA_AES_KW)
		m.mechanism = CKM_AES_KEY_WRAP;
	else if (m.mechanism == CKM_LUNA_AES_KWP)
		m.mechanism = CKM_AES_KEY_WRAP_PAD;
	return m;
}

static CK_RV do_C_WrapKey(struct session *s, M mech, O with, O key, B out, NP n)
{
	struct tail tail;
	if (mech == NULL || n == NULL)
		return CKR_ARGUMENTS_BAD;
	CK_RV rv = role() == NOBODY ? CKR_USER_NOT_LOGGED_IN : read_tail(s->h, key, &tail, NULL, NULL);
	if (rv == CKR_OBJECT_HANDLE_INVALID)
		return CKR_KEY_HANDLE_INVALID;
	if (rv == CKR_OK && !(tail.flags & EXTRACTABLE))
		return CKR_KEY_UNEXTRACTABLE;
	CK_MECHANISM m = translated(mech);
	return rv == CKR_OK ? real->C_WrapKey(s->h, &m, with, key, out, n) : rv;
}
CALL(C_WrapKey, READ, (S h, M m, O with, O key, B out, NP n), (s, m, with, key, out, n))

static CK_RV do_C_UnwrapKey(struct session *s, M mech, O with, B in, N len, A t, N n, O *out)
{
	struct template made = { .label = NULL };
	struct tail tail;
	unsigned char flags;
	if (mech == NULL || out == NULL)
		return CKR_ARGUMENTS_BAD;
	const CK_ATTRIBUTE *a = t == NULL ? NULL : attribute(t, n, CKA_CLASS);
	if (a == NULL || a->pValue == NULL || a->ulValueLen != sizeof(CK_OBJECT_CLASS))
		return CKR_TEMPLATE_INCOMPLETE;
	CK_OBJECT_CLASS class = *(CK_OBJECT_CLASS *)a->pValue;
	CK_BBOOL token = flag(t, n, CKA_TOKEN, CK_FALSE);
	CK_RV rv = check_template(t, n, class, &flags);
	if (rv == CKR_OK)
		rv = may_make(token);
	if (rv == CKR_OK && !allows(state->token_policy, class == CKO_PRIVATE_KEY ? PRIVATE_UNWRAPPING : SECRET_UNWRAPPING))
		rv = CKR_OPERATION_NOT_ALLOWED;
	if (rv == CKR_OK && token)
		rv = room(1);
	CK_MECHANISM m = translated(mech);
	if (rv == CKR_OK && (rv = new_tail(s->h, flags, &tail)) == CKR_OK && (rv = build(&made, t, n, &tail)) == CKR_OK)
		rv = real->C_UnwrapKey(s->h, &m, with, in, len, made.a, made.n, out);
	discard(&made);
	return rv;
}
CALL(C_UnwrapKey, WRITE, (S h, M m, O with, B in, N len, A t, N n, O *out), (s, m, with, in, len, t, n, out))
