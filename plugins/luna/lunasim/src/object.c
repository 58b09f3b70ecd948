/* Objects: their attributes, their OUIDs, how they are found, copied and destroyed. */
#include "sim.h"

#include <stdlib.h>

CK_RV class_of(S h, O o, CK_OBJECT_CLASS *class)
{
	CK_ATTRIBUTE a = { CKA_CLASS, class, sizeof *class };
	return real->C_GetAttributeValue(h, o, &a, 1);
}

CK_RV is_token(S h, O o, CK_BBOOL *token)
{
	CK_ATTRIBUTE a = { CKA_TOKEN, token, sizeof *token };
	return real->C_GetAttributeValue(h, o, &a, 1);
}

/* Reads an attribute as SoftHSM has it. The caller frees the value. */
CK_RV read_attribute(S h, O o, CK_ATTRIBUTE_TYPE type, unsigned char **value, N *len)
{
	CK_ATTRIBUTE a = { type, NULL, 0 };
	CK_RV rv = real->C_GetAttributeValue(h, o, &a, 1);
	*value = NULL;
	if (rv != CKR_OK)
		return rv;
	if (a.ulValueLen == CK_UNAVAILABLE_INFORMATION)
		return CKR_ATTRIBUTE_TYPE_INVALID;
	if ((a.pValue = calloc(1, a.ulValueLen + 1)) == NULL)
		return CKR_HOST_MEMORY;
	if ((rv = real->C_GetAttributeValue(h, o, &a, 1)) != CKR_OK) {
		free(a.pValue);
		return rv;
	}
	*value = a.pValue, *len = a.ulValueLen;
	return CKR_OK;
}

/* Reads what stands behind the label, and the label where it is asked for. */
CK_RV read_tail(S h, O o, struct tail *tail, unsigned char **label, N *label_len)
{
	unsigned char *v;
	N n;
	CK_RV rv = read_attribute(h, o, CKA_LABEL, &v, &n);
	if (rv != CKR_OK)
		return rv;
	if (n < TAIL_SIZE) {
		free(v);
		return CKR_OBJECT_HANDLE_INVALID; /* not one of ours */
	}
	n -= TAIL_SIZE;
	tail->flags = v[n + 1];
	memcpy(tail->ouid, v + n + 2, OUID_SIZE);
	if (label == NULL)
		free(v);
	else
		*label = v, *label_len = n;
	return CKR_OK;
}

/* Puts a value where the caller wants it (PKCS#11 2.40, C_GetAttributeValue). */
static CK_RV answer(CK_ATTRIBUTE *a, const void *value, N len)
{
	if (a->pValue == NULL) {
		a->ulValueLen = len;
		return CKR_OK;
	}
	if (a->ulValueLen < len) {
		a->ulValueLen = CK_UNAVAILABLE_INFORMATION;
		return CKR_BUFFER_TOO_SMALL;
	}
	memcpy(a->pValue, value, len);
	a->ulValueLen = len;
	return CKR_OK;
}

static int secret_value(CK_ATTRIBUTE_TYPE type)
{
	switch (type) {
	case CKA_VALUE:
	case CKA_PRIVATE_EXPONENT:
	case CKA_PRIME_1:
	case CKA_PRIME_2:
	case CKA_EXPONENT_1:
	case CKA_EXPONENT_2:
	case CKA_COEFFICIENT:
		return 1;
	}
	return 0;
}

/* SoftHSM 2.6.1 does not know the length of a key that it has unwrapped. */
static CK_RV value_len(S h, O o, CK_ATTRIBUTE *a)
{
	CK_ATTRIBUTE value = { CKA_VALUE, NULL, 0 };
	CK_RV rv = real->C_GetAttributeValue(h, o, &value, 1);
	return rv == CKR_OK ? answer(a, &value.ulValueLen, sizeof value.ulValueLen) : rv;
}

/* Answers what a Luna's key says of itself, whatever SoftHSM has. */
static CK_RV claimed(S h, O o, CK_ATTRIBUTE *a, const struct tail *tail, CK_OBJECT_CLASS class)
{
	CK_BBOOL out = (tail->flags & EXTRACTABLE) != 0;
	switch (a->type) {
	case CKA_SENSITIVE:
	case CKA_ALWAYS_SENSITIVE:
		out = CK_TRUE;
		break;
	case CKA_NEVER_EXTRACTABLE:
		out = !out;
		break;
	case CKA_EXTRACTABLE:
		break;
	default:
		if (secret_value(a->type)) {
			a->ulValueLen = CK_UNAVAILABLE_INFORMATION;
			return CKR_ATTRIBUTE_SENSITIVE;
		}
		if (a->type == CKA_VALUE_LEN && class == CKO_SECRET_KEY)
			return value_len(h, o, a);
		return real->C_GetAttributeValue(h, o, a, 1);
	}
	return answer(a, &out, sizeof out);
}

