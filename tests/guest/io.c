/* Checks of ways to read and write that programs rarely take, and of what mappings, direct I/O and truncation do to each other. */
#include "checks.h"

#include <linux/fs.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>

enum { PAGE = 4096, MIB = 1 << 20 };

static const char zeros[64 * PAGE];

static ssize_t write_with(int fd, const char *text, off_t offset, int flags)
{
	return pwritev2(fd, &(struct iovec){ (void *)text, strlen(text) }, 1, offset, flags);
}

static void flags_of_one_write(void)
{
	char seen[32];
	int fd = create_file("f", "0123456789");
	EQUAL(write_with(fd, "end", 0, RWF_APPEND), 3);
	EQUAL(write_with(fd, "AB", 0, RWF_DSYNC), 2);
	EQUAL(write_with(fd, "CD", 2, RWF_SYNC | RWF_HIPRI), 2);
	expect_content("f", "ABCD456789end", 13);
	ssize_t n = write_with(fd, "xy", 4, RWF_NOWAIT);
	REQUIRE(n == 2 || (n == -1 && (errno == EAGAIN || errno == EOPNOTSUPP)), "RWF_NOWAIT: %s", strerror(errno));
	n = preadv2(fd, &(struct iovec){ seen, sizeof seen }, 1, 0, RWF_NOWAIT);
	REQUIRE(n > 0 || (n == -1 && (errno == EAGAIN || errno == EOPNOTSUPP)), "RWF_NOWAIT: %s", strerror(errno));
	FAILS(EOPNOTSUPP, write_with(fd, "x", 0, 1 << 30));
	/* RWF_NOAPPEND has no check: FUSE does not tell a server of it */
	EQUAL(write_with(OK(open("f", O_WRONLY | O_APPEND)), "last", 0, 0), 4);
	EQUAL(stat_of("f").st_size, 17);
}

static void bad_addresses(void)
{
	char *map = (char *)OK(mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	int fd = create_file("f", "some text");
	OK(munmap(map + PAGE, PAGE));
	FAILS(EFAULT, pread(fd, map + PAGE, 5, 0));
	FAILS(EFAULT, pwrite(fd, map + PAGE, 5, 0));
	expect_content("f", "some text", 9);
	memset(map, 'm', PAGE);
	struct iovec good_then_bad[] = { { map, 4 }, { map + PAGE, 4 } };
	ssize_t n = pwritev(fd, good_then_bad, 2, 0);
	REQUIRE(n == 4 || (n == -1 && errno == EFAULT), "a vector with a bad address wrote %zd", n);
	expect_content("f", n == 4 ? "mmmm text" : "some text", 9);
}

/* The kernel's submission ring, with one operation at a time. */
static struct {
	int fd;
	struct io_uring_params params;
	char *sq, *cq;
	struct io_uring_sqe *entries;
} ring;

static void set_up_ring(void)
{
	ring.fd = syscall(SYS_io_uring_setup, 4, &ring.params);
	if (ring.fd == -1)
		skip("this kernel has no io_uring: %s", strerror(errno));
	int flags = MAP_SHARED | MAP_POPULATE, access = PROT_READ | PROT_WRITE;
	size_t sq = ring.params.sq_off.array + ring.params.sq_entries * 4,
	       cq = ring.params.cq_off.cqes + ring.params.cq_entries * sizeof(struct io_uring_cqe);
	ring.sq = (char *)OK(mmap(0, sq, access, flags, ring.fd, IORING_OFF_SQ_RING));
	ring.cq = (char *)OK(mmap(0, cq, access, flags, ring.fd, IORING_OFF_CQ_RING));
	ring.entries = (struct io_uring_sqe *)OK(
		mmap(0, ring.params.sq_entries * sizeof *ring.entries, access, flags, ring.fd, IORING_OFF_SQES));
}

static int submit(struct io_uring_sqe entry)
{
	unsigned *tail = (unsigned *)(ring.sq + ring.params.sq_off.tail), *head = (unsigned *)(ring.cq + ring.params.cq_off.head);
	unsigned mask = ring.params.sq_entries - 1, at = *tail & mask;
	ring.entries[at] = entry;
	((unsigned *)(ring.sq + ring.params.sq_off.array))[at] = at;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	EQUAL(syscall(SYS_io_uring_enter, ring.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0), 1);
	struct io_uring_cqe *done = (struct io_uring_cqe *)(ring.cq + ring.params.cq_off.cqes);
	int result = done[*head & (ring.params.cq_entries - 1)].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return result;
}

static void through_io_uring(void)
{
	unsigned char *out = aligned_alloc(PAGE, MIB), *in = aligned_alloc(PAGE, MIB);
	set_up_ring();
	fill(out, MIB, 0, 11);
	static const int flags[] = { O_RDWR | O_CREAT, O_RDWR | O_DIRECT };
	for (int i = 0; i < 2; i++) {
		int fd = OK(open("f", flags[i], 0644));
		off_t offset = i * MIB;
		OK(ftruncate(fd, offset));
		EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_WRITE, .fd = fd, .addr = (uintptr_t)out, .len = MIB, .off = offset }), MIB);
		EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_FSYNC, .fd = fd }), 0);
		EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_READ, .fd = fd, .addr = (uintptr_t)in, .len = MIB, .off = offset }), MIB);
		REQUIRE(!memcmp(in, out, MIB), "io_uring reads other bytes than it wrote");
		EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_FALLOCATE, .fd = fd, .addr = 8 * MIB, .len = 0, .off = 0 }), 0);
		EQUAL(stat_of("f").st_size, 8 * MIB);
		EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_READ, .fd = fd, .addr = (uintptr_t)in, .len = 1, .off = 8 * MIB }), 0);
		close(fd);
	}
	EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_OPENAT, .fd = AT_FDCWD, .addr = (uintptr_t) "none", .open_flags = O_RDONLY }), -ENOENT);
	EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_UNLINKAT, .fd = AT_FDCWD, .addr = (uintptr_t) "f" }), 0);
}

