/*
 * A library whose functions of its own lie about sizes, as CASE says. Nothing of PKCS#11 is
 * in it but the function that a loader looks for.
 */
#include <stddef.h>
#include <string.h>

typedef unsigned long N;
typedef unsigned char B;

enum { OK = 0, TOO_SMALL = 0x150 };

N C_GetFunctionList(void **list)
{
	static N functions[80];
	*list = functions;
	return OK;
}

static int calls;

/* A two-call function. */
static N lie(B *out, N *n)
{
	calls++;
#if CASE == 1 /* asks for more than there is */
	(void)out;
	*n = (N)1 << 60;
	return OK;
#elif CASE == 2 /* has written more than there was room for, it says */
	*n = out == NULL ? 4 : 400;
	return OK;
#elif CASE == 3 /* changes its mind once */
	N want = calls < 2 ? 4 : 8;
	if (out != NULL && *n < want) {
		*n = want;
		return TOO_SMALL;
	}
	if (out != NULL)
		memset(out, 7, want);
	*n = want;
	return OK;
#elif CASE == 4 /* is never content */
	if (out == NULL)
		return *n = 4, OK;
	*n *= 2;
	return TOO_SMALL;
#elif CASE == 5 /* asks for nothing */
	(void)out;
	*n = 0;
	return OK;
#endif
}

N CA_GenerateCloningKEV(N h, B *out, N *n) { (void)h; return lie(out, n); }

N CA_MigrationStartSessionNegotiation(N h, N len, B *in, N *step, N *n, B *out)
{
	(void)h, (void)len, (void)in;
	*step = 2;
	return lie(out, n);
}

N CA_MigrationContinueSessionNegotiation(N h, N step, N len, B *in, N ouid_len, B *ouid, N *next, N *n, B *out, N *status, N *tunnel_len, B *tunnel)
{
	(void)h, (void)step, (void)len, (void)in, (void)ouid_len, (void)ouid, (void)out, (void)tunnel;
	*next = 3, *status = 0, *n = 8;
	*tunnel_len = (N)1 << 40;
	return OK;
}

struct mechanism { N type; void *parameter; N size; };
struct extract { N in_len; B *in; N tunnel_len; B *tunnel; N flags, n; N *types, *objects, *results, *sizes; B **blobs; };

N CA_Extract(N h, struct mechanism *m)
{
	(void)h;
	struct extract *p = m->parameter;
	for (N i = 0; i < p->n; i++)
		p->results[i] = OK, p->sizes[i] = (N)1 << 40;
	return OK;
}

N CA_GetTokenPolicies(N slot, N *ids, N *n, N *values, N *m)
{
	(void)slot, (void)ids, (void)values;
	*n = *m = (N)1 << 50;
	return OK;
}

/* Answers more policies in the second call than in the first, and writes none beyond. */
N CA_GetHSMPolicySet(N slot, N *ids, N *n, N *values, N *m)
{
	(void)slot;
	if (ids == NULL)
		return *n = *m = 1, OK;
	ids[0] = 7, values[0] = 1;
	*n = *m = 1000000;
	return OK;
}

/* Changes its mind once: has more when it is asked for them, and never stops where CASE is 4. */
N CA_GetTokenCapabilities(N slot, N *ids, N *n, N *values, N *m)
{
	(void)slot;
	if (ids == NULL)
		return *n = *m = 1, OK;
	if (*n < 2 || CASE == 4)
		return *n *= 2, *m = *n, TOO_SMALL;
	ids[0] = 4, ids[1] = 7, values[0] = 1, values[1] = 0;
	*n = *m = 2;
	return OK;
}

/* Says that it has written three, and has written one. */
N CA_GetHSMCapabilitySet(N slot, N *ids, N *n, N *values, N *m)
{
	(void)slot;
	if (ids != NULL)
		ids[0] = 7, values[0] = 1;
	*n = *m = 3;
	return OK;
}

N CA_SIMInsert(N h, N m, N form, N *sizes, B **secrets, N len, B *blob, N *count, N *objects)
{
	(void)h, (void)m, (void)form, (void)sizes, (void)secrets, (void)len, (void)blob;
	objects[0] = 1;
	*count = 5;
	return OK;
}
