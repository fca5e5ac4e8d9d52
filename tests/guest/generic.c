/* Checks of what is left of the features that file systems share: handles, asynchronous I/O, times, allocation, links. */
#include "checks.h"

#include <linux/aio_abi.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/vfs.h>
#include <time.h>

enum { PAGE = 4096 };

struct handle {
	struct file_handle head;
	unsigned char bytes[MAX_HANDLE_SZ];
};

static struct handle handle_of(const char *path)
{
	int mount;
	struct handle handle = { .head.handle_bytes = MAX_HANDLE_SZ };
	if (name_to_handle_at(AT_FDCWD, path, &handle.head, &mount, 0) == -1 && errno == EOPNOTSUPP)
		skip("the file system has no file handles");
	return handle;
}

static int open_handle(struct handle *handle, int flags)
{
	static int mount = -1;
	if (mount < 0)
		mount = OK(open(".", O_RDONLY | O_DIRECTORY));
	return open_by_handle_at(mount, &handle->head, flags);
}

static void forget_inodes(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
	if (fd < 0)
		return;
	sync();
	EQUAL(write(fd, "2", 1), 1);
	close(fd);
}

static void file_handles(void)
{
	char seen[4];
	OK(mkdir("d", 0755));
	close(create_file("d/f", "text"));
	struct handle file = handle_of("d/f"), dir = handle_of("d");
	int fd = OK(open_handle(&file, O_RDWR));
	EQUAL(pread(fd, seen, 4, 0), 4);
	OK(rename("d/f", "g"));
	close(fd);
	close(OK(open_handle(&file, O_RDONLY)));
	int below = OK(open_handle(&dir, O_RDONLY | O_DIRECTORY));
	OK(fstatat(below, "..", &(struct stat){ 0 }, 0));
	OK(unlink("g"));
	/* The kernel sends RELEASE in its own time, and a file that is open still has a handle. */
	for (int tries = 0; tries < 1000 && (fd = open_handle(&file, O_RDONLY)) >= 0; tries++) {
		close(fd);
		poll(NULL, 0, 5);
	}
	FAILS(ESTALE, open_handle(&file, O_RDONLY));
}

static void file_handles_outlive_the_cache(void)
{
	char name[32];
	OK(mkdir("d", 0755));
	OK(mkdir("d/e", 0755));
	close(create_file("d/e/f", "text"));
	struct handle file = handle_of("d/e/f"), dir = handle_of("d/e");
	uint64_t number = stat_of("d/e/f").st_ino;
	struct stat st;
	for (int round = 0; round < 3; round++) {
		forget_inodes();
		int fd = OK(open_handle(&file, O_RDONLY));
		OK(fstat(fd, &st));
		EQUAL(st.st_ino, number);
		close(fd);
		fd = OK(open_handle(&dir, O_RDONLY | O_DIRECTORY));
		OK(fstatat(fd, "f", &st, 0));
		EQUAL(st.st_ino, number);
		close(fd);
		for (int i = 0; i < 100; i++) {
			snprintf(name, sizeof name, "other-%d-%d", round, i);
			close(create_file(name, ""));
		}
	}
	OK(unlink("d/e/f"));
	forget_inodes();
	FAILS(ESTALE, open_handle(&file, O_RDONLY));
}

/* One operation through the kernel's asynchronous interface. */
static long submit(aio_context_t context, int fd, int operation, void *data, size_t len, off_t offset)
{
	struct iocb cb = { .aio_fildes = fd, .aio_lio_opcode = operation, .aio_buf = (uintptr_t)data, .aio_nbytes = len, .aio_offset = offset };
	struct iocb *list[] = { &cb };
	struct io_event event;
	EQUAL(syscall(SYS_io_submit, context, 1, list), 1);
	EQUAL(syscall(SYS_io_getevents, context, 1, 1, &event, 0), 1);
	return event.res;
}