static int special(CK_ATTRIBUTE_TYPE type)
{
	return type == CKA_SENSITIVE || type == CKA_ALWAYS_SENSITIVE || type == CKA_NEVER_EXTRACTABLE ||
	       type == CKA_EXTRACTABLE || type == CKA_VALUE_LEN || secret_value(type);
}

static CK_RV one_attribute(S h, O o, CK_ATTRIBUTE *a)
{
	struct tail tail;
	CK_OBJECT_CLASS class;
	CK_RV rv;
	if (a->type == CKA_LABEL) {
		unsigned char *label;
		N len;
		if ((rv = read_tail(h, o, &tail, &label, &len)) == CKR_OK) {
			rv = answer(a, label, len);
			free(label);
		}
		return rv;
	}
	if (a->type == CKA_OUID)
		return (rv = read_tail(h, o, &tail, NULL, NULL)) == CKR_OK ? answer(a, tail.ouid, OUID_SIZE) : rv;
	if (!special(a->type))
		return real->C_GetAttributeValue(h, o, a, 1);
	if ((rv = class_of(h, o, &class)) != CKR_OK || (rv = read_tail(h, o, &tail, NULL, NULL)) != CKR_OK)
		return rv;
	return tail.flags & MANAGED ? claimed(h, o, a, &tail, class) : real->C_GetAttributeValue(h, o, a, 1);
}

CK_RV attributes(S h, O o, A t, N n)
{
	CK_RV worst = CKR_OK;
	if (t == NULL)
		return CKR_ARGUMENTS_BAD;
	for (N i = 0; i < n; i++) {
		CK_RV rv = one_attribute(h, o, &t[i]);
		if (rv == CKR_OK)
			continue;
		if (rv != CKR_ATTRIBUTE_SENSITIVE && rv != CKR_ATTRIBUTE_TYPE_INVALID && rv != CKR_BUFFER_TOO_SMALL)
			return rv;
		t[i].ulValueLen = CK_UNAVAILABLE_INFORMATION;
		worst = rv;
	}
	return worst;
}

static CK_RV do_C_GetAttributeValue(struct session *s, O o, A t, N n) { return attributes(s->h, o, t, n); }
CALL(C_GetAttributeValue, READ, (S h, O o, A t, N n), (s, o, t, n))

/* Writes a label with its tail. */
static CK_RV relabel(S h, O o, const void *label, N len, const struct tail *tail)
{
	CK_ATTRIBUTE a = { CKA_LABEL, (void *)label, len };
	struct template made;
	CK_RV rv = build(&made, &a, 1, tail);
	if (rv == CKR_OK) {
		a = (CK_ATTRIBUTE){ CKA_LABEL, made.label, len + TAIL_SIZE };
		rv = real->C_SetAttributeValue(h, o, &a, 1);
	}
	discard(&made);
	return rv;
}

static CK_RV set_attributes(S h, O o, A t, N n, const struct tail *tail)
{
	CK_RV rv = CKR_OK;
	if (attribute(t, n, CKA_TOKEN) != NULL || attribute(t, n, CKA_PRIVATE) != NULL ||
	    (flag(t, n, CKA_EXTRACTABLE, CK_FALSE) && !(tail->flags & EXTRACTABLE)))
		return CKR_ATTRIBUTE_READ_ONLY;
	if (!flag(t, n, CKA_EXTRACTABLE, CK_TRUE) && (tail->flags & EXTRACTABLE))
		return CKR_ATTRIBUTE_READ_ONLY; /* guess: it was made to leave, and may */
	for (N i = 0; rv == CKR_OK && i < n; i++)
		if (t[i].type != CKA_LABEL && t[i].type != CKA_SENSITIVE && t[i].type != CKA_EXTRACTABLE)
			rv = real->C_SetAttributeValue(h, o, &t[i], 1);
	const CK_ATTRIBUTE *label = attribute(t, n, CKA_LABEL);
	if (rv == CKR_OK && label != NULL)
		rv = relabel(h, o, label->pValue, label->ulValueLen, tail);
	return rv;
}

static CK_RV do_C_SetAttributeValue(struct session *s, O o, A t, N n)
{
	struct tail tail;
	CK_OBJECT_CLASS class;
	CK_BBOOL token;
	unsigned char flags;
	CK_RV rv;
	if ((rv = class_of(s->h, o, &class)) != CKR_OK || (rv = is_token(s->h, o, &token)) != CKR_OK ||
	    (rv = may_make(token)) != CKR_OK || (rv = read_tail(s->h, o, &tail, NULL, NULL)) != CKR_OK ||
	    (rv = check_template(t, n, class, &flags)) != CKR_OK)
		return rv;
	return set_attributes(s->h, o, t, n, &tail);
}
CALL(C_SetAttributeValue, WRITE, (S h, O o, A t, N n), (s, o, t, n))

