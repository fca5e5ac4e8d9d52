/* Preloaded into fsx. Where DIRECT is in the environment, what it opens for reading and writing is opened with O_DIRECT,
 * and what it reads and writes there goes through an aligned buffer. It never unmaps what it maps for reading, which would
 * make each operation take longer than the one before: a mapping of a file goes when the next one is made. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ALIGN = 4096, MOST = 1 << 20 };

static void *aligned(void) {
    static void *buffer;
    if (!buffer && posix_memalign(&buffer, ALIGN, MOST)) {
        abort();
    }
    return buffer;
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if ((flags & O_ACCMODE) == O_RDWR && getenv("DIRECT")) {
        flags |= O_DIRECT;
    }
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static int is_direct(int fd) {
    return (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
}

ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
    if (!is_direct(fd)) {
        return syscall(SYS_pread64, fd, to, size, at);
    }
    if (size > MOST) {
        errno = EINVAL;
        return -1;
    }
    ssize_t got = syscall(SYS_pread64, fd, aligned(), size, at);
    if (got > 0) {
        memcpy(to, aligned(), got);
    }
    return got;
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
    if (!is_direct(fd)) {
        return syscall(SYS_pwrite64, fd, from, size, at);
    }
    if (size > MOST) {
        errno = EINVAL;
        return -1;
    }
    memcpy(aligned(), from, size);
    return syscall(SYS_pwrite64, fd, aligned(), size, at);
}

static struct {
    void *at;
    size_t size;
} last;

int munmap(void *at, size_t size) {
    if (at == last.at) {
        last.at = NULL;
    }
    return syscall(SYS_munmap, at, size);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && last.at) {
        munmap(last.at, last.size);
    }
    long mapped = syscall(SYS_mmap, at, size, protection, flags, fd, offset);
    if (fd >= 0 && mapped != -1) {
        last.at = (void *)mapped;
        last.size = size;
    }
    return (void *)mapped;
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
    return mmap(at, size, protection, flags, fd, offset);
}