static void asynchronous_io(void)
{
	aio_context_t context = 0;
	unsigned char *out = aligned_alloc(PAGE, 16 * PAGE), *in = aligned_alloc(PAGE, 16 * PAGE);
	if (syscall(SYS_io_setup, 8, &context) == -1)
		skip("this kernel has no asynchronous I/O: %s", strerror(errno));
	fill(out, 16 * PAGE, 0, 5);
	static const int flags[] = { O_RDWR | O_CREAT, O_RDWR | O_DIRECT };
	for (int i = 0; i < 2; i++) {
		int fd = OK(open("f", flags[i], 0644));
		EQUAL(submit(context, fd, IOCB_CMD_PWRITE, out, 16 * PAGE, 0), 16 * PAGE);
		EQUAL(submit(context, fd, IOCB_CMD_PREAD, in, 16 * PAGE, PAGE), 15 * PAGE);
		REQUIRE(!memcmp(in, out + PAGE, 15 * PAGE), "asynchronous reads give other bytes");
		EQUAL(submit(context, fd, IOCB_CMD_PREAD, in, PAGE, 16 * PAGE), 0);
		close(fd);
	}
}

static void access_times(void)
{
	struct timespec old[2] = { { 1000, 0 }, { 2000, 0 } };
	char byte;
	int fd = create_file("f", "text");
	OK(futimens(fd, old));
	int quiet = OK(open("f", O_RDONLY | O_NOATIME));
	EQUAL(pread(quiet, &byte, 1, 0), 1);
	EQUAL(stat_of("f").st_atim.tv_sec, 1000);
	FAILS(EINVAL, futimens(fd, (struct timespec[2]){ { 1, 1000000000 }, { 1, 0 } }));
}