static CK_RV do_C_DestroyObject(struct session *s, O o)
{
	CK_BBOOL token;
	CK_RV rv = is_token(s->h, o, &token);
	if (rv == CKR_OK)
		rv = may_make(token);
	return rv == CKR_OK ? real->C_DestroyObject(s->h, o) : rv;
}
CALL(C_DestroyObject, WRITE, (S h, O o), (s, o))

/* Whether there is room for so many objects more. */
CK_RV room(N more)
{
	N objects, bytes, most = sw(SW_LIMIT_OBJECTS), most_bytes = sw(SW_LIMIT_BYTES);
	if (most == 0 && most_bytes == 0)
		return CKR_OK;
	storage(&objects, &bytes);
	int full = (most != 0 && objects + more > most) || (most_bytes != 0 && bytes >= most_bytes);
	return full ? CKR_CONTAINER_OBJECT_STORAGE_FULL : CKR_OK;
}

static CK_RV do_C_CopyObject(struct session *s, O from, A t, N n, O *out)
{
	struct tail tail, old;
	CK_OBJECT_CLASS class;
	CK_BBOOL token;
	unsigned char flags, *label;
	N len;
	CK_RV rv;
	if (out == NULL)
		return CKR_ARGUMENTS_BAD;
	if (n > 29)
		return CKR_TEMPLATE_INCONSISTENT;
	if (!sw(SW_COPY))
		return CKR_FUNCTION_NOT_SUPPORTED; /* guess */
	if ((rv = class_of(s->h, from, &class)) != CKR_OK || (rv = is_token(s->h, from, &token)) != CKR_OK ||
	    (rv = check_template(t, n, class, &flags)) != CKR_OK || (rv = read_tail(s->h, from, &old, &label, &len)) != CKR_OK)
		return rv;
	token = flag(t, n, CKA_TOKEN, token);
	struct template made = { .label = NULL };
	CK_ATTRIBUTE all[32];
	N m = 0;
	for (; m < n; m++)
		all[m] = t[m];
	if (attribute(t, n, CKA_LABEL) == NULL)
		all[m++] = (CK_ATTRIBUTE){ CKA_LABEL, label, len };
	if (attribute(t, n, CKA_TOKEN) == NULL)
		all[m++] = (CK_ATTRIBUTE){ CKA_TOKEN, &token, sizeof token };
	flags = attribute(t, n, CKA_EXTRACTABLE) != NULL ? flags & old.flags : old.flags;
	if ((rv = may_make(token)) == CKR_OK && (rv = token ? room(1) : CKR_OK) == CKR_OK &&
	    (rv = new_tail(s->h, flags, &tail)) == CKR_OK && (rv = build(&made, all, m, &tail)) == CKR_OK)
		rv = real->C_CopyObject(s->h, from, made.a, made.n, out);
	discard(&made);
	free(label);
	return rv;
}
CALL(C_CopyObject, WRITE, (S h, O o, A t, N n, O *out), (s, o, t, n, out))

static CK_RV do_C_CreateObject(struct session *s, A t, N n, O *out)
{
	unsigned char flags;
	struct tail tail;
	struct template made = { .label = NULL };
	if (out == NULL || t == NULL)
		return CKR_ARGUMENTS_BAD;
	const CK_ATTRIBUTE *a = attribute(t, n, CKA_CLASS);
	if (a == NULL || a->pValue == NULL || a->ulValueLen != sizeof(CK_OBJECT_CLASS))
		return CKR_TEMPLATE_INCOMPLETE;
	CK_OBJECT_CLASS class = *(CK_OBJECT_CLASS *)a->pValue;
	CK_BBOOL token = flag(t, n, CKA_TOKEN, CK_FALSE);
	CK_RV rv = may_make(token);
	if (rv == CKR_OK)
		rv = check_template(t, n, class, &flags);
	/* A key's value comes in from outside: not in FIPS mode, and never onto the token (guess). */
	if (rv == CKR_OK && (flags & MANAGED) && (fips() || token || !sw(SW_CREATE_SECRETS)))
		rv = CKR_TEMPLATE_INCONSISTENT;
	if (rv == CKR_OK && token)
		rv = room(1);
	if (rv == CKR_OK && (rv = new_tail(s->h, flags, &tail)) == CKR_OK && (rv = build(&made, t, n, &tail)) == CKR_OK)
		rv = real->C_CreateObject(s->h, made.a, made.n, out);
	discard(&made);
	return rv;
}
CALL(C_CreateObject, WRITE, (S h, A t, N n, O *out), (s, t, n, out))
