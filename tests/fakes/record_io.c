/* Records every change of the files below a folder, in order, for tests/power_loss.py. A library for LD_PRELOAD:
 *
 *     cc -O1 -shared -fPIC -o record_io.so record_io.c -ldl -lpthread
 *     RECORD_ROOT=folder RECORD_LOG=file LD_PRELOAD=./record_io.so command
 *
 * Each call of libc that changes a file, a name or what is durable appends one record to the log: `struct record`, then
 * the two paths, relative to the root, then the bytes that were written. A lock is held over the call and its record,
 * for threads a mutex and for processes a flock on the log, so the order of the records is that of the calls. What the
 * model cannot replay (stdio streams and mappings open for writing, O_TMPFILE, symbolic links, names that cross the
 * root) is recorded as 'X', on which the reader fails. Raw system calls bypass the library; the test compares the
 * replayed log with the real folder to find that.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record { /* little-endian on every machine that the tests run on; struct.Struct("<c7xQQQIIQ") in Python */
    char op;
    char pad[7];
    uint64_t inode, offset, size;
    uint32_t path_bytes, to_bytes;
    uint64_t data_bytes;
};

static char root[PATH_MAX], log_path[PATH_MAX];
static size_t root_bytes; /* 0 = not recording */
static int log_fd = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void before_fork(void) { pthread_mutex_lock(&mutex); }
static void in_parent(void) { pthread_mutex_unlock(&mutex); }
static void in_child(void) { /* a flock belongs to the open file, which the child must not share */
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = -1;
    pthread_mutex_unlock(&mutex);
}

void record_start(const char *folder, const char *log) {
    pthread_mutex_lock(&mutex);
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = -1;
    if (!realpath(folder, root)) abort();
    root_bytes = strlen(root);
    snprintf(log_path, sizeof log_path, "%s", log);
    pthread_mutex_unlock(&mutex);
    setenv("RECORD_ROOT", root, 1); /* for child processes */
    setenv("RECORD_LOG", log_path, 1);
}

__attribute__((constructor)) static void begin(void) {
    pthread_atfork(before_fork, in_parent, in_child);
    if (getenv("RECORD_ROOT") && getenv("RECORD_LOG")) record_start(getenv("RECORD_ROOT"), getenv("RECORD_LOG"));
}

static void enter(void) {
    pthread_mutex_lock(&mutex);
    if (log_fd < 0) {
        int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        log_fd = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 500); /* out of the way of programs that expect low numbers */
        if (log_fd < 0) abort();
        syscall(SYS_close, fd);
    }
    while (flock(log_fd, LOCK_EX) && errno == EINTR) {}
}