/* A driver may send a long write in pieces, all at once. */
static void long_appends_keep_their_order(void)
{
	unsigned char *out = aligned_alloc(PAGE, MIB), *in = aligned_alloc(PAGE, MIB);
	fill(out, MIB, 0, 12);
	set_up_ring();
	for (int i = 0; i < 60; i++) {
		int fd = OK(open("f", O_RDWR | O_CREAT | O_TRUNC | O_APPEND | (i % 2 ? O_DIRECT : 0), 0644));
		if (i % 3)
			EQUAL(submit((struct io_uring_sqe){ .opcode = IORING_OP_WRITE, .fd = fd, .addr = (uintptr_t)out, .len = MIB }), MIB);
		else
			EQUAL(write(fd, out, MIB), MIB);
		EQUAL(pread(fd, in, MIB, 0), MIB);
		REQUIRE(!memcmp(in, out, MIB), "append %d was written in another order", i);
		close(fd);
	}
}

static void mappings_of_appended_files(void)
{
	char seen[2 * PAGE] = "old";
	int fd = OK(open("f", O_RDWR | O_CREAT | O_APPEND, 0644));
	write_all(fd, seen, sizeof seen, 0);
	char *map = (char *)OK(mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	memcpy(map, "new", 3);
	OK(msync(map, PAGE, MS_SYNC));
	OK(munmap(map, 2 * PAGE));
	EQUAL(write(fd, "end", 3), 3);
	close(fd);
	EQUAL(stat_of("f").st_size, 2 * PAGE + 3);
	memcpy(seen, "new", 3);
	fd = OK(open("f", O_RDONLY | O_DIRECT));
	char *page = aligned_alloc(PAGE, PAGE);
	EQUAL(pread(fd, page, PAGE, 0), PAGE);
	REQUIRE(!memcmp(page, seen, PAGE), "what a mapping wrote is not in the file");
}

/* I/O whose memory is a mapping of the same file, or of one that is not in memory yet. */
static void io_from_and_to_mappings(void)
{
	unsigned char seen[PAGE];
	for (int direct = 0; direct < 2; direct++) {
		int fd = OK(open("f", O_RDWR | O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0), 0644)), plain = OK(open("f", O_RDWR));
		unsigned char *data = aligned_alloc(PAGE, 4 * PAGE);
		fill(data, 4 * PAGE, 0, 3);
		write_all(plain, data, 4 * PAGE, 0);
		OK(fsync(plain));
		unsigned char *map = (unsigned char *)OK(mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, plain, 0));
		EQUAL(pwrite(fd, map + PAGE, PAGE, 0), PAGE);
		EQUAL(pread(plain, seen, PAGE, 0), PAGE);
		REQUIRE(!memcmp(seen, data + PAGE, PAGE), "a write from a mapping of the file wrote other bytes");
		EQUAL(pread(fd, map + 2 * PAGE, PAGE, 3 * PAGE), PAGE);
		REQUIRE(!memcmp(map + 2 * PAGE, data + 3 * PAGE, PAGE), "a read into a mapping of the file gave other bytes");
		ssize_t n = pwrite(fd, map + PAGE, PAGE, PAGE); /* onto itself */
		REQUIRE(n == PAGE || (n == -1 && errno == EFAULT), "a page written onto itself: %s", strerror(errno));
		EQUAL(pread(plain, seen, PAGE, PAGE), PAGE);
		REQUIRE(!memcmp(seen, data + PAGE, PAGE), "a page written onto itself changed");
		OK(munmap(map, 4 * PAGE));
		close(plain);
		close(fd);
	}
}

