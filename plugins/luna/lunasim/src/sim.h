/*
 * What the parts of the library know of each other. Every function that takes a
 * struct session is called with that session held (session.c).
 *
 * Rows, sections and letters in comments are what a rule stands on; README.md, a folder
 * above, lists them. "Guess" marks a choice that nothing was found for.
 */
#ifndef LUNASIM_SIM_H
#define LUNASIM_SIM_H

#define _GNU_SOURCE
#include <stddef.h>
#include <string.h>

#include "pkcs11go.h"
#include "state.h"
#include "luna.h"

typedef CK_SESSION_HANDLE S;
typedef CK_OBJECT_HANDLE O;
typedef CK_ATTRIBUTE_PTR A;
typedef CK_MECHANISM_PTR M;
typedef CK_BYTE_PTR B;
typedef CK_ULONG N;
typedef CK_ULONG_PTR NP;

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

/* conf.c: what belongs to this process. */
extern CK_FUNCTION_LIST_PTR real; /* SoftHSM */
extern struct state *state;       /* the partition */
extern char token_pin[68];        /* SoftHSM's; nobody else knows it */
CK_RV open_partition(void);
CK_RV start_softhsm(CK_SLOT_ID *slot); /* and which slot the token is in */
int lock_partition(void); /* keeps other processes from SoftHSM's files; a descriptor */
void unlock_partition(int fd);
void storage(N *objects, N *bytes);

static inline uint32_t sw(int which) { return __atomic_load_n(&state->sw[which], __ATOMIC_ACQUIRE); }
static inline uint32_t policy(const uint32_t *set, int id) { return __atomic_load_n(&set[id], __ATOMIC_ACQUIRE); }
static inline int allows(const uint32_t *set, int id) { uint32_t v = policy(set, id); return v != 0 && v != NO_POLICY; }
static inline int fips(void) /* row 30; D-771: the HSM's policy is for all partitions, the partition's for this one */
{
	return policy(state->hsm_policy, HSM_NON_FIPS) == 0 || policy(state->token_policy, PARTITION_NON_FIPS) == 0;
}
uint32_t firmware(void); /* 0x00070800 for 7.8.0 */

/* info.c */
void remember_policies(void);

/* session.c */
enum { READ, WRITE };
enum role { NOBODY, OFFICER, USER };

struct find { /* what C_FindObjects has to look at itself */
	CK_ATTRIBUTE *want;
	N n;
};

enum phase { IDLE, V3_SOURCE, V3_TARGET, V1_TARGET, V4_TARGET };

struct transfer { /* a clone under way: what the HSM keeps between its calls */
	enum phase phase;
	unsigned char ours[16], theirs[16];
	unsigned char kev[KEV_SIZE];
	int has_kev;
};

struct session {
	S h;
	CK_SLOT_ID slot; /* as the caller knows it */
	pthread_mutex_t mu;
	struct find find;
	unsigned char iv[16]; /* of the encryption under way, */
	N iv_len;             /* where it is appended; else 0 */
	int opens_gcm;        /* a decryption with AES-GCM is under way */
	CK_MECHANISM_TYPE oaep; /* hash of the decryption under way, where oaep.c does it; else 0 */
	struct transfer transfer;
	struct session *next;
};

/* All of these but those that hold are called with the lock held. */
extern CK_SLOT_ID real_slot;
extern int initialised;
struct session *hold(S h, int how, int vendor);
void release(struct session *s);
CK_RV no_session(void);
void hold_all(int how);
void release_all(void);
void keep_sessions(void); /* before hold, for what takes long */
void unkeep_sessions(void);
void hold_everything(void); /* for what ends sessions or logins */
void release_everything(void);
void lose_sessions(void);   /* holds */
void put_out(void);         /* holds */
CK_RV check_slot(CK_SLOT_ID slot);

/* fault.c: called with nothing held. */
CK_RV enter(const char *function, S h);
CK_RV leave(const char *function, CK_RV rv);
int activated(void);

/* login.c */
enum role role(void);
void forget_login(void);
void forget_appid(void);
CK_RV officer_only(void); /* who may make, change, destroy and clone */
CK_RV may_make(int token);