static void leave(void) {
    int saved = errno;
    flock(log_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

static void add(char op, uint64_t inode, uint64_t offset, uint64_t size, const char *path, const char *to, void *data,
                size_t n) {
    struct record head = {.op = op, .inode = inode, .offset = offset, .size = size, .path_bytes = strlen(path),
                          .to_bytes = strlen(to), .data_bytes = n};
    struct iovec parts[] = {{&head, sizeof head}, {(char *)path, head.path_bytes}, {(char *)to, head.to_bytes}, {data, n}};
    int saved = errno;
    ssize_t total = sizeof head + head.path_bytes + head.to_bytes + n;
    if (syscall(SYS_writev, log_fd, parts, 4) != total) abort();
    errno = saved;
}

/* ---- which calls concern the folder */

static const char *below(const char *full) { /* the part of a path after the root; NULL = not below it */
    if (!root_bytes || strncmp(full, root, root_bytes)) return NULL;
    if (full[root_bytes] == 0) return ".";
    return full[root_bytes] == '/' ? full + root_bytes + 1 : NULL;
}

static const char *of_fd(int fd, char *full, struct stat *st) { /* of an open file or folder */
    char link[64];
    if (!root_bytes || fstat(fd, st) || !(S_ISREG(st->st_mode) || S_ISDIR(st->st_mode))) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, PATH_MAX - 1);
    if (n <= 0) return NULL;
    full[n] = 0;
    return below(full);
}

static const char *of_path(int dirfd, const char *path, char *full) { /* of a name; its parent must exist */
    char joined[2 * PATH_MAX], link[64];
    if (!root_bytes || !path || !*path || strlen(path) >= PATH_MAX) return NULL;
    if (*path == '/') {
        strcpy(joined, path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        ssize_t n = readlink(dirfd == AT_FDCWD ? "/proc/self/cwd" : link, joined, PATH_MAX - 1);
        if (n <= 0) return NULL;
        sprintf(joined + n, "/%s", path);
    }
    size_t end = strlen(joined);
    while (end > 1 && joined[end - 1] == '/') joined[--end] = 0;
    char *name = strrchr(joined, '/');
    if (!strcmp(name, "/.") || !strcmp(name, "/..")) return NULL; /* an existing folder: no call below changes it */
    *name++ = 0;
    if (!realpath(*joined ? joined : "/", full)) return NULL;
    size_t n = strlen(full);
    if (n + strlen(name) + 2 > PATH_MAX) return NULL;
    sprintf(full + n, "%s%s", full[n - 1] == '/' ? "" : "/", name);
    return below(full);
}

static uint64_t inode_of(const char *full) {
    struct stat st;
    return lstat(full, &st) ? 0 : st.st_ino;
}

static void unsupported(const char *what, const char *path) { add('X', 0, 0, 0, path, what, NULL, 0); }

/* ---- files */

static int do_open(int dirfd, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    struct stat before, after;
    const char *name = flags & (O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY)) ? of_path(dirfd, path, full) : NULL;
    if (!name) return syscall(SYS_openat, dirfd, path, flags, mode);
    enter();
    int existed = lstat(full, &before) == 0;
    int fd = syscall(SYS_openat, dirfd, path, flags, mode);
    if (fd >= 0 && !fstat(fd, &after)) {
        if ((flags & O_TMPFILE) == O_TMPFILE) unsupported("O_TMPFILE", name);
        else if (existed && S_ISLNK(before.st_mode)) unsupported("open of a symbolic link", name);
        else if (!existed) add('C', after.st_ino, 0, 0, name, "", NULL, 0);
        else if (flags & O_TRUNC && before.st_size > 0) add('T', after.st_ino, 0, 0, name, "", NULL, 0);
    }
    leave();
    return fd;
}

#define MODE(flags, last)                     \
    mode_t mode = 0;                          \
    if (flags & (O_CREAT | O_TMPFILE)) {      \
        va_list list;                         \
        va_start(list, last);                 \
        mode = va_arg(list, int);             \
        va_end(list);                         \
    }
int open(const char *path, int flags, ...) { MODE(flags, flags) return do_open(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, flags) return do_open(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags, flags) return do_open(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags, flags) return do_open(dir, path, flags, mode); }
int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return do_open(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return do_open(dir, path, flags, 0); }
int creat(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* Adds what a call has written, read back from the file: `n` bytes at `offset`, or before the file's position if -1. */
static ssize_t written(int fd, const char *name, const struct stat *st, ssize_t n, off_t offset) {
    if (n <= 0) return n;
    int saved = errno, flags = fcntl(fd, F_GETFL);
    struct stat now;
    if (offset < 0) offset = lseek(fd, 0, SEEK_CUR) - n;
    else if (flags & O_APPEND && !fstat(fd, &now)) offset = now.st_size - n; /* Linux appends, whatever the offset */
    char link[64], *data = malloc(n);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
    if (!data || again < 0) abort();
    for (ssize_t done = 0, m; done < n; done += m)
        if ((m = pread(again, data + done, n - done, offset + done)) <= 0) abort();
    syscall(SYS_close, again);
    add('W', st->st_ino, offset, n, name, "", data, n);
    free(data);
    errno = saved;
    return n;
}

#define WRITES(fd, call, offset)                                 \
    char full[PATH_MAX];                                         \
    struct stat st;                                              \
    const char *name = of_fd(fd, full, &st);                     \
    if (!name) return call;                                      \
    enter();                                                     \
    ssize_t result = written(fd, name, &st, call, offset);       \
    leave();                                                     \
    return result;
#define HALVES(offset) (unsigned long)(offset), 0UL /* of a 64-bit offset, as the system call takes it on 64-bit machines */
ssize_t write(int fd, const void *data, size_t n) { WRITES(fd, syscall(SYS_write, fd, data, n), -1) }
ssize_t writev(int fd, const struct iovec *v, int n) { WRITES(fd, syscall(SYS_writev, fd, v, n), -1) }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { WRITES(fd, syscall(SYS_pwrite64, fd, data, n, at), at) }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return pwrite(fd, data, n, at); }
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    WRITES(fd, syscall(SYS_pwritev2, fd, v, n, HALVES(at), flags), at)
}
ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off64_t at, int flags) { return pwritev2(fd, v, n, at, flags); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { return pwritev2(fd, v, n, at, 0); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t at) { return pwritev2(fd, v, n, at, 0); }
ssize_t sendfile(int out, int in, off_t *from, size_t n) { WRITES(out, syscall(SYS_sendfile, out, in, from, n), -1) }
ssize_t sendfile64(int out, int in, off64_t *from, size_t n) { return sendfile(out, in, from, n); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    off64_t at = to ? *to : -1;
    WRITES(out, syscall(SYS_copy_file_range, in, from, out, to, n, flags), at)
}

/* Makes a call that may change the size of an open file, and adds the new size. */
#define RESIZES(fd, call)                                                                    \
    char full[PATH_MAX];                                                                     \
    struct stat before, after;                                                               \
    const char *name = of_fd(fd, full, &before);                                             \
    if (!name) return call;                                                                  \
    enter();                                                                                 \
    int result = call;                                                                       \
    if (!result && !fstat(fd, &after) && after.st_size != before.st_size)                    \
        add('T', after.st_ino, 0, after.st_size, name, "", NULL, 0);                         \
    leave();                                                                                 \
    return result;
int ftruncate(int fd, off_t size) { RESIZES(fd, syscall(SYS_ftruncate, fd, size)) }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int fallocate(int fd, int mode, off_t at, off_t n) {
    struct stat st;
    char path[PATH_MAX];
    if (mode & ~FALLOC_FL_KEEP_SIZE && of_fd(fd, path, &st)) {
        enter();
        unsupported("fallocate with a mode", below(path));
        leave();
    }
    RESIZES(fd, syscall(SYS_fallocate, fd, mode, at, n))
}
int fallocate64(int fd, int mode, off64_t at, off64_t n) { return fallocate(fd, mode, at, n); }
int posix_fallocate(int fd, off_t at, off_t n) { return fallocate(fd, 0, at, n) ? errno : 0; }
int posix_fallocate64(int fd, off64_t at, off64_t n) { return posix_fallocate(fd, at, n); }
int truncate(const char *path, off_t size) {
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return syscall(SYS_truncate, path, size);
    int result = ftruncate(fd, size), saved = errno;
    syscall(SYS_close, fd);
    errno = saved;
    return result;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }

void *mmap(void *start, size_t n, int protection, int flags, int fd, off_t at) {
    char full[PATH_MAX];
    struct stat st;
    if (fd >= 0 && protection & PROT_WRITE && flags & MAP_SHARED && of_fd(fd, full, &st)) {
        enter();
        unsupported("a shared mapping open for writing", below(full));
        leave();
    }
    return (void *)syscall(SYS_mmap, start, n, protection, flags, fd, at);
}
void *mmap64(void *start, size_t n, int protection, int flags, int fd, off64_t at) {
    return mmap(start, n, protection, flags, fd, at);
}

/* ---- names */

/* Makes a call on one name or two, and adds its record if it succeeds. */
static int named(char op, int dir, const char *path, int to_dir, const char *to, long call, unsigned argument) {
    char full[PATH_MAX], to_full[PATH_MAX];
    const char *name = of_path(dir, path, full), *to_name = to ? of_path(to_dir, to, to_full) : NULL;
    int recorded = name || to_name;
    if (recorded) enter();
    int result = to ? syscall(call, dir, path, to_dir, to, argument) : syscall(call, dir, path, argument);
    if (recorded) {
        if (!result) {
            if (to && (!name || !to_name)) unsupported("a name that crosses the root", name ? name : to_name);
            else if (op == 'R' && argument & ~1U) unsupported("renameat2 with a flag", name); /* 1: RENAME_NOREPLACE */
            else add(op, op == 'M' ? inode_of(full) : 0, 0, 0, name, to ? to_name : "", NULL, 0);
        }
        leave();
    }
    return result;
}
int renameat2(int dir, const char *path, int to_dir, const char *to, unsigned flags) {
    return named('R', dir, path, to_dir, to, SYS_renameat2, flags);
}
int renameat(int dir, const char *path, int to_dir, const char *to) { return renameat2(dir, path, to_dir, to, 0); }
int rename(const char *path, const char *to) { return renameat2(AT_FDCWD, path, AT_FDCWD, to, 0); }
int linkat(int dir, const char *path, int to_dir, const char *to, int flags) {
    return named('L', dir, path, to_dir, to, SYS_linkat, flags);
}
int link(const char *path, const char *to) { return linkat(AT_FDCWD, path, AT_FDCWD, to, 0); }
int mkdirat(int dir, const char *path, mode_t mode) { return named('M', dir, path, 0, NULL, SYS_mkdirat, mode); }
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int dir, const char *path, int flags) {
    return named(flags & AT_REMOVEDIR ? 'D' : 'U', dir, path, 0, NULL, SYS_unlinkat, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    struct stat st;
    return !lstat(path, &st) && S_ISDIR(st.st_mode) ? rmdir(path) : unlink(path);
}
int symlinkat(const char *target, int dir, const char *path) {
    char full[PATH_MAX];
    const char *name = of_path(dir, path, full);
    if (name) {
        enter();
        unsupported("a symbolic link", name);
        leave();
    }
    return syscall(SYS_symlinkat, target, dir, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

/* ---- what is durable */

static int synced(int fd, long call) {
    char full[PATH_MAX];
    struct stat st;
    const char *name = of_fd(fd, full, &st);
    if (!name) return syscall(call, fd);
    enter();
    int result = syscall(call, fd);
    if (!result) add(call == SYS_syncfs ? 'S' : 'F', st.st_ino, 0, 0, name, "", NULL, 0);
    leave();
    return result;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }
int syncfs(int fd) { return synced(fd, SYS_syncfs); }
void sync(void) {
    if (root_bytes) enter();
    syscall(SYS_sync);
    if (!root_bytes) return;
    add('S', 0, 0, 0, ".", "", NULL, 0);
    leave();
}

/* ---- functions of libc that make system calls without the functions above: refused where they would write */

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))
static void refuse(const char *what, const char *path) {
    char full[PATH_MAX];
    const char *name = of_path(AT_FDCWD, path, full);
    if (!name) return;
    enter();
    unsupported(what, name);
    leave();
}
#define WRITABLE(mode) (mode && strpbrk(mode, "wa+"))
typedef FILE *(*open_stream)(const char *, const char *);
typedef FILE *(*reopen_stream)(const char *, const char *, FILE *);
FILE *fopen(const char *path, const char *mode) {
    if (WRITABLE(mode)) refuse("fopen", path);
    return REAL("fopen", open_stream)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (WRITABLE(mode)) refuse("fopen", path);
    return REAL("fopen64", open_stream)(path, mode);
}
FILE *freopen(const char *path, const char *mode, FILE *file) {
    if (WRITABLE(mode)) refuse("freopen", path);
    return REAL("freopen", reopen_stream)(path, mode, file);
}
FILE *freopen64(const char *path, const char *mode, FILE *file) {
    if (WRITABLE(mode)) refuse("freopen", path);
    return REAL("freopen64", reopen_stream)(path, mode, file);
}
FILE *fdopen(int fd, const char *mode) {
    char full[PATH_MAX];
    struct stat st;
    if (WRITABLE(mode) && of_fd(fd, full, &st)) refuse("fdopen", full);
    return REAL("fdopen", FILE * (*)(int, const char *))(fd, mode);
}
#define TEMPORARY(type, name, parameters, arguments)                  \
    type name parameters {                                            \
        refuse(#name, path);                                          \
        return REAL(#name, type(*) parameters) arguments;             \
    }
TEMPORARY(int, mkstemp, (char *path), (path))
TEMPORARY(int, mkstemp64, (char *path), (path))
TEMPORARY(int, mkostemp, (char *path, int flags), (path, flags))
TEMPORARY(int, mkostemp64, (char *path, int flags), (path, flags))
TEMPORARY(int, mkstemps, (char *path, int suffix), (path, suffix))
TEMPORARY(int, mkstemps64, (char *path, int suffix), (path, suffix))
TEMPORARY(int, mkostemps, (char *path, int suffix, int flags), (path, suffix, flags))
TEMPORARY(int, mkostemps64, (char *path, int suffix, int flags), (path, suffix, flags))
TEMPORARY(char *, mkdtemp, (char *path), (path))