static void behind_the_end_is_zero(void)
{
	static char page[PAGE];
	memset(page, 'x', PAGE);
	for (int way = 0; way < 4; way++) {
		int fd = create_file("f", "");
		write_all(fd, page, PAGE, 0);
		write_all(fd, page, PAGE, PAGE);
		OK(fsync(fd));
		OK(ftruncate(fd, 100));
		switch (way) {
		case 0: OK(ftruncate(fd, 3 * PAGE)); break;
		case 1: write_all(fd, "", 1, 3 * PAGE - 1); break;
		case 2: OK(fallocate(fd, 0, 0, 3 * PAGE)); break;
		case 3:
			if (fallocate(fd, FALLOC_FL_ZERO_RANGE, 2 * PAGE, PAGE) == -1) /* not every file system has it */
				OK(ftruncate(fd, 3 * PAGE));
			break;
		}
		char *map = (char *)OK(mmap(0, 3 * PAGE, PROT_READ, MAP_SHARED, fd, 0));
		REQUIRE(!memcmp(map + 100, zeros, 3 * PAGE - 100), "growth %d shows old bytes in a mapping", way);
		char seen[3 * PAGE];
		EQUAL(pread(fd, seen, sizeof seen, 0), 3 * PAGE);
		REQUIRE(!memcmp(seen + 100, zeros, 3 * PAGE - 100), "growth %d shows old bytes", way);
		OK(munmap(map, 3 * PAGE));
		close(fd);
	}
}

static sigjmp_buf bus_error;

static void on_bus_error(int signal)
{
	(void)signal;
	siglongjmp(bus_error, 1);
}

static void require_bus_error(volatile char *at, const char *what)
{
	signal(SIGBUS, on_bus_error);
	if (sigsetjmp(bus_error, 1) == 0) {
		(void)*at;
		fail("%s gave no SIGBUS", what);
	}
}

static void mappings_follow_truncation(void)
{
	int fd = create_file("f", "");
	OK(ftruncate(fd, 4 * PAGE));
	char *map = (char *)OK(mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	memset(map, 'm', 4 * PAGE);
	OK(ftruncate(fd, PAGE + 10));
	require_bus_error(map + 2 * PAGE, "a page behind the new end");
	EQUAL(map[PAGE + 9], 'm');
	EQUAL(map[PAGE + 10], 0);
	OK(ftruncate(fd, 4 * PAGE));
	REQUIRE(!memcmp(map + PAGE + 10, zeros, 3 * PAGE - 10), "what was cut off came back in a mapping");
	OK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE));
	REQUIRE(!memcmp(map, zeros, PAGE), "a mapping still shows what was punched");
	map[5] = 'n';
	OK(msync(map, PAGE, MS_ASYNC));
	char *moved = (char *)OK(mremap(map, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE));
	EQUAL(moved[5], 'n');
	require_bus_error(moved + 5 * PAGE, "a page behind the end in a grown mapping");
}