static void mappings_change_times(void)
{
	struct timespec old[2] = { { 1000, 0 }, { 1000, 0 } };
	int fd = create_file("f", "text");
	char *map = (char *)OK(mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	OK(fsync(fd));
	OK(futimens(fd, old));
	map[0] = 'T';
	OK(msync(map, PAGE, MS_SYNC));
	REQUIRE(stat_of("f").st_mtim.tv_sec > 1000, "a write through a mapping did not change mtime");
}

static void changes_of_the_inode_change_its_time(void)
{
	close(create_file("f", "text"));
	for (int i = 0; i < 5; i++) {
		struct stat before = stat_of("f"), after;
		for (int tries = 0; tries < 1000; tries++) {
			switch (i) {
			case 0: OK(chmod("f", 0600 + tries % 8)); break;
			case 1: OK(chown("f", tries, -1)); break;
			case 2: OK(link("f", "g")); OK(unlink("g")); break;
			case 3: OK(rename("f", "g")); OK(rename("g", "f")); break;
			case 4: OK(truncate("f", tries)); break;
			}
			after = stat_of("f");
			if (after.st_ctim.tv_sec > before.st_ctim.tv_sec || after.st_ctim.tv_nsec > before.st_ctim.tv_nsec)
				goto next;
			nanosleep(&(struct timespec){ 0, 1000000 }, 0); /* the kernel's clock ticks */
		}
		fail("change %d left ctime as it was", i);
	next:;
	}
}

static void no_stale_bytes_behind_the_end(void)
{
	static const char zeros[2 * PAGE];
	char seen[2 * PAGE];
	struct statfs type;
	int fd = create_file("f", "");
	OK(fstatfs(fd, &type));
	if (type.f_type == TMPFS_MAGIC)
		skip("a tmpfs itself keeps what a mapping wrote behind the end");
	OK(ftruncate(fd, 100));
	char *map = (char *)OK(mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	memset(map, 'x', PAGE); /* what is behind the end never gets to the file */
	OK(msync(map, PAGE, MS_SYNC));
	OK(munmap(map, PAGE));
	OK(ftruncate(fd, 2 * PAGE));
	EQUAL(pread(fd, seen, sizeof seen, 100), (ssize_t)sizeof seen - 100);
	REQUIRE(!memcmp(seen, zeros, sizeof seen - 100), "bytes from behind the end of the file came back");
	write_all(fd, "y", 1, 3 * PAGE - 1);
	EQUAL(pread(fd, seen, PAGE, 2 * PAGE), PAGE);
	REQUIRE(!memcmp(seen, zeros, PAGE - 1), "what a write skipped is not zero");
}

static void allocation_modes(void)
{
	enum { COLLAPSE = 0x08, INSERT = 0x20, UNSHARE = 0x40 };
	static const int modes[] = { COLLAPSE, INSERT, UNSHARE };
	char page[PAGE];
	int fd = create_file("f", "");
	for (int i = 0; i < 4; i++) {
		memset(page, 'a' + i, PAGE);
		write_all(fd, page, PAGE, i * PAGE);
	}
	FAILS(EINVAL, fallocate(fd, 0, -1, 10));
	FAILS(EINVAL, fallocate(fd, 0, 0, 0));
	FAILS(EOPNOTSUPP, fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, PAGE));
	FAILS(EBADF, fallocate(OK(open("f", O_RDONLY)), 0, 0, 10));
	for (int i = 0; i < 3; i++) {
		off_t size = stat_of("f").st_size;
		if (fallocate(fd, modes[i], PAGE, PAGE) == -1) {
			REQUIRE(errno == EOPNOTSUPP || errno == EINVAL, "mode %x: %s", modes[i], strerror(errno));
			EQUAL(stat_of("f").st_size, size);
			continue;
		}
		EQUAL(stat_of("f").st_size, size + (modes[i] == COLLAPSE ? -PAGE : modes[i] == INSERT ? PAGE : 0));
	}
	EQUAL(pread(fd, page, 1, 0), 1);
	EQUAL(page[0], 'a');
}

static void seeking_beyond_the_end(void)
{
	int fd = create_file("f", "text");
	FAILS(ENXIO, lseek(fd, 4, SEEK_DATA));
	FAILS(ENXIO, lseek(fd, 100, SEEK_HOLE));
	FAILS(ENXIO, lseek(fd, -1, SEEK_DATA));
	EQUAL(lseek(fd, 0, SEEK_DATA), 0);
	EQUAL(lseek(fd, 0, SEEK_HOLE), 4);
	EQUAL(lseek(fd, 0, SEEK_CUR), 4);
	FAILS(EINVAL, lseek(fd, 0, 99));
}

static void splicing(void)
{
	char seen[10];
	int pipes[2], from = create_file("from", "0123456789"), to = create_file("to", "");
	off_t in = 2, out = 3;
	OK(pipe(pipes));
	EQUAL(splice(from, &in, pipes[1], 0, 5, 0), 5);
	EQUAL(splice(pipes[0], 0, to, &out, 5, 0), 5);
	EQUAL(pread(to, seen, 10, 0), 8);
	REQUIRE(!memcmp(seen, "\0\0\00023456", 8), "splice moved other bytes");
}

static void always_ready(void)
{
	struct pollfd wanted = { .fd = create_file("f", ""), .events = POLLIN | POLLOUT };
	EQUAL(poll(&wanted, 1, -1), 1);
	EQUAL(wanted.revents, POLLIN | POLLOUT);
}

static void links_of_directories(void)
{
	OK(mkdir("d", 0755));
	nlink_t before = stat_of("d").st_nlink;
	OK(mkdir("d/one", 0755));
	OK(mkdir("d/two", 0755));
	nlink_t after = stat_of("d").st_nlink;
	REQUIRE(after == before + 2 || after == before, "two directories more change the links from %lu to %lu", before, after);
	OK(rename("d/one", "moved"));
	EQUAL(stat_of("moved/..").st_ino, stat_of(".").st_ino);
	FAILS(EPERM, link("d", "e"));
	OK(rmdir("d/two"));
	OK(rmdir("d"));
}

static void links_of_removed_files(void)
{
	struct stat st;
	int fd = create_file("f", "text");
	OK(link("f", "g"));
	OK(unlink("f"));
	OK(fstat(fd, &st));
	EQUAL(st.st_nlink, 1);
	OK(unlink("g"));
	OK(fstat(fd, &st));
	EQUAL(st.st_nlink, 0);
	close(create_file("new", "new"));
	OK(rename("new", "newer"));
	int old = OK(open("newer", O_RDONLY));
	close(create_file("other", "other"));
	OK(rename("other", "newer"));
	OK(fstat(old, &st));
	EQUAL(st.st_nlink, 0);
	EQUAL(st.st_size, 3);
	expect_content("newer", "other", 5);
}

static void direct_append(void)
{
	unsigned char *page = aligned_alloc(PAGE, PAGE);
	struct stat st;
	int fd = OK(open("f", O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_DIRECT, 0644));
	for (int i = 0; i < 4; i++) {
		memset(page, 'a' + i, PAGE);
		EQUAL(write(fd, page, PAGE), PAGE);
	}
	OK(fstat(fd, &st));
	EQUAL(st.st_size, 4 * PAGE);
	EQUAL(pread(fd, page, PAGE, 2 * PAGE), PAGE);
	EQUAL(page[0], 'c');
	int plain = OK(open("f", O_WRONLY | O_APPEND));
	EQUAL(write(plain, "end", 3), 3);
	EQUAL(stat_of("f").st_size, 4 * PAGE + 3);
}

static void sizes_and_times_of_small_writes(void)
{
	struct stat before, after;
	int fd = create_file("f", "");
	for (int i = 0; i < 3000; i += 7)
		write_all(fd, "7 bytes", 7, i);
	OK(fstat(fd, &before));
	EQUAL(before.st_size, 3003);
	OK(fsync(fd));
	close(fd);
	after = stat_of("f");
	EQUAL(after.st_size, 3003);
	int again = OK(open("f", O_WRONLY | O_APPEND));
	EQUAL(write(again, "!", 1), 1);
	close(again);
	EQUAL(stat_of("f").st_size, 3004);
	EQUAL(after.st_mtim.tv_sec, before.st_mtim.tv_sec);
	EQUAL(after.st_mtim.tv_nsec, before.st_mtim.tv_nsec);
}

static void names_that_are_refused(void)
{
	FAILS(ENOENT, open("", O_RDONLY));
	FAILS(EBUSY, rename(".", "d"));
	FAILS(EEXIST, mkdir(".", 0755));
	FAILS(EINVAL, rmdir("."));
	OK(mkdir("d", 0755));
	FAILS(ENOTEMPTY, rmdir("d/.."));
	close(create_file("f", ""));
	FAILS(ENOTDIR, open("f/g", O_RDONLY));
	FAILS(ENOTDIR, mkdir("f/g", 0755));
	OK(symlink("loop", "loop"));
	FAILS(ELOOP, open("loop", O_RDONLY));
	FAILS(ELOOP, open("loop", O_RDONLY | O_NOFOLLOW));
	FAILS(EEXIST, symlink("x", "loop"));
	FAILS(EEXIST, mknod("f", S_IFREG | 0644, 0));
}

const struct check generic_checks[] = {
	{ "file handles", file_handles },
	{ "file handles outlive the cache", file_handles_outlive_the_cache },
	{ "asynchronous reads and writes", asynchronous_io },
	{ "access times", access_times },
	{ "mappings change times", mappings_change_times },
	{ "changes of an inode change its ctime", changes_of_the_inode_change_its_time },
	{ "no stale bytes behind the end", no_stale_bytes_behind_the_end },
	{ "fallocate modes and errors", allocation_modes },
	{ "seek beyond the end", seeking_beyond_the_end },
	{ "splice", splicing },
	{ "files are always ready", always_ready },
	{ "links of directories", links_of_directories },
	{ "links of removed files", links_of_removed_files },
	{ "direct append to a new file", direct_append },
	{ "small writes keep size and times", sizes_and_times_of_small_writes },
	{ "names that are refused", names_that_are_refused },
	{ 0 },
};
