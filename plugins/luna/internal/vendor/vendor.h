/*
 * Luna's own functions, called through pointers that dlsym found. The prototypes are those
 * of Thales' headers: CK_ULONG is an unsigned long, CK_BBOOL one byte, and structures are
 * laid out as the compiler does it, which is right on Linux and would not be on Windows.
 */
#ifndef KMSD_LUNA_VENDOR_H
#define KMSD_LUNA_VENDOR_H

typedef unsigned long ulong_t;
typedef unsigned char byte_t;
typedef void *fn_t;

#define MAX_OBJECTS 64

int find_functions(const char *module, const char **names, fn_t *found, int n);

ulong_t ca_nothing(fn_t f);
ulong_t ca_set_application_id(fn_t f, ulong_t hi, ulong_t lo);
ulong_t ca_firmware(fn_t f, ulong_t slot, ulong_t *major, ulong_t *minor, ulong_t *sub);
ulong_t ca_policies(fn_t f, ulong_t slot, ulong_t *ids, ulong_t *n_ids, ulong_t *values, ulong_t *n_values);
ulong_t ca_session_info(fn_t f, ulong_t h, ulong_t *aid_hi, ulong_t *aid_lo, ulong_t *container, ulong_t *level);
ulong_t ca_container_status(fn_t f, ulong_t slot, ulong_t container, ulong_t *flags, ulong_t *so, ulong_t *officer, ulong_t *user);
ulong_t ca_container_storage(fn_t f, ulong_t slot, ulong_t container, ulong_t five[5]);
ulong_t ca_token_storage(fn_t f, ulong_t slot, ulong_t five[5]);
ulong_t ca_token_object_uid(fn_t f, ulong_t slot, ulong_t type, ulong_t object, byte_t *uid);
ulong_t ca_object_uid(fn_t f, ulong_t slot, ulong_t container, ulong_t type, ulong_t object, byte_t *uid);
ulong_t ca_token_object_handle(fn_t f, ulong_t slot, byte_t *uid, ulong_t *type, ulong_t *object);
ulong_t ca_object_handle(fn_t f, ulong_t slot, ulong_t container, byte_t *uid, ulong_t *type, ulong_t *object);

ulong_t ca_certificate(fn_t f, ulong_t slot, ulong_t type, byte_t *out, ulong_t *n);
ulong_t ca_kev(fn_t f, ulong_t h, byte_t *out, ulong_t *n);
ulong_t ca_source_init(fn_t f, ulong_t h, byte_t *out, ulong_t *n);
ulong_t ca_target_init(fn_t f, ulong_t h, byte_t *in, ulong_t in_size, byte_t *kev, ulong_t kev_size, byte_t *out, ulong_t *n);
ulong_t ca_as_source(fn_t f, ulong_t h, ulong_t type, ulong_t object, byte_t *in, ulong_t in_size, byte_t *out, ulong_t *n);
ulong_t ca_as_target(fn_t f, ulong_t h, byte_t *kev, ulong_t kev_size, byte_t *in, ulong_t in_size, ulong_t type, ulong_t *object);

ulong_t ca_negotiation_start(fn_t f, ulong_t h, ulong_t *step, ulong_t *n, byte_t *out);
ulong_t ca_negotiation_go_on(fn_t f, ulong_t h, ulong_t step, byte_t *in, ulong_t in_size, ulong_t *out_step,
	byte_t *out, ulong_t *n, ulong_t *status, byte_t *tunnel, ulong_t *tunnel_size);
ulong_t ca_negotiation_close(fn_t f, ulong_t h, byte_t *tunnel, ulong_t n);

/*
 * What CA_Extract and CA_Insert share; it holds no pointers, so that it may be Go's memory.
 * CA_Extract has room for n blobs of each bytes, CA_Insert reads them one behind the other.
 */
struct batch {
	ulong_t input_size, tunnel_size, each, n;
	ulong_t objects[MAX_OBJECTS], results[MAX_OBJECTS], sizes[MAX_OBJECTS];
};
ulong_t ca_extract(fn_t f, ulong_t h, struct batch *b, byte_t *input, byte_t *tunnel, byte_t *blobs);
ulong_t ca_insert(fn_t f, ulong_t h, struct batch *b, byte_t *input, byte_t *tunnel, byte_t *blobs);

ulong_t ca_sim_extract(fn_t f, ulong_t h, ulong_t object, byte_t *out, ulong_t *n);
ulong_t ca_sim_insert(fn_t f, ulong_t h, byte_t *in, ulong_t in_size, ulong_t *count, ulong_t *objects);

#endif