static void mappings_see_every_writer(void)
{
	unsigned char *page = aligned_alloc(PAGE, PAGE), *expected = aligned_alloc(PAGE, PAGE);
	int fd = create_file("f", ""), direct = OK(open("f", O_RDWR | O_DIRECT)), other = create_file("g", "");
	OK(ftruncate(fd, 4 * PAGE));
	unsigned char *map = (unsigned char *)OK(mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	for (int i = 0; i < 4; i++)
		map[i * PAGE] = 1; /* in memory and dirty */
	fill(page, PAGE, 0, 5);
	fill(expected, PAGE, 0, 5);
	EQUAL(pwrite(direct, page, PAGE, PAGE), PAGE);
	REQUIRE(!memcmp(map + PAGE, expected, PAGE), "a mapping does not see a direct write");
	memcpy(map + 2 * PAGE, expected, PAGE);
	EQUAL(pread(direct, page, PAGE, 2 * PAGE), PAGE);
	REQUIRE(!memcmp(page, expected, PAGE), "a direct read does not see what a mapping wrote");
	write_all(other, expected, PAGE, 0);
	off_t in = 0, out = 3 * PAGE;
	EQUAL(copy_file_range(other, &in, fd, &out, PAGE, 0), PAGE);
	REQUIRE(!memcmp(map + 3 * PAGE, expected, PAGE), "a mapping does not see a copy");
	in = 2 * PAGE, out = PAGE;
	map[2 * PAGE] ^= 1, expected[0] ^= 1;
	EQUAL(copy_file_range(fd, &in, other, &out, PAGE, 0), PAGE);
	EQUAL(pread(other, page, PAGE, PAGE), PAGE);
	REQUIRE(!memcmp(page, expected, PAGE), "a copy does not see what a mapping wrote");
}

static void writer_of_records(void)
{
	unsigned char *record = aligned_alloc(PAGE, PAGE);
	int fd = OK(open("f", O_WRONLY | O_APPEND | O_DIRECT));
	memset(record, 'r', PAGE);
	for (int i = 0; i < 200; i++)
		EQUAL(write(fd, record, PAGE), PAGE);
}

static void readers_of_a_growing_file_see_no_holes(void)
{
	unsigned char *page = aligned_alloc(PAGE, PAGE);
	close(create_file("f", ""));
	pid_t pid = start_child(writer_of_records);
	for (int direct = 0, done = 0; done < 200;) {
		int fd = OK(open("f", O_RDONLY | (direct ? O_DIRECT : 0)));
		direct = !direct;
		ssize_t n;
		for (done = 0; (n = OK(pread(fd, page, PAGE, (off_t)done * PAGE))) == PAGE; done++)
			for (int i = 0; i < PAGE; i++)
				REQUIRE(page[i] == 'r', "byte %d of record %d is %d", i, done, page[i]);
		EQUAL(n, 0);
		close(fd);
	}
	join_child(pid);
}

static int limited;

static void write_beyond_the_limit(void)
{
	OK(setrlimit(RLIMIT_FSIZE, &(struct rlimit){ PAGE, PAGE }));
	switch (limited) {
	case 0: EQUAL(pwrite(OK(open("f", O_RDWR)), "x", 1, PAGE), -1); break;
	case 1: EQUAL(ftruncate(OK(open("f", O_RDWR)), PAGE + 1), -1); break;
	case 2: EQUAL(fallocate(OK(open("f", O_RDWR)), 0, 0, PAGE + 1), -1); break;
	}
}

static void size_limit_sends_a_signal(void)
{
	close(create_file("f", "text"));
	for (limited = 0; limited < 3; limited++) {
		int status;
		pid_t pid = start_child(write_beyond_the_limit);
		OK(waitpid(pid, &status, 0));
		if (limited == 2 && WIFEXITED(status))
			continue; /* allowed: only the error counts */
		REQUIRE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ, "operation %d beyond the limit ended with %x", limited, status);
		EQUAL(stat_of("f").st_size, 4);
	}
	signal(SIGXFSZ, SIG_IGN);
	OK(setrlimit(RLIMIT_FSIZE, &(struct rlimit){ PAGE, PAGE }));
	int fd = OK(open("f", O_RDWR));
	FAILS(EFBIG, fallocate(fd, 0, 0, PAGE + 1));
	char two[2] = "ab";
	EQUAL(pwrite(fd, two, 2, PAGE - 1), 1); /* what fits */
	EQUAL(stat_of("f").st_size, PAGE);
}

