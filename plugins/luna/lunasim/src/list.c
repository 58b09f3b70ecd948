/* The table that C_GetFunctionList gives. What a driver of keys has no use for is not supported. */
#include "sim.h"

#define UNSUPPORTED(name, parameters) \
	EXPORT CK_RV name parameters { return CKR_FUNCTION_NOT_SUPPORTED; }

#pragma GCC diagnostic ignored "-Wunused-parameter"
UNSUPPORTED(C_InitToken, (CK_SLOT_ID slot, B pin, N n, B label))
UNSUPPORTED(C_InitPIN, (S h, B pin, N n))
UNSUPPORTED(C_SetPIN, (S h, B old, N n, B pin, N m))
UNSUPPORTED(C_GetOperationState, (S h, B out, NP n))
UNSUPPORTED(C_SetOperationState, (S h, B in, N n, O a, O b))
UNSUPPORTED(C_DigestKey, (S h, O key))
UNSUPPORTED(C_SignRecoverInit, (S h, M m, O k))
UNSUPPORTED(C_SignRecover, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_VerifyRecoverInit, (S h, M m, O k))
UNSUPPORTED(C_VerifyRecover, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_DigestEncryptUpdate, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_DecryptDigestUpdate, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_SignEncryptUpdate, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_DecryptVerifyUpdate, (S h, B in, N len, B out, NP n))
UNSUPPORTED(C_DeriveKey, (S h, M m, O k, A t, N n, O *out))
UNSUPPORTED(C_GetFunctionStatus, (S h))
UNSUPPORTED(C_CancelFunction, (S h))
UNSUPPORTED(C_WaitForSlotEvent, (CK_FLAGS flags, CK_SLOT_ID_PTR slot, CK_VOID_PTR reserved))

static CK_FUNCTION_LIST list = {
	.version = { 2, 40 },
#define CK_PKCS11_FUNCTION_INFO(name) .name = name,
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
};

EXPORT CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	if (out == NULL)
		return CKR_ARGUMENTS_BAD;
	*out = &list;
	return CKR_OK;
}
