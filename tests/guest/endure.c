/*
 * Work that goes on until a file `stop` appears in the directory, while somebody outside kills the service again and again:
 *
 *   checks endure DIR SEED [FILES OPENED]
 *
 * Whatever fails, or is not as this program left it, ends it with the reason. Its processes: two that change names, one that
 * appends, one that writes, flushes and reads back, one that holds what a process can hold of a file system, and the first
 * one, which counts in the file `progress` how often it got an answer. FILES files of DIR/many, which are there already, are
 * looked up first, and OPENED of them stay open.
 */
#include "checks.h"

#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/statfs.h>

enum { HELD = 65536, BLOCK = 4096, BLOCKS = 64, LISTED = 100 };

/* Set when the others are to come to an end. */
static volatile sig_atomic_t *stopped;
static unsigned seed;

static unsigned random_below(unsigned limit)
{
	seed = seed * 1664525u + 1013904223u;
	return (seed >> 8) % limit;
}

static const char *path_of(const char *format, unsigned number)
{
	static char paths[8][64];
	static unsigned next;
	char *path = paths[next++ % 8];
	snprintf(path, sizeof paths[0], format, number);
	return path;
}

static void report(const char *what, unsigned count)
{
	printf("%u %s\n", count, what);
	fflush(stdout);
}

static unsigned entries_of(const char *path)
{
	unsigned count = 0;
	DIR *dir = opendir(path);
	REQUIRE(dir, "cannot list %s: %s", path, strerror(errno));
	while (errno = 0, readdir(dir))
		count++;
	EQUAL(errno, 0);
	closedir(dir);
	return count - 2;
}