static void swapping_is_refused(void)
{
	static char header[PAGE] __attribute__((aligned(PAGE)));
	int fd = create_file("f", "");
	header[0] = 'h'; /* User-Mode-Linux shares no page of zeroes with a device */
	for (int i = 0; i < 64; i++)
		write_all(fd, header, PAGE, i * PAGE);
	memcpy(header + PAGE - 10, "SWAPSPACE2", 10);
	*(uint32_t *)(header + 1024) = 1;
	*(uint32_t *)(header + 1028) = 63;
	write_all(fd, header, PAGE, 0);
	OK(fsync(fd));
	OK(chmod("f", 0600));
	if (swapon("f", 0) == 0) {
		OK(swapoff("f")); /* the directory itself may do it */
		return;
	}
	REQUIRE(errno == EINVAL || errno == ENOSYS, "swapon: %s", strerror(errno));
	OK(pwrite(fd, "x", 1, 0));
	OK(unlink("f"));
}

static void pipes_of_pages(void)
{
	unsigned char *data = malloc(MIB), *seen = malloc(MIB);
	int pipes[2], from = create_file("from", ""), to = create_file("to", "");
	fill(data, MIB, 0, 9);
	write_all(from, data, MIB, 0);
	OK(pipe(pipes));
	for (off_t in = 0, out = 0; in < MIB;) {
		ssize_t n = OK(splice(from, &in, pipes[1], NULL, 65536, SPLICE_F_MOVE));
		REQUIRE(n > 0, "splice stopped at %lld", (long long)in);
		while (n > 0)
			n -= OK(splice(pipes[0], NULL, to, &out, n, SPLICE_F_MOVE));
	}
	expect_content("to", data, MIB);
	EQUAL(splice(from, &(off_t){ 2 * MIB }, pipes[1], NULL, 10, 0), 0);
	FAILS(EINVAL, splice(pipes[0], NULL, OK(open("to", O_WRONLY | O_APPEND)), NULL, 10, 0));
	/* what lies in a pipe does not change the file that it came from */
	OK(splice(from, &(off_t){ 0 }, pipes[1], NULL, 1, 0));
	EQUAL(write(pipes[1], "y", 1), 1);
	expect_content("from", data, MIB);
	EQUAL(vmsplice(pipes[1], &(struct iovec){ data, PAGE }, 1, 0), PAGE);
	EQUAL(read(pipes[0], seen, 2), 2);
	EQUAL(splice(pipes[0], NULL, to, &(off_t){ 10 }, PAGE, 0), PAGE);
	EQUAL(pread(to, seen, PAGE, 10), PAGE);
	REQUIRE(!memcmp(seen, data, PAGE), "vmsplice and splice wrote other bytes");
}

const struct check io_checks[] = {
	{ "flags of one write", flags_of_one_write },
	{ "bad addresses", bad_addresses },
	{ "io_uring", through_io_uring },
	{ "long appends keep their order", long_appends_keep_their_order },
	{ "mappings of appended files", mappings_of_appended_files },
	{ "reads into and writes from mappings", io_from_and_to_mappings },
	{ "what lies behind the end is zero", behind_the_end_is_zero },
	{ "mappings follow truncation", mappings_follow_truncation },
	{ "mappings see every writer", mappings_see_every_writer },
	{ "readers of a growing file see no holes", readers_of_a_growing_file_see_no_holes },
	{ "file size limit sends a signal", size_limit_sends_a_signal },
	{ "swapping is refused or works", swapping_is_refused },
	{ "pipes of pages", pipes_of_pages },
	{ 0 },
};
