/* Checks of file content: reading, writing, mapping, direct I/O and several writers at once. */
#include "checks.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

enum { PAGE = 4096, MIB = 1 << 20 };

static void read_back_every_size(void)
{
	static const size_t sizes[] = { 1, 511, 512, 513, 4095, 4096, 4097, 65535, 131072, 131073, 262145, MIB + 7 };
	unsigned char *data = malloc(2 * MIB);
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
		int fd = OK(open("f", O_RDWR | O_CREAT | O_TRUNC, 0644));
		fill(data, sizes[i], 0, i);
		write_all(fd, data, sizes[i], 0);
		close(fd);
		expect_content("f", data, sizes[i]);
		EQUAL(stat_of("f").st_size, sizes[i]);
	}
}

static void write_at_odd_offsets(void)
{
	unsigned char *expected = calloc(1, MIB), piece[10007];
	int fd = OK(open("f", O_RDWR | O_CREAT, 0644));
	OK(ftruncate(fd, MIB));
	for (unsigned i = 0; i < 60; i++) {
		size_t offset = (size_t)i * 7919 * 13 % (MIB - sizeof piece), len = 1 + i * 4801 % sizeof piece;
		fill(piece, len, offset, i);
		memcpy(expected + offset, piece, len);
		write_all(fd, piece, len, offset);
	}
	close(fd);
	expect_content("f", expected, MIB);
}

static void vectored_io(void)
{
	char a[3] = "abc", b[5000], c[1] = "z", seen[5004];
	memset(b, 'b', sizeof b);
	struct iovec out[] = { { a, 3 }, { b, sizeof b }, { c, 1 } };
	int fd = create_file("f", "");
	EQUAL(pwritev(fd, out, 3, 0), 5004);
	struct iovec in[] = { { seen, 1 }, { seen + 1, 5000 }, { seen + 5001, 3 } };
	EQUAL(preadv(fd, in, 3, 0), 5004);
	REQUIRE(!memcmp(seen, "abcb", 4) && seen[5003] == 'z', "vectored data changed");
}

static void append(void)
{
	int first = create_file("f", "one "), second = OK(open("f", O_WRONLY | O_APPEND)), third = OK(open("f", O_WRONLY | O_APPEND));
	EQUAL(write(second, "two ", 4), 4);
	EQUAL(write(third, "three ", 6), 6);
	EQUAL(write(second, "four", 4), 4);
	close(first);
	expect_content("f", "one two three four", 18);
}

static void open_with_truncation(void)
{
	close(create_file("f", "something long"));
	int fd = OK(open("f", O_WRONLY | O_TRUNC));
	EQUAL(stat_of("f").st_size, 0);
	write_all(fd, "x", 1, 0);
	close(fd);
	expect_content("f", "x", 1);
}

/* Copies this program to "f" and runs it there; it ends when the descriptor that is returned is closed. */
static int run_a_copy(void)
{
	int from = OK(open("/proc/self/exe", O_RDONLY)), to = OK(open("f", O_WRONLY | O_CREAT, 0755)), pipes[2], started[2];
	char letter;
	OK(sendfile(to, from, NULL, 64 * MIB));
	close(from);
	close(to);
	OK(pipe2(pipes, O_CLOEXEC));
	OK(pipe2(started, O_CLOEXEC));
	if (OK(fork()) == 0) {
		dup2(pipes[0], STDIN_FILENO);
		execl("./f", "f", "wait", (char *)NULL);
		_exit(write(started[1], "x", 1));
	}
	close(pipes[0]);
	close(started[1]);
	/* the end of file comes with the execution */
	REQUIRE(read(started[0], &letter, 1) == 0, "the copy of this program does not run");
	close(started[0]);
	return pipes[1];
}

static void running_program_stays_as_it_is(void)
{
	static const int flags[] = { O_WRONLY, O_RDWR, O_RDONLY | O_TRUNC, O_WRONLY | O_TRUNC };
	int running = run_a_copy(), status;
	off_t size = stat_of("f").st_size;
	for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
		FAILS(ETXTBSY, open("f", flags[i]));
		EQUAL(stat_of("f").st_size, size);
	}
	close(running);
	OK(wait(&status));
	EQUAL(status, 0);
	OK(truncate("f", 0));
	EQUAL(stat_of("f").st_size, 0);
}

