/* Where the partition is: Chrystoki.conf (row 111), the state file, SoftHSM and its store. */
#include "sim.h"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONF_DIR "ChrystokiConfigurationPath"
#define STORE "SOFTHSM2_CONF"

CK_FUNCTION_LIST_PTR real;
struct state *state;
char token_pin[68];

static char state_path[PATH_MAX], store_conf[PATH_MAX], softhsm[PATH_MAX], tokens[PATH_MAX];
static char conf_dir[PATH_MAX];

/*
 * The directory is taken down when the library is loaded, if it is known by then: a
 * program with two of these libraries says it to each before it loads it.
 */
__attribute__((constructor)) static void remember_directory(void)
{
	const char *dir = getenv(CONF_DIR);
	if (dir != NULL)
		snprintf(conf_dir, sizeof conf_dir, "%s", dir);
}

static char *trim(char *s)
{
	while (*s == ' ' || *s == '\t')
		s++;
	size_t n = strlen(s);
	while (n > 0 && strchr(" \t\r\n;", s[n - 1]) != NULL)
		s[--n] = 0;
	return s;
}

/* Takes one line "name = value;" of section LunaSim. */
static void setting(char *line)
{
	static const struct { const char *name; char *to; size_t size; } known[] = {
		{ "State", state_path, sizeof state_path }, { "Store", store_conf, sizeof store_conf },
		{ "SoftHSM", softhsm, sizeof softhsm },     { "Tokens", tokens, sizeof tokens },
		{ "Pin", token_pin, sizeof token_pin },
	};
	char *equals = strchr(line, '=');
	if (equals == NULL)
		return;
	*equals = 0;
	const char *name = trim(line), *value = trim(equals + 1);
	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (strcmp(name, known[i].name) == 0)
			snprintf(known[i].to, known[i].size, "%s", value);
}

static int read_conf(void)
{
	char path[PATH_MAX + 32], line[PATH_MAX + 64];
	if (conf_dir[0] == 0)
		remember_directory();
	snprintf(path, sizeof path, "%s/Chrystoki.conf", conf_dir[0] != 0 ? conf_dir : "/etc");
	FILE *f = fopen(path, "re");
	if (f == NULL)
		return 0;
	int ours = 0;
	while (fgets(line, sizeof line, f) != NULL) {
		char *text = trim(line);
		if (strchr(text, '{') != NULL)
			ours = strncmp(text, "LunaSim", 7) == 0;
		else if (strchr(text, '}') != NULL)
			ours = 0;
		else if (ours)
			setting(text);
	}
	fclose(f);
	return state_path[0] != 0 && store_conf[0] != 0 && softhsm[0] != 0;
}

