/*
 * Writes the true bytes of every secret and private key of a SoftHSM token, a line
 * each: the CKA_ID and the value, both in hexadecimal. It reads past the library of this
 * directory, in whose name no key can be read. keydump LIBRARY PIN
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pkcs11go.h"

static CK_FUNCTION_LIST_PTR real;
static CK_SESSION_HANDLE session;

static void hex(const unsigned char *p, CK_ULONG n, char after)
{
	for (CK_ULONG i = 0; i < n; i++)
		printf("%02x", p[i]);
	putchar(after);
}

static int show(CK_OBJECT_HANDLE o, CK_ATTRIBUTE_TYPE type)
{
	unsigned char id[256], value[8192];
	CK_ATTRIBUTE a[] = { { CKA_ID, id, sizeof id }, { type, value, sizeof value } };
	if (real->C_GetAttributeValue(session, o, a, 2) != CKR_OK)
		return 0;
	hex(id, a[0].ulValueLen, ' ');
	hex(value, a[1].ulValueLen, '\n');
	return 1;
}

static int dump(CK_OBJECT_CLASS class)
{
	/* A process that was killed while it made an object may have left one that is on no token yet. */
	CK_BBOOL yes = CK_TRUE;
	CK_ATTRIBUTE want[] = { { CKA_CLASS, &class, sizeof class }, { CKA_TOKEN, &yes, sizeof yes } };
	CK_OBJECT_HANDLE o;
	CK_ULONG n = 1;
	if (real->C_FindObjectsInit(session, want, 2) != CKR_OK)
		return 0;
	while (real->C_FindObjects(session, &o, 1, &n) == CKR_OK && n == 1)
		if (!show(o, CKA_PRIVATE_EXPONENT) && !show(o, CKA_VALUE))
			return 0;
	return real->C_FindObjectsFinal(session) == CKR_OK;
}

int main(int argc, char **argv)
{
	CK_SLOT_ID slots[16];
	CK_ULONG n = 16;
	void *lib = argc == 3 ? dlopen(argv[1], RTLD_NOW) : NULL;
	CK_C_GetFunctionList list = lib ? (CK_C_GetFunctionList)dlsym(lib, "C_GetFunctionList") : NULL;
	if (list == NULL || list(&real) != CKR_OK || real->C_Initialize(NULL) != CKR_OK ||
	    real->C_GetSlotList(CK_TRUE, slots, &n) != CKR_OK || n == 0 ||
	    real->C_OpenSession(slots[0], CKF_SERIAL_SESSION, NULL, NULL, &session) != CKR_OK ||
	    real->C_Login(session, CKU_USER, (CK_BYTE_PTR)argv[2], strlen(argv[2])) != CKR_OK ||
	    !dump(CKO_SECRET_KEY) || !dump(CKO_PRIVATE_KEY)) {
		fprintf(stderr, "the keys cannot be read\n");
		return EXIT_FAILURE;
	}
	real->C_Finalize(NULL);
	return EXIT_SUCCESS;
}