static void truncate_up_and_down(void)
{
	static const char zeros[10000];
	char expected[10000] = "0123456789";
	int fd = create_file("f", "0123456789");
	OK(truncate("f", 10000));
	EQUAL(stat_of("f").st_size, 10000);
	expect_content("f", expected, sizeof expected);
	OK(ftruncate(fd, 4));
	expect_content("f", "0123", 4);
	/* what was cut off must not come back */
	OK(ftruncate(fd, 8));
	expect_content("f", "0123\0\0\0\0", 8);
	OK(ftruncate(fd, 0));
	OK(ftruncate(fd, sizeof zeros));
	expect_content("f", zeros, sizeof zeros);
	FAILS(EINVAL, ftruncate(fd, -1));
	OK(mkdir("d", 0755));
	FAILS(EISDIR, truncate("d", 0));
}

static void end_of_file(void)
{
	char seen[16];
	int fd = create_file("f", "0123456789");
	EQUAL(pread(fd, seen, 16, 0), 10);
	EQUAL(pread(fd, seen, 16, 8), 2);
	EQUAL(pread(fd, seen, 16, 10), 0);
	EQUAL(pread(fd, seen, 16, 1000000), 0);
	EQUAL(lseek(fd, 0, SEEK_END), 10);
	EQUAL(lseek(fd, -3, SEEK_CUR), 7);
	FAILS(EINVAL, lseek(fd, -1, SEEK_SET));
}

static void open_mode_is_kept(void)
{
	char c;
	close(create_file("f", "x"));
	FAILS(EBADF, write(OK(open("f", O_RDONLY)), "y", 1));
	FAILS(EBADF, read(OK(open("f", O_WRONLY)), &c, 1));
	OK(mkdir("d", 0755));
	FAILS(EISDIR, read(OK(open("d", O_RDONLY)), &c, 1));
}

static void beyond_four_gibibytes(void)
{
	char seen[4];
	off_t offset = (5LL << 30) + 123;
	int fd = create_file("f", "");
	write_all(fd, "far!", 4, offset);
	OK(fsync(fd));
	EQUAL(stat_of("f").st_size, offset + 4);
	EQUAL(pread(fd, seen, 4, offset), 4);
	REQUIRE(!memcmp(seen, "far!", 4), "bytes beyond 4 GiB changed");
	EQUAL(pread(fd, seen, 4, 4LL << 30), 4);
	REQUIRE(!memcmp(seen, "\0\0\0\0", 4), "a hole is not zero");
}

static void file_size_limit(void)
{
	struct rlimit limit = { 4096, 4096 };
	int fd = create_file("f", "");
	signal(SIGXFSZ, SIG_IGN);
	OK(setrlimit(RLIMIT_FSIZE, &limit));
	FAILS(EFBIG, pwrite(fd, "x", 1, 4096));
	FAILS(EFBIG, ftruncate(fd, 4097));
	OK(ftruncate(fd, 4096));
}

