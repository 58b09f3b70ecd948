/*
 * Templates: what a caller may ask for, and what SoftHSM gets instead.
 *
 * A key lies in SoftHSM as one that may be read, so that this library can clone it. It
 * claims to be what a Luna's keys are, and its value is given to nobody. The OUID, and
 * what else has to be known of an object, stand behind its label.
 */
#include "sim.h"

#include <stdlib.h>

static CK_BBOOL yes = CK_TRUE, no = CK_FALSE;

const CK_ATTRIBUTE *attribute(const CK_ATTRIBUTE *t, N n, CK_ATTRIBUTE_TYPE type)
{
	for (N i = 0; i < n; i++)
		if (t[i].type == type)
			return &t[i];
	return NULL;
}

CK_BBOOL flag(const CK_ATTRIBUTE *t, N n, CK_ATTRIBUTE_TYPE type, CK_BBOOL otherwise)
{
	const CK_ATTRIBUTE *a = attribute(t, n, type);
	return a == NULL || a->pValue == NULL || a->ulValueLen != sizeof(CK_BBOOL) ? otherwise : *(CK_BBOOL *)a->pValue;
}

/* Whether keys of a class may leave the partition wrapped: key-export partitions (row 36). */
static int exports(CK_OBJECT_CLASS class)
{
	return allows(state->token_policy, class == CKO_PRIVATE_KEY ? PRIVATE_WRAPPING : SECRET_WRAPPING);
}

static CK_RV check_one(const CK_ATTRIBUTE *a, int managed, CK_OBJECT_CLASS class)
{
	switch (a->type) {
	case CKA_OUID:
	case CKA_LOCAL:
	case CKA_ALWAYS_SENSITIVE:
	case CKA_NEVER_EXTRACTABLE:
	case CKA_KEY_GEN_MECHANISM:
		return CKR_ATTRIBUTE_READ_ONLY;
	case CKA_TOKEN:
	case CKA_PRIVATE:
	case CKA_SENSITIVE:
	case CKA_EXTRACTABLE:
		if (a->ulValueLen != sizeof(CK_BBOOL))
			return CKR_ATTRIBUTE_VALUE_INVALID;
	}
	/* W53: a Luna refuses keys that are not what it makes. */
	CK_BBOOL v = a->ulValueLen == sizeof(CK_BBOOL) && *(CK_BBOOL *)a->pValue;
	if (managed && !v && (a->type == CKA_SENSITIVE || a->type == CKA_PRIVATE))
		return CKR_ATTRIBUTE_VALUE_INVALID;
	if (managed && v && a->type == CKA_EXTRACTABLE && !exports(class))
		return CKR_ATTRIBUTE_VALUE_INVALID;
	return CKR_OK;
}

/* Checks a template for an object of a class and says what is to be kept of it. */
CK_RV check_template(const CK_ATTRIBUTE *t, N n, CK_OBJECT_CLASS class, unsigned char *flags)
{
	int managed = class == CKO_SECRET_KEY || class == CKO_PRIVATE_KEY;
	if (t == NULL && n != 0)
		return CKR_ARGUMENTS_BAD;
	*flags = managed ? MANAGED : 0;
	for (N i = 0; i < n; i++) {
		if (t[i].pValue == NULL && t[i].ulValueLen != 0)
			return CKR_ATTRIBUTE_VALUE_INVALID;
		CK_RV rv = check_one(&t[i], managed, class);
		if (rv != CKR_OK)
			return rv;
	}
	if (managed && flag(t, n, CKA_EXTRACTABLE, CK_FALSE))
		*flags |= EXTRACTABLE;
	return CKR_OK;
}

CK_RV new_tail(S h, unsigned char flags, struct tail *tail)
{
	tail->flags = flags;
	return real->C_GenerateRandom(h, tail->ouid, OUID_SIZE);
}

void add(struct template *out, CK_ATTRIBUTE_TYPE type, void *value, N len)
{
	if (out->n < sizeof out->a / sizeof *out->a)
		out->a[out->n++] = (CK_ATTRIBUTE){ type, value, len };
}

/* Writes what SoftHSM is to be given for a template that was checked. */
CK_RV build(struct template *out, const CK_ATTRIBUTE *t, N n, const struct tail *tail)
{
	const CK_ATTRIBUTE *label = attribute(t, n, CKA_LABEL);
	N len = label ? label->ulValueLen : 0;
	memset(out, 0, sizeof *out);
	out->token = flag(t, n, CKA_TOKEN, CK_FALSE);
	if (n > sizeof out->a / sizeof *out->a - 5)
		return CKR_TEMPLATE_INCONSISTENT;
	if (len > 4096)
		return CKR_ATTRIBUTE_VALUE_INVALID;
	if ((out->label = calloc(1, len + TAIL_SIZE)) == NULL)
		return CKR_HOST_MEMORY;
	if (len > 0)
		memcpy(out->label, label->pValue, len);
	out->label[len + 1] = tail->flags;
	memcpy(out->label + len + 2, tail->ouid, OUID_SIZE);
	for (N i = 0; i < n; i++) {
		int managed = tail->flags & MANAGED;
		CK_ATTRIBUTE_TYPE type = t[i].type;
		if (type == CKA_LABEL || type == CKA_TOKEN ||
		    (managed && (type == CKA_SENSITIVE || type == CKA_EXTRACTABLE || type == CKA_PRIVATE)))
			continue;
		add(out, type, t[i].pValue, t[i].ulValueLen);
	}
	add(out, CKA_LABEL, out->label, len + TAIL_SIZE);
	add(out, CKA_TOKEN, &out->token, sizeof out->token);
	if (tail->flags & MANAGED) {
		add(out, CKA_PRIVATE, &yes, sizeof yes);
		add(out, CKA_SENSITIVE, &no, sizeof no);
		add(out, CKA_EXTRACTABLE, &yes, sizeof yes);
	}
	return CKR_OK;
}

void discard(struct template *t) { free(t->label); }
