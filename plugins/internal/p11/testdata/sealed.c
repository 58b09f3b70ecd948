/*
 * A PKCS#11 library whose secret and private keys say that they cannot be extracted,
 * whatever the token beneath (REAL, given to the compiler) has of them, so that tests can
 * move such keys by a protocol of their own: they wrap them after all. It knows a second
 * user, LIMITED, who has the user's PIN, may use keys, and may make none.
 */
#include <dlfcn.h>
#include <string.h>

#include "pkcs11go.h"

#define MOST 64
#define LIMITED 0x80000001UL
#define NOT_AUTHORIZED 0x8000001AUL

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;
static CK_BBOOL yes = CK_TRUE;
static int limited; /* whether LIMITED logged in last */

/* The template with every CKA_EXTRACTABLE set. */
static CK_ATTRIBUTE_PTR opened(CK_ATTRIBUTE_PTR in, CK_ULONG n, CK_ATTRIBUTE_PTR out)
{
	if (n > MOST)
		return in;
	memcpy(out, in, n * sizeof *in);
	for (CK_ULONG i = 0; i < n; i++)
		if (out[i].type == CKA_EXTRACTABLE)
			out[i].pValue = &yes;
	return out;
}

static CK_RV generate(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR o)
{
	CK_ATTRIBUTE room[MOST];
	if (limited)
		return NOT_AUTHORIZED;
	return real->C_GenerateKey(s, m, opened(a, n, room), n, o);
}

static CK_RV generate_pair(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR pub, CK_ULONG npub,
	CK_ATTRIBUTE_PTR priv, CK_ULONG npriv, CK_OBJECT_HANDLE_PTR hpub, CK_OBJECT_HANDLE_PTR hpriv)
{
	CK_ATTRIBUTE room[MOST];
	return real->C_GenerateKeyPair(s, m, pub, npub, opened(priv, npriv, room), npriv, hpub, hpriv);
}

static CK_RV create(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR o)
{
	CK_ATTRIBUTE room[MOST];
	return real->C_CreateObject(s, opened(a, n, room), n, o);
}

static CK_RV unwrap(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE by, CK_BYTE_PTR in, CK_ULONG len,
	CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR o)
{
	CK_ATTRIBUTE room[MOST];
	return real->C_UnwrapKey(s, m, by, in, len, opened(a, n, room), n, o);
}

static CK_RV login(CK_SESSION_HANDLE s, CK_USER_TYPE u, CK_UTF8CHAR_PTR pin, CK_ULONG n)
{
	limited = u == LIMITED;
	return real->C_Login(s, limited ? CKU_USER : u, pin, n);
}

static CK_RV session_info(CK_SESSION_HANDLE s, CK_SESSION_INFO_PTR i)
{
	CK_RV rv = real->C_GetSessionInfo(s, i);
	if (rv == CKR_OK && limited && i->state == CKS_RW_USER_FUNCTIONS)
		i->state = CKS_RO_USER_FUNCTIONS;
	return rv;
}

static CK_RV get(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o, CK_ATTRIBUTE_PTR a, CK_ULONG n)
{
	CK_RV rv = real->C_GetAttributeValue(s, o, a, n);
	for (CK_ULONG i = 0; rv == CKR_OK && i < n; i++)
		if (a[i].type == CKA_EXTRACTABLE && a[i].pValue != NULL && a[i].ulValueLen == 1)
			*(CK_BBOOL *)a[i].pValue = CK_FALSE;
	return rv;
}

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	void *lib = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
	CK_RV (*functions)(CK_FUNCTION_LIST_PTR_PTR);
	if (lib == NULL)
		return CKR_GENERAL_ERROR;
	*(void **)&functions = dlsym(lib, "C_GetFunctionList");
	if (functions == NULL || functions(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	list = *real;
	list.C_GenerateKey = generate;
	list.C_GenerateKeyPair = generate_pair;
	list.C_CreateObject = create;
	list.C_UnwrapKey = unwrap;
	list.C_GetAttributeValue = get;
	list.C_Login = login;
	list.C_GetSessionInfo = session_info;
	*out = &list;
	return CKR_OK;
}