static void mmap_shared(void)
{
	char seen[4];
	int fd = OK(open("f", O_RDWR | O_CREAT, 0644));
	OK(ftruncate(fd, 3 * PAGE));
	char *one = (char *)OK(mmap(0, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	char *two = (char *)OK(mmap(0, 3 * PAGE, PROT_READ, MAP_SHARED, fd, 0));
	memcpy(one + PAGE - 2, "span", 4);
	EQUAL(pread(fd, seen, 4, PAGE - 2), 4);
	REQUIRE(!memcmp(seen, "span", 4), "read(2) does not see what a mapping wrote");
	REQUIRE(!memcmp(two + PAGE - 2, "span", 4), "another mapping does not see what a mapping wrote");
	write_all(fd, "WRIT", 4, 2 * PAGE);
	REQUIRE(!memcmp(one + 2 * PAGE, "WRIT", 4), "a mapping does not see what write(2) wrote");
	OK(msync(one, 3 * PAGE, MS_SYNC));
	OK(munmap(one, 3 * PAGE));
	OK(munmap(two, 3 * PAGE));
	close(fd);
	fd = OK(open("f", O_RDONLY | O_DIRECT));
	char *page = aligned_alloc(PAGE, PAGE);
	EQUAL(pread(fd, page, PAGE, 2 * PAGE), PAGE);
	REQUIRE(!memcmp(page, "WRIT", 4), "msync did not bring the data to the file");
}

static void mmap_private(void)
{
	int fd = create_file("f", "original");
	char *map = (char *)OK(mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
	REQUIRE(!memcmp(map, "original", 8), "a private mapping shows other bytes");
	memcpy(map, "changed!", 8);
	REQUIRE(map[8] == 0, "the rest of the last page is not zero");
	OK(munmap(map, PAGE));
	expect_content("f", "original", 8);
}

static sigjmp_buf bus_error;

static void on_bus_error(int signal)
{
	(void)signal;
	siglongjmp(bus_error, 1);
}

static void mmap_beyond_the_end(void)
{
	int fd = create_file("f", "short");
	volatile char *map = (volatile char *)OK(mmap(0, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0));
	signal(SIGBUS, on_bus_error);
	if (sigsetjmp(bus_error, 1) == 0) {
		(void)map[PAGE];
		fail("a read of a page behind the end of the file gave no SIGBUS");
	}
}

static void mmap_after_close_and_unlink(void)
{
	int fd = create_file("f", "kept");
	char *map = (char *)OK(mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	close(fd);
	OK(unlink("f"));
	memcpy(map, "KEPT", 4);
	OK(msync(map, PAGE, MS_SYNC));
	REQUIRE(!memcmp(map, "KEPT", 4), "a mapping lost its file");
}

static void direct_io(void)
{
	unsigned char *out = aligned_alloc(PAGE, MIB), *in = aligned_alloc(PAGE, MIB);
	int fd = OK(open("f", O_RDWR | O_CREAT | O_DIRECT, 0644));
	fill(out, MIB, 0, 1);
	write_all(fd, out, MIB, 0);
	EQUAL(pread(fd, in, MIB, 0), MIB);
	REQUIRE(!memcmp(out, in, MIB), "direct read gives other bytes than direct write wrote");
	fill(out, PAGE, 0, 2);
	write_all(fd, out, PAGE, 5 * PAGE);
	EQUAL(pread(fd, in, 2 * PAGE, 5 * PAGE), 2 * PAGE);
	REQUIRE(!memcmp(out, in, PAGE), "direct rewrite is not seen");
	EQUAL(pread(fd, in, PAGE, MIB), 0);
}

static void direct_and_buffered_agree(void)
{
	unsigned char *page = aligned_alloc(PAGE, PAGE), seen[PAGE];
	int buffered = OK(open("f", O_RDWR | O_CREAT, 0644)), direct = OK(open("f", O_RDWR | O_DIRECT));
	fill(page, PAGE, 0, 3);
	write_all(buffered, page, PAGE, 0);
	memset(page, 0, PAGE);
	EQUAL(pread(direct, page, PAGE, 0), PAGE);
	fill(seen, PAGE, 0, 3);
	REQUIRE(!memcmp(page, seen, PAGE), "a direct read does not see a buffered write");
	fill(page, PAGE, 0, 4);
	write_all(direct, page, PAGE, 0);
	EQUAL(pread(buffered, seen, PAGE, 0), PAGE);
	REQUIRE(!memcmp(page, seen, PAGE), "a buffered read does not see a direct write");
}

static void direct_read_at_the_end(void)
{
	unsigned char *page = aligned_alloc(PAGE, 2 * PAGE);
	int fd = create_file("f", "hundred bytes minus some");
	OK(fsync(fd));
	int direct = OK(open("f", O_RDONLY | O_DIRECT));
	EQUAL(pread(direct, page, 2 * PAGE, 0), 24);
}

static void copy_file_range_copies(void)
{
	unsigned char *data = malloc(300000);
	fill(data, 300000, 0, 9);
	int from = OK(open("from", O_RDWR | O_CREAT, 0644)), to = OK(open("to", O_RDWR | O_CREAT, 0644));
	write_all(from, data, 300000, 0);
	off_t in = 0, out = 0;
	while (in < 300000)
		REQUIRE(OK(copy_file_range(from, &in, to, &out, 300000 - in, 0)) > 0, "copy_file_range stopped early");
	expect_content("to", data, 300000);
	in = 1000, out = 500000;
	EQUAL(copy_file_range(from, &in, to, &out, 10, 0), 10);
	EQUAL(stat_of("to").st_size, 500010);
	in = 300000, out = 0;
	EQUAL(copy_file_range(from, &in, to, &out, 10, 0), 0);
}

static void sendfile_sends(void)
{
	char seen[9];
	int pipes[2], fd = create_file("f", "from file");
	off_t offset = 0;
	OK(pipe(pipes));
	EQUAL(sendfile(pipes[1], fd, &offset, 9), 9);
	EQUAL(read(pipes[0], seen, 9), 9);
	REQUIRE(!memcmp(seen, "from file", 9), "sendfile sent other bytes");
}

static void synchronise(void)
{
	int fd = create_file("f", "data");
	OK(fsync(fd));
	write_all(fd, "more", 4, 4);
	OK(fdatasync(fd));
	OK(sync_file_range(fd, 0, 8, SYNC_FILE_RANGE_WRITE));
	int dir = OK(open(".", O_RDONLY | O_DIRECTORY));
	OK(fsync(dir));
	OK(syncfs(dir));
	int synchronous = OK(open("f", O_WRONLY | O_SYNC | O_APPEND));
	EQUAL(write(synchronous, "!", 1), 1);
	expect_content("f", "datamore!", 9);
}

enum { WRITERS = 4, BLOCKS = 64 };
static int writer_index;

static void write_own_blocks(void)
{
	unsigned char block[PAGE];
	int fd = OK(open("f", O_WRONLY));
	for (int i = writer_index; i < BLOCKS; i += WRITERS) {
		memset(block, 'A' + writer_index, PAGE);
		write_all(fd, block, PAGE, (off_t)i * PAGE);
	}
	close(fd);
}

static void concurrent_writers(void)
{
	pid_t pids[WRITERS];
	unsigned char *expected = malloc(BLOCKS * PAGE);
	close(create_file("f", ""));
	for (writer_index = 0; writer_index < WRITERS; writer_index++)
		pids[writer_index] = start_child(write_own_blocks);
	for (int i = 0; i < WRITERS; i++)
		join_child(pids[i]);
	for (int i = 0; i < BLOCKS; i++)
		memset(expected + i * PAGE, 'A' + i % WRITERS, PAGE);
	expect_content("f", expected, BLOCKS * PAGE);
}

static void append_own_records(void)
{
	char record[64];
	int fd = OK(open("f", O_WRONLY | O_APPEND));
	for (int i = 0; i < 100; i++) {
		memset(record, 'a' + writer_index, sizeof record);
		EQUAL(write(fd, record, sizeof record), (ssize_t)sizeof record);
	}
}

static void concurrent_appenders(void)
{
	pid_t pids[WRITERS];
	char record[64];
	int counts[WRITERS] = { 0 }, fd = create_file("f", "");
	for (writer_index = 0; writer_index < WRITERS; writer_index++)
		pids[writer_index] = start_child(append_own_records);
	for (int i = 0; i < WRITERS; i++)
		join_child(pids[i]);
	EQUAL(stat_of("f").st_size, WRITERS * 100 * 64);
	for (int i = 0; i < WRITERS * 100; i++) {
		EQUAL(pread(fd, record, 64, (off_t)i * 64), 64);
		for (int j = 1; j < 64; j++)
			REQUIRE(record[j] == record[0], "appended record %d is torn", i);
		REQUIRE(record[0] >= 'a' && record[0] < 'a' + WRITERS, "appended record %d is lost", i);
		counts[record[0] - 'a']++;
	}
	for (int i = 0; i < WRITERS; i++)
		EQUAL(counts[i], 100);
}

const struct check data_checks[] = {
	{ "read back every size", read_back_every_size },
	{ "write at odd offsets", write_at_odd_offsets },
	{ "vectored reads and writes", vectored_io },
	{ "append", append },
	{ "open with truncation", open_with_truncation },
	{ "a running program stays as it is", running_program_stays_as_it_is },
	{ "truncate up and down", truncate_up_and_down },
	{ "end of file", end_of_file },
	{ "open mode is kept", open_mode_is_kept },
	{ "beyond 4 GiB", beyond_four_gibibytes },
	{ "file size limit", file_size_limit },
	{ "mmap shared", mmap_shared },
	{ "mmap private", mmap_private },
	{ "mmap beyond the end", mmap_beyond_the_end },
	{ "mmap after close and unlink", mmap_after_close_and_unlink },
	{ "direct reads and writes", direct_io },
	{ "direct and buffered agree", direct_and_buffered_agree },
	{ "direct read at the end", direct_read_at_the_end },
	{ "copy_file_range", copy_file_range_copies },
	{ "sendfile", sendfile_sends },
	{ "fsync fdatasync syncfs", synchronise },
	{ "concurrent writers", concurrent_writers },
	{ "concurrent appenders", concurrent_appenders },
	{ 0 },
};
