#include "vendor.h"

#include <dlfcn.h>
#include <stddef.h>

/*
 * The library is loaded already, and stays so for as long as the functions are used: this
 * keeps no reference of its own, so that the library can still be unloaded, which is all
 * that mends some of its states.
 */
int find_functions(const char *module, const char **names, fn_t *found, int n)
{
	void *lib = dlopen(module, RTLD_NOW | RTLD_NOLOAD);
	if (lib == NULL)
		return 0;
	for (int i = 0; i < n; i++)
		found[i] = dlsym(lib, names[i]);
	dlclose(lib);
	return 1;
}

/* Element types as the library counts them; the firmware counts otherwise. */
#define CK_CRYPTOKI_ELEMENT 0UL
/* bReplicate: Thales' own sample passes false, and nothing says what true would do. */
#define NO_REPLICATION 0

ulong_t ca_nothing(fn_t f) { return ((ulong_t(*)(void))f)(); }

ulong_t ca_set_application_id(fn_t f, ulong_t hi, ulong_t lo) { return ((ulong_t(*)(ulong_t, ulong_t))f)(hi, lo); }

ulong_t ca_firmware(fn_t f, ulong_t slot, ulong_t *major, ulong_t *minor, ulong_t *sub)
{
	return ((ulong_t(*)(ulong_t, ulong_t *, ulong_t *, ulong_t *))f)(slot, major, minor, sub);
}

ulong_t ca_policies(fn_t f, ulong_t slot, ulong_t *ids, ulong_t *n_ids, ulong_t *values, ulong_t *n_values)
{
	return ((ulong_t(*)(ulong_t, ulong_t *, ulong_t *, ulong_t *, ulong_t *))f)(slot, ids, n_ids, values, n_values);
}

ulong_t ca_session_info(fn_t f, ulong_t h, ulong_t *aid_hi, ulong_t *aid_lo, ulong_t *container, ulong_t *level)
{
	return ((ulong_t(*)(ulong_t, ulong_t *, ulong_t *, ulong_t *, ulong_t *))f)(h, aid_hi, aid_lo, container, level);
}

ulong_t ca_container_status(fn_t f, ulong_t slot, ulong_t container, ulong_t *flags, ulong_t *so, ulong_t *officer, ulong_t *user)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t *, ulong_t *, ulong_t *, ulong_t *))f)(slot, container, flags, so, officer, user);
}

ulong_t ca_container_storage(fn_t f, ulong_t slot, ulong_t container, ulong_t five[5])
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t *, ulong_t *, ulong_t *, ulong_t *, ulong_t *))f)(
		slot, container, &five[0], &five[1], &five[2], &five[3], &five[4]);
}

ulong_t ca_token_storage(fn_t f, ulong_t slot, ulong_t five[5])
{
	return ((ulong_t(*)(ulong_t, ulong_t *, ulong_t *, ulong_t *, ulong_t *, ulong_t *))f)(
		slot, &five[0], &five[1], &five[2], &five[3], &five[4]);
}

ulong_t ca_token_object_uid(fn_t f, ulong_t slot, ulong_t type, ulong_t object, byte_t *uid)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t, byte_t *))f)(slot, type, object, uid);
}

ulong_t ca_object_uid(fn_t f, ulong_t slot, ulong_t container, ulong_t type, ulong_t object, byte_t *uid)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t, ulong_t, byte_t *))f)(slot, container, type, object, uid);
}

ulong_t ca_token_object_handle(fn_t f, ulong_t slot, byte_t *uid, ulong_t *type, ulong_t *object)
{
	return ((ulong_t(*)(ulong_t, byte_t *, ulong_t *, ulong_t *))f)(slot, uid, type, object);
}

ulong_t ca_object_handle(fn_t f, ulong_t slot, ulong_t container, byte_t *uid, ulong_t *type, ulong_t *object)
{
	return ((ulong_t(*)(ulong_t, ulong_t, byte_t *, ulong_t *, ulong_t *))f)(slot, container, uid, type, object);
}

ulong_t ca_certificate(fn_t f, ulong_t slot, ulong_t type, byte_t *out, ulong_t *n)
{
	return ((ulong_t(*)(ulong_t, ulong_t, byte_t *, ulong_t *))f)(slot, type, out, n);
}

ulong_t ca_kev(fn_t f, ulong_t h, byte_t *out, ulong_t *n) { return ((ulong_t(*)(ulong_t, byte_t *, ulong_t *))f)(h, out, n); }

ulong_t ca_source_init(fn_t f, ulong_t h, byte_t *out, ulong_t *n)
{
	return ((ulong_t(*)(ulong_t, byte_t *, ulong_t, byte_t *, ulong_t *, byte_t))f)(h, NULL, 0, out, n, NO_REPLICATION);
}

ulong_t ca_target_init(fn_t f, ulong_t h, byte_t *in, ulong_t in_size, byte_t *kev, ulong_t kev_size, byte_t *out, ulong_t *n)
{
	return ((ulong_t(*)(ulong_t, byte_t *, ulong_t, byte_t *, ulong_t, byte_t, byte_t *, ulong_t *))f)(
		h, in, in_size, kev, kev_size, NO_REPLICATION, out, n);
}

ulong_t ca_as_source(fn_t f, ulong_t h, ulong_t type, ulong_t object, byte_t *in, ulong_t in_size, byte_t *out, ulong_t *n)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t, byte_t *, ulong_t, byte_t, byte_t *, ulong_t *))f)(
		h, type, object, in, in_size, NO_REPLICATION, out, n);
}