/* Defines a function of sessions: the body is do_NAME, called with the session held. */
#define CALL_AS(vendor, name, how, parameters, arguments)       \
	EXPORT CK_RV name parameters                                \
	{                                                           \
		CK_RV rv = enter(#name, h);                             \
		if (rv != CKR_OK)                                       \
			return rv;                                          \
		struct session *s = hold(h, how, vendor);               \
		if (s == NULL)                                          \
			return no_session();                                \
		rv = do_##name arguments;                               \
		release(s);                                             \
		return leave(#name, rv);                                \
	}
#define CALL(name, how, parameters, arguments) CALL_AS(0, name, how, parameters, arguments)
#define CA_CALL(name, how, parameters, arguments) CALL_AS(1, name, how, parameters, arguments)

/* template.c */
#define OUID_SIZE 12
#define TAIL_SIZE (2 + OUID_SIZE) /* behind the label: NUL, flags, OUID */
enum { EXTRACTABLE = 1, MANAGED = 2 }; /* MANAGED: a secret or private key */

struct tail {
	unsigned char flags;
	unsigned char ouid[OUID_SIZE];
};

struct template {
	CK_ATTRIBUTE a[64];
	N n;
	unsigned char *label; /* owned */
	CK_BBOOL token;
};

const CK_ATTRIBUTE *attribute(const CK_ATTRIBUTE *t, N n, CK_ATTRIBUTE_TYPE type);
CK_BBOOL flag(const CK_ATTRIBUTE *t, N n, CK_ATTRIBUTE_TYPE type, CK_BBOOL otherwise);
CK_RV check_template(const CK_ATTRIBUTE *t, N n, CK_OBJECT_CLASS class, unsigned char *flags);
CK_RV new_tail(S h, unsigned char flags, struct tail *tail);
CK_RV build(struct template *out, const CK_ATTRIBUTE *t, N n, const struct tail *tail);
void add(struct template *out, CK_ATTRIBUTE_TYPE type, void *value, N len);
void discard(struct template *t);

/* object.c */
CK_RV class_of(S h, O o, CK_OBJECT_CLASS *class);
CK_RV is_token(S h, O o, CK_BBOOL *token);
CK_RV read_tail(S h, O o, struct tail *tail, unsigned char **label, N *label_len);
CK_RV read_attribute(S h, O o, CK_ATTRIBUTE_TYPE type, unsigned char **value, N *len);
CK_RV by_ouid(S h, const unsigned char *ouid, O *found); /* CKR_OK and 0 where there is none */
CK_RV attributes(S h, O o, A t, N n);
CK_RV room(N more);
void forget_handles(void);

/* crypto.c: a session of the library's own, which nobody sees. */
struct engine { S h; };
struct part { const void *p; size_t n; };
CK_RV engine_open(struct engine *e);
void engine_close(struct engine *e);
CK_RV hmac(struct engine *e, const void *key, size_t key_len, const struct part *parts, int n, unsigned char out[32]);
CK_RV digest(struct engine *e, const void *p, size_t n, unsigned char out[32]);
CK_RV domain_key(struct engine *e, int which, const char *use, const struct part *parts, int n, unsigned char out[32]);
CK_RV random_bytes(struct engine *e, void *p, size_t n);

/* oaep.c */
CK_RV oaep_init(struct session *s, M mech, O key);
CK_RV oaep_decrypt(struct session *s, B in, N len, B out, NP n);

/* blob.c: bytes that travel. */
struct buf { unsigned char *p; size_t n, cap; int bad; };
struct reader { const unsigned char *p; size_t n; int bad; };
void put(struct buf *b, const void *p, size_t n);
void put32(struct buf *b, uint32_t v);
void wipe(struct buf *b);
const unsigned char *get(struct reader *r, size_t n);
uint32_t get32(struct reader *r);
CK_RV frame(struct engine *e, unsigned char protocol, unsigned char phase, struct buf *body, struct buf *out);
CK_RV unframe(struct engine *e, unsigned char protocol, unsigned char phase, const void *p, N n, struct reader *body);
CK_RV seal(struct engine *e, const unsigned char key[32], S h, O o, struct buf *out);
struct how {                               /* an object comes in */
	int token;                             /* to stay */
	CK_RV wrong_key;                       /* the answer to one that was sealed under another key */
	CK_RV (*may_enter)(CK_OBJECT_CLASS);
};
CK_RV unseal(struct engine *e, const unsigned char key[32], struct reader *in, const struct how *how, S h, O *made);
CK_RV deliver(const struct buf *b, B out, NP n);

/* clone.c: what every protocol asks first. */
enum { CPV1 = 1, CPV3 = 3, CPV4 = 4, SIM = 9 };
CK_RV may_transfer(int protocol);
CK_RV may_leave(S h, O o);
CK_RV may_enter(CK_OBJECT_CLASS class);
CK_RV newer_gives_nothing(uint32_t theirs);
void forget_tunnels(S h); /* 0: of every session */

#endif
