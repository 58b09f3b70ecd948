/*
 * A fault of a library's calls, as tests write it into a file that the library maps: a look
 * at it costs nothing, and a fault is taken once even when many processes use the library.
 */
#ifndef KMSD_FAULT_H
#define KMSD_FAULT_H

#include <stdint.h>
#include <string.h>
#include <time.h>

#define FOREVER UINT32_MAX

/* Go writes the same fields, each in this machine's byte order. */
struct fault {
	uint32_t left;     /* times that it will yet happen; 0: the slot is free */
	uint32_t after;    /* calls that it lets pass before that */
	uint32_t what;     /* the library says which there are */
	uint32_t arg;      /* a return value, or milliseconds, or 1 while it lasts */
	uint32_t fired;    /* times that it has happened */
	char function[44]; /* "*": any that takes a session */
};

static inline int fault_taken(struct fault *f, uint32_t what, const char *function, int session)
{
	uint32_t n = __atomic_load_n(&f->left, __ATOMIC_ACQUIRE);
	if (n == 0 || f->what != what)
		return 0;
	if (strcmp(f->function, function) != 0 && (!session || strcmp(f->function, "*") != 0))
		return 0;
	uint32_t after = __atomic_load_n(&f->after, __ATOMIC_ACQUIRE);
	while (after != 0)
		if (__atomic_compare_exchange_n(&f->after, &after, after - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return 0;
	while (n != 0) {
		uint32_t next = n == FOREVER ? FOREVER : n - 1;
		if (__atomic_compare_exchange_n(&f->left, &n, next, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
			__atomic_add_fetch(&f->fired, 1, __ATOMIC_ACQ_REL);
			return 1;
		}
	}
	return 0;
}

/* Takes the first of n faults that is of this kind and fits the call; NULL: there is none. */
static inline struct fault *fault_take(struct fault *faults, int n, uint32_t what, const char *function, int session)
{
	for (int i = 0; i < n; i++)
		if (fault_taken(&faults[i], what, function, session))
			return &faults[i];
	return NULL;
}

static inline void nap(uint32_t ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };
	while (nanosleep(&t, &t) != 0)
		;
}

#endif