static struct state *map_state(void)
{
	struct stat info;
	int fd = open(state_path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	struct state *s = MAP_FAILED;
	if (fstat(fd, &info) == 0 && info.st_size == sizeof *s)
		s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (s == MAP_FAILED)
		return NULL;
	if (s->magic != STATE_MAGIC || s->size != sizeof *s) {
		munmap(s, sizeof *s);
		return NULL;
	}
	return s;
}

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

/* Reads the configuration and maps the state, once. */
CK_RV open_partition(void)
{
	CK_RV rv = CKR_OK;
	pthread_mutex_lock(&opening);
	if (state == NULL && (!read_conf() || (state = map_state()) == NULL))
		rv = CKR_GENERAL_ERROR; /* guess: what a client without a configuration answers */
	pthread_mutex_unlock(&opening);
	return rv;
}

static CK_RV load_softhsm(void)
{
	if (real != NULL)
		return CKR_OK;
	void *lib = dlopen(softhsm, RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList list = lib ? (CK_C_GetFunctionList)dlsym(lib, "C_GetFunctionList") : NULL;
	return list == NULL ? CKR_GENERAL_ERROR : list(&real);
}

/* Finds the slot of the one token; another, an empty one, is the last. */
static CK_RV find_token(CK_SLOT_ID *slot)
{
	CK_SLOT_ID slots[16];
	N n = 16;
	CK_RV rv = real->C_GetSlotList(CK_TRUE, slots, &n);
	for (N i = 0; rv == CKR_OK && i < n; i++) {
		CK_TOKEN_INFO info;
		if (real->C_GetTokenInfo(slots[i], &info) == CKR_OK && (info.flags & CKF_TOKEN_INITIALIZED)) {
			*slot = slots[i];
			return CKR_OK;
		}
	}
	return rv == CKR_OK ? CKR_GENERAL_ERROR : rv;
}

static int copy_file(const char *from, const char *to)
{
	char all[1 << 16], part[PATH_MAX + 8];
	snprintf(part, sizeof part, "%s.part", to);
	FILE *in = fopen(from, "re"), *out = in ? fopen(part, "we") : NULL;
	size_t n = out ? fread(all, 1, sizeof all, in) : 0;
	int whole = n > 0 && n < sizeof all && fwrite(all, 1, n, out) == n;
	if (in != NULL)
		fclose(in);
	if (out != NULL && fclose(out) != 0)
		whole = 0;
	return whole && rename(part, to) == 0;
}

/*
 * SoftHSM 2.6.1 truncates a token's file at each login and then writes it. A process that is
 * killed in between would cost the token, and no client can do that to a Luna: the first
 * that starts keeps a copy, and who finds the file empty puts that in its place. The
 * partition is locked.
 */
static void mend_token(void)
{
	DIR *d = opendir(tokens);
	for (struct dirent *e = d ? readdir(d) : NULL; e != NULL; e = readdir(d)) {
		char file[PATH_MAX], copy[PATH_MAX];
		struct stat info, kept;
		if (e->d_name[0] == '.' ||
		    snprintf(file, sizeof file, "%s/%s/token.object", tokens, e->d_name) >= (int)sizeof file ||
		    snprintf(copy, sizeof copy, "%s/%s/token.whole", tokens, e->d_name) >= (int)sizeof copy ||
		    stat(file, &info) != 0)
			continue;
		if (info.st_size == 0)
			copy_file(copy, file);
		else if (stat(copy, &kept) != 0)
			copy_file(file, copy);
	}
	if (d != NULL)
		closedir(d);
}

/*
 * SoftHSM finds its store by an environment variable. Another of these libraries in
 * the same process may be about to set it too: a lock on a file that is this process's
 * alone keeps them apart.
 */
CK_RV start_softhsm(CK_SLOT_ID *slot)
{
	CK_C_INITIALIZE_ARGS args = { .flags = CKF_OS_LOCKING_OK };
	CK_RV rv = load_softhsm();
	if (rv != CKR_OK)
		return rv;
	int store = lock_partition();
	int process = open("/proc/self/environ", O_RDONLY | O_CLOEXEC);
	if (process >= 0)
		flock(process, LOCK_EX);
	const char *set = getenv(STORE);
	char *was = set ? strdup(set) : NULL;
	setenv(STORE, store_conf, 1);
	mend_token();
	rv = real->C_Initialize(&args);
	if (rv == CKR_OK && (rv = find_token(slot)) != CKR_OK)
		real->C_Finalize(NULL);
	if (was != NULL)
		setenv(STORE, was, 1);
	else
		unsetenv(STORE);
	free(was);
	if (process >= 0)
		close(process);
	unlock_partition(store);
	return rv;
}

/* SoftHSM 2.6.1 writes a token's file anew at each login, and does not bear others reading it. */
int lock_partition(void)
{
	int fd = open(store_conf, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		flock(fd, LOCK_EX);
	return fd;
}

void unlock_partition(int fd)
{
	if (fd >= 0)
		close(fd);
}

uint32_t firmware(void)
{
	uint32_t v = 0;
	for (int i = 0; i < 3; i++)
		v = v << 8 | (__atomic_load_n(&state->firmware[i], __ATOMIC_ACQUIRE) & 0xff);
	return v;
}

static void count_files(const char *dir, N *objects, N *bytes)
{
	DIR *d = opendir(dir);
	if (d == NULL)
		return;
	for (struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
		struct stat info;
		size_t n = strlen(e->d_name);
		if (n > 7 && strcmp(e->d_name + n - 7, ".object") == 0 && strcmp(e->d_name, "token.object") != 0 &&
		    fstatat(dirfd(d), e->d_name, &info, 0) == 0) {
			++*objects;
			*bytes += (N)info.st_size;
		}
	}
	closedir(d);
}

/* What the partition holds, whichever process put it there: SoftHSM keeps a file for each object. */
void storage(N *objects, N *bytes)
{
	*objects = *bytes = 0;
	DIR *d = opendir(tokens);
	if (d == NULL)
		return;
	for (struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
		char path[2 * PATH_MAX];
		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "%s/%s", tokens, e->d_name);
		count_files(path, objects, bytes);
	}
	closedir(d);
}