/* Every step must have the outcome that it has when it is done once. */
static void change_names(const char *dir)
{
	char data[3000];
	unsigned rounds = 0;
	OK(mkdir(dir, 0755));
	OK(chdir(dir));
	for (; !*stopped; rounds++) {
		fill((unsigned char *)data, sizeof data, rounds, 7);
		OK(mkdir(path_of("d-%u", rounds), 0755));
		int fd = OK(open(path_of("d-%u/f", rounds), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
		write_all(fd, data, sizeof data, 0);
		OK(link(path_of("d-%u/f", rounds), path_of("h-%u", rounds)));
		OK(rename(path_of("d-%u/f", rounds), path_of("r-%u", rounds)));
		OK(symlink("target", path_of("s-%u", rounds)));
		OK(mknod(path_of("p-%u", rounds), S_IFIFO | 0600, 0));
		EQUAL(entries_of("."), 5);
		EQUAL(stat_of(path_of("h-%u", rounds)).st_nlink, 2);
		FAILS(EEXIST, open(path_of("r-%u", rounds), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
		OK(unlink(path_of("h-%u", rounds)));
		OK(unlink(path_of("s-%u", rounds)));
		OK(unlink(path_of("p-%u", rounds)));
		OK(rmdir(path_of("d-%u", rounds)));
		expect_content(path_of("r-%u", rounds), data, sizeof data);
		if (random_below(2))
			close(OK(open(path_of("r-%u", rounds), O_WRONLY | O_TRUNC | O_CLOEXEC)));
		OK(unlink(path_of("r-%u", rounds)));
		close(fd);
	}
	EQUAL(entries_of("."), 0);
	report("rounds of names", rounds);
}

static void first_names(void)
{
	change_names("names-1");
}

static void second_names(void)
{
	seed += 77;
	change_names("names-2");
}

/* Each record must be there once, in order. */
static void append(void)
{
	uint32_t written = 0, read_back;
	int fd = OK(open("log", O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
	for (; !*stopped; written++) {
		EQUAL(OK(write(fd, &written, sizeof written)), sizeof written);
		if (written % 64 == 0)
			OK(fsync(fd));
	}
	EQUAL(stat_of("log").st_size, written * sizeof written);
	for (uint32_t n = 0; n < written; n++) {
		EQUAL(OK(pread(fd, &read_back, sizeof read_back, n * sizeof n)), sizeof read_back);
		EQUAL(read_back, n);
	}
	close(fd);
	report("records", written);
}

/* Blocks go to the file and come from there past the guest's cache. */
static void write_and_read_back(void)
{
	unsigned versions[BLOCKS] = {0}, rounds = 0;
	static unsigned char wrote[BLOCK];
	unsigned char *seen = aligned_alloc(BLOCK, BLOCK);
	int fd = OK(open("blocks", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	int direct = OK(open("blocks", O_RDWR | O_DIRECT | O_CLOEXEC));
	OK(ftruncate(fd, BLOCK * BLOCKS));
	for (; !*stopped; rounds++) {
		unsigned block = random_below(BLOCKS);
		fill(wrote, BLOCK, block * BLOCK, ++versions[block]);
		write_all(fd, wrote, BLOCK, block * BLOCK);
		OK(random_below(2) ? fsync(fd) : fdatasync(fd));
		block = random_below(BLOCKS);
		EQUAL(OK(pread(direct, seen, BLOCK, block * BLOCK)), BLOCK);
		fill(wrote, BLOCK, block * BLOCK, versions[block]);
		for (unsigned i = 0; i < BLOCK; i++)
			REQUIRE(seen[i] == (versions[block] ? wrote[i] : 0), "block %u, version %u: wrong byte %u", block,
				versions[block], i);
	}
	report("blocks", rounds);
}

static bool is_locked(const char *path, int type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
	int fd = OK(open(path, O_RDWR | O_CLOEXEC));
	OK(fcntl(fd, F_OFD_GETLK, &lock));
	close(fd);
	return lock.l_type != F_UNLCK;
}

/* In a process of its own, for a process that closes a file loses its locks on it. */
static void require_process_lock(void)
{
	REQUIRE(is_locked("posix", F_WRLCK), "the process's lock is gone");
}

/* A file without a name, locks, a directory half read and a shared mapping. */
static void hold(void)
{
	static unsigned char seen[HELD];
	unsigned char *kept = malloc(HELD);
	fill(kept, HELD, 0, 1);
	int nameless = OK(open("nameless", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
	write_all(nameless, kept, HELD, 0);
	OK(unlink("nameless"));
	struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	OK(fcntl(create_file("locked", "x"), F_OFD_SETLK, &whole));
	OK(flock(create_file("flocked", "x"), LOCK_EX));
	OK(fcntl(create_file("posix", "x"), F_SETLK, &whole));
	int file = create_file("mapped", "");
	OK(ftruncate(file, HELD));
	volatile unsigned char *mapped = mmap(NULL, HELD, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	REQUIRE(mapped != MAP_FAILED, "mmap: %s", strerror(errno));
	OK(mkdir("listed", 0755));
	for (unsigned i = 0; i < LISTED; i++)
		close(create_file(path_of("listed/entry-with-a-long-name-%u", i), ""));
	DIR *dir = opendir("listed");
	unsigned listed = 0, rounds = 0;
	bool names[LISTED] = {false};
	struct dirent *entry;
	REQUIRE(dir, "cannot list: %s", strerror(errno));
	for (; !*stopped; rounds++) {
		EQUAL(OK(pread(nameless, seen, HELD, 0)), HELD);
		REQUIRE(!memcmp(seen, kept, HELD), "the file without a name has changed");
		EQUAL(stat_of(path_of("/proc/self/fd/%u", nameless)).st_mode & S_IFMT, S_IFLNK);
		REQUIRE(is_locked("locked", F_WRLCK), "the open file description's lock is gone");
		if (rounds % 16 == 0)
			in_child(require_process_lock);
		int other = OK(open("flocked", O_RDWR | O_CLOEXEC));
		FAILS(EWOULDBLOCK, flock(other, LOCK_EX | LOCK_NB));
		close(other);
		unsigned at = random_below(HELD);
		mapped[at] = rounds;
		OK(msync((void *)mapped, HELD, MS_SYNC));
		EQUAL(OK(pread(file, seen, 1, at)), 1);
		EQUAL(seen[0], rounds & 0xff);
		if (rounds % 16 == 0 && listed < LISTED / 2 && (entry = readdir(dir)) && entry->d_name[0] != '.') {
			names[atoi(strrchr(entry->d_name, '-') + 1) % LISTED] = true;
			listed++;
		}
	}
	while (errno = 0, entry = readdir(dir)) {
		if (entry->d_name[0] == '.')
			continue;
		unsigned number = atoi(strrchr(entry->d_name, '-') + 1) % LISTED;
		REQUIRE(!names[number], "%s is listed twice", entry->d_name);
		names[number] = true;
		listed++;
	}
	EQUAL(errno, 0);
	EQUAL(listed, LISTED);
	report("rounds of what is held", rounds);
}

static void look_up_many(unsigned files, unsigned opened)
{
	for (unsigned n = 0; n < files; n++) {
		if (n < opened)
			OK(open(path_of("many/file-%u", n), O_RDONLY | O_CLOEXEC));
		else
			stat_of(path_of("many/file-%u", n));
	}
}

/* Counts answers until the end is asked for; ends at once when another process has failed. */
static void count_answers(unsigned others)
{
	struct statfs about;
	int status, fd = OK(open("progress", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	struct stat st;
	for (uint64_t answers = 1; lstat("stop", &st) == -1; answers++) {
		EQUAL(errno, ENOENT);
		OK(statfs(".", &about));
		write_all(fd, &answers, sizeof answers, 0);
		if (OK(waitpid(-1, &status, WNOHANG)) > 0)
			fail("a process has ended with %#x", status);
	}
	*stopped = true;
	for (; others; others--) {
		OK(waitpid(-1, &status, 0));
		REQUIRE(status == 0, "a process has ended with %#x", status);
	}
}

void endure(char **arguments, int count)
{
	static void (*const bodies[])(void) = {first_names, second_names, append, write_and_read_back, hold};
	enum { BODIES = sizeof bodies / sizeof *bodies };
	OK(chdir(arguments[0]));
	umask(022);
	seed = strtoul(arguments[1], NULL, 0);
	if (count == 4)
		look_up_many(strtoul(arguments[2], NULL, 0), strtoul(arguments[3], NULL, 0));
	void *shared = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	REQUIRE(shared != MAP_FAILED, "mmap: %s", strerror(errno));
	stopped = shared;
	for (unsigned n = 0; n < BODIES; n++) {
		seed++;
		start_child(bodies[n]);
	}
	count_answers(BODIES);
}