ulong_t ca_as_target(fn_t f, ulong_t h, byte_t *kev, ulong_t kev_size, byte_t *in, ulong_t in_size, ulong_t type, ulong_t *object)
{
	return ((ulong_t(*)(ulong_t, byte_t *, ulong_t, byte_t *, ulong_t, ulong_t, ulong_t, byte_t, ulong_t *))f)(
		h, kev, kev_size, in, in_size, type, 0, NO_REPLICATION, object);
}

ulong_t ca_negotiation_start(fn_t f, ulong_t h, ulong_t *step, ulong_t *n, byte_t *out)
{
	return ((ulong_t(*)(ulong_t, ulong_t, byte_t *, ulong_t *, ulong_t *, byte_t *))f)(h, 0, NULL, step, n, out);
}

/*
 * Twelve parameters, two of them for the identity of a tunnel that goes in. There are versions
 * of Thales' Python binding that call it with ten, without those two. Whether there are clients
 * that want ten is not known: on one, the driver would crash in its first CPv4 transfer.
 */
ulong_t ca_negotiation_go_on(fn_t f, ulong_t h, ulong_t step, byte_t *in, ulong_t in_size, ulong_t *out_step,
	byte_t *out, ulong_t *n, ulong_t *status, byte_t *tunnel, ulong_t *tunnel_size)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t, byte_t *, ulong_t, byte_t *, ulong_t *, ulong_t *, byte_t *,
		ulong_t *, ulong_t *, byte_t *))f)(h, step, in_size, in, 0, NULL, out_step, n, out, status, tunnel_size, tunnel);
}

ulong_t ca_negotiation_close(fn_t f, ulong_t h, byte_t *tunnel, ulong_t n)
{
	return ((ulong_t(*)(ulong_t, ulong_t, byte_t *))f)(h, n, tunnel);
}

struct mechanism {
	ulong_t type;
	void *parameter;
	ulong_t size;
};

#define CKM_CPV4_EXTRACT 0x80000208UL
#define CKM_CPV4_INSERT 0x80000209UL
#define CKF_CPV4_CONTINUE_ON_ERR 1UL
/* storageType: Thales' test passes 1 for objects that stay; no other value is known. */
#define ON_TOKEN 1UL

/* CK_CPV4_EXTRACT_PARAMS */
struct extract {
	ulong_t input_size;
	byte_t *input;
	ulong_t tunnel_size;
	byte_t *tunnel;
	ulong_t flags, n;
	ulong_t *types, *objects, *results, *sizes;
	byte_t **blobs;
};

/* CK_CPV4_INSERT_PARAMS: not the same order. */
struct insert {
	ulong_t input_size;
	byte_t *input;
	ulong_t tunnel_size;
	byte_t *tunnel;
	ulong_t flags, n;
	ulong_t *types, *storage, *sizes;
	byte_t **blobs;
	ulong_t *results, *objects;
};

ulong_t ca_extract(fn_t f, ulong_t h, struct batch *b, byte_t *input, byte_t *tunnel, byte_t *blobs)
{
	ulong_t types[MAX_OBJECTS];
	byte_t *each[MAX_OBJECTS];
	for (ulong_t i = 0; i < b->n; i++) {
		types[i] = CK_CRYPTOKI_ELEMENT;
		each[i] = blobs + i * b->each;
	}
	struct extract p = {b->input_size, input, b->tunnel_size, tunnel, CKF_CPV4_CONTINUE_ON_ERR, b->n,
		types, b->objects, b->results, b->sizes, each};
	struct mechanism m = {CKM_CPV4_EXTRACT, &p, sizeof p};
	return ((ulong_t(*)(ulong_t, struct mechanism *))f)(h, &m);
}

ulong_t ca_insert(fn_t f, ulong_t h, struct batch *b, byte_t *input, byte_t *tunnel, byte_t *blobs)
{
	ulong_t types[MAX_OBJECTS], storage[MAX_OBJECTS];
	byte_t *each[MAX_OBJECTS];
	for (ulong_t i = 0, at = 0; i < b->n; i++) {
		types[i] = CK_CRYPTOKI_ELEMENT;
		storage[i] = ON_TOKEN;
		each[i] = blobs + at;
		at += b->sizes[i];
	}
	struct insert p = {b->input_size, input, b->tunnel_size, tunnel, CKF_CPV4_CONTINUE_ON_ERR, b->n,
		types, storage, b->sizes, each, b->results, b->objects};
	struct mechanism m = {CKM_CPV4_INSERT, &p, sizeof p};
	return ((ulong_t(*)(ulong_t, struct mechanism *))f)(h, &m);
}

/* One object, without authorisation. It is never deleted: a power failure in between
   would lose the key. */
ulong_t ca_sim_extract(fn_t f, ulong_t h, ulong_t object, byte_t *out, ulong_t *n)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t *, ulong_t, ulong_t, ulong_t, ulong_t *, byte_t **, byte_t, ulong_t *, byte_t *))f)(
		h, 1, &object, 0, 0, 0, NULL, NULL, 0, n, out);
}

ulong_t ca_sim_insert(fn_t f, ulong_t h, byte_t *in, ulong_t in_size, ulong_t *count, ulong_t *objects)
{
	return ((ulong_t(*)(ulong_t, ulong_t, ulong_t, ulong_t *, byte_t **, ulong_t, byte_t *, ulong_t *, ulong_t *))f)(
		h, 0, 0, NULL, NULL, in_size, in, count, objects);
}
