/*
 * Answers: what system calls come to for every kind of file and every argument that matters. These checks only say it, a line
 * for each call; whoever runs them on a mount and on the directory behind it compares the two.
 */
#include "checks.h"

#include <ftw.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <signal.h>

enum { PAGE = 4096 };

/* Says what a call came to: its value, or the name of its error. */
#define SAY(call, format, ...)                                                                                                 \
	({                                                                                                                     \
		errno = 0;                                                                                                     \
		long said_ = (long)(call);                                                                                     \
		if (said_ == -1)                                                                                               \
			printf(format ": %s\n", ##__VA_ARGS__, strerrorname_np(errno));                                        \
		else                                                                                                           \
			printf(format ": %ld\n", ##__VA_ARGS__, said_);                                                        \
		said_;                                                                                                         \
	})
/* The same for calls whose value means nothing, such as descriptors. */
#define SAY_WHETHER(call, format, ...) SAY((long)(call) == -1 ? -1 : 0, format, ##__VA_ARGS__)
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* Inodes of every kind; "missing" is none. */
static const char *const kinds[] = { "file", "other", "empty", "full", "link", "loop", "fifo", "socket", "device", "missing" };

static void make_kinds(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "socket" };
	close(create_file("file", "text"));
	OK(chmod("file", 0666));
	OK(link("file", "other"));
	OK(mkdir("empty", 0755));
	OK(mkdir("full", 0755));
	close(create_file("full/inner", "inner"));
	OK(symlink("file", "link"));
	OK(symlink("loop", "loop"));
	OK(mkfifo("fifo", 0644));
	int fd = OK(socket(AF_UNIX, SOCK_STREAM, 0));
	OK(bind(fd, (struct sockaddr *)&address, sizeof address));
	close(fd);
	OK(mknod("device", S_IFCHR | 0666, makedev(1, 3)));
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type;
	if (ftw->level > 0)
		remove(path);
	return 0;
}

static void remove_kinds(void)
{
	nftw(".", remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static void say_kind(const char *path)
{
	struct stat st;
	if (lstat(path, &st) == -1)
		printf("  %s: %s\n", path, strerrorname_np(errno));
	else
		printf("  %s: mode %o links %ld size %lld\n", path, st.st_mode, (long)st.st_nlink,
		       S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size);
}

static void opens(void)
{
	static const int access[] = { O_RDONLY, O_WRONLY, O_RDWR, 3 };
	static const int flags[] = { 0, O_CREAT, O_CREAT | O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY, O_CREAT | O_DIRECTORY, O_NOFOLLOW,
		O_PATH, O_PATH | O_NOFOLLOW, O_DIRECT, O_TMPFILE, O_TMPFILE | O_EXCL, O_NOATIME, O_SYNC, O_CREAT | O_TRUNC | O_APPEND };
	for (size_t i = 0; i < COUNT(access); i++)
		for (size_t j = 0; j < COUNT(flags); j++)
			for (size_t k = 0; k < COUNT(kinds); k++) {
				int fd = open(kinds[k], access[i] | flags[j] | O_NONBLOCK, 0640);
				SAY_WHETHER(fd, "open %s %o", kinds[k], access[i] | flags[j]);
				if (fd >= 0)
					close(fd);
				if (!strcmp(kinds[k], "missing") && fd >= 0)
					unlink("missing");
			}
	say_kind("file");
}

static void answers_of_open(void)
{
	make_kinds();
	opens();
	as_user(opens);
}

static void answers_of_rename(void)
{
	static const unsigned flags[] = { 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT, RENAME_NOREPLACE | RENAME_EXCHANGE,
		RENAME_WHITEOUT | RENAME_NOREPLACE, RENAME_WHITEOUT | RENAME_EXCHANGE, 8 };
	for (size_t i = 0; i < COUNT(flags); i++)
		for (size_t j = 0; j < COUNT(kinds); j++)
			for (size_t k = 0; k < COUNT(kinds); k++) {
				make_kinds();
				SAY(renameat2(AT_FDCWD, kinds[j], AT_FDCWD, kinds[k], flags[i]), "rename %s %s %x", kinds[j],
				    kinds[k], flags[i]);
				say_kind(kinds[j]);
				say_kind(kinds[k]);
				remove_kinds();
			}
}

static void operations_on(const char *path)
{
	char text[64];
	struct statfs fs;
	struct stat st;
	struct timespec times[2] = { { 1, 1 }, { 2, 2 } };
	SAY(lstat(path, &st), "lstat '%s'", path);
	SAY(stat(path, &st), "stat '%s'", path);
	SAY(access(path, R_OK | W_OK), "access rw '%s'", path);
	SAY(access(path, X_OK), "access x '%s'", path);
	SAY(faccessat(AT_FDCWD, path, W_OK, AT_EACCESS), "eaccess w '%s'", path);
	SAY(readlink(path, text, sizeof text), "readlink '%s'", path);
	SAY(statfs(path, &fs), "statfs '%s'", path);
	SAY(truncate(path, 2), "truncate '%s'", path);
	SAY(truncate(path, -1), "truncate to -1 '%s'", path);
	SAY(chmod(path, 0755), "chmod '%s'", path);
	SAY(lchown(path, 0, 0), "lchown '%s'", path);
	SAY(utimensat(AT_FDCWD, path, times, 0), "utimens '%s'", path);
	SAY(utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW), "lutimens '%s'", path);
	SAY(setxattr(path, "user.a", "1", 1, 0), "setxattr '%s'", path);
	SAY(lsetxattr(path, "user.a", "1", 1, 0), "lsetxattr '%s'", path);
	SAY(lsetxattr(path, "trusted.a", "1", 1, 0), "lsetxattr trusted '%s'", path);
	SAY(lgetxattr(path, "user.a", text, sizeof text), "lgetxattr '%s'", path);
	SAY(lgetxattr(path, "trusted.a", text, sizeof text), "lgetxattr trusted '%s'", path);
	SAY(lremovexattr(path, "user.a"), "lremovexattr '%s'", path);
	SAY(lremovexattr(path, "trusted.a"), "lremovexattr trusted '%s'", path);
	SAY(mkdir(path, 0755), "mkdir '%s'", path);
	SAY(mkfifo(path, 0755), "mkfifo '%s'", path);
	SAY(symlink("x", path), "symlink '%s'", path);
	SAY(link("file", path), "link to '%s'", path);
	SAY(link(path, "new"), "link from '%s'", path);
	unlink("new");
	SAY(linkat(AT_FDCWD, path, AT_FDCWD, "new", AT_SYMLINK_FOLLOW), "follow link from '%s'", path);
	unlink("new");
	SAY(rename(path, "new"), "rename from '%s'", path);
	rename("new", path);
	SAY(rename("file", path), "rename to '%s'", path);
	SAY(chdir(path), "chdir '%s'", path);
	SAY(rmdir(path), "rmdir '%s'", path);
	SAY(unlink(path), "unlink '%s'", path);
}

static char path_in_child[64];

static void operations_in_child(void)
{
	operations_on(path_in_child);
}

static void answers_of_paths(void)
{
	static const char *const endings[] = { "", "/", "/.", "/..", "/inner", "/inner/x" };
	for (size_t i = 0; i < COUNT(kinds); i++)
		for (size_t j = 0; j < COUNT(endings); j++) {
			make_kinds();
			snprintf(path_in_child, sizeof path_in_child, "%s%s", kinds[i], endings[j]);
			in_child(operations_in_child);
			remove_kinds();
		}
	static const char *const odd[] = { "", ".", "..", "./.", "x" };
	for (size_t i = 0; i < COUNT(odd); i++) {
		close(create_file("file", "text"));
		if (strcmp(odd[i], "..")) {
			strcpy(path_in_child, odd[i]);
			in_child(operations_in_child);
		}
	}
}

static void answers_of_ioctl(void)
{
	static const struct {
		const char *name;
		unsigned long command;
	} commands[] = { { "GETFLAGS", FS_IOC_GETFLAGS }, { "GETVERSION", FS_IOC_GETVERSION }, { "FSGETXATTR", FS_IOC_FSGETXATTR },
		{ "FIGETBSZ", FIGETBSZ },
		{ "TCGETS", 0x5401 }, { "BLKGETSIZE", BLKGETSIZE64 },
		{ "FICLONE", FICLONE }, { "FICLONERANGE", FICLONERANGE }, { "FIDEDUPERANGE", FIDEDUPERANGE }, { "FIONREAD", FIONREAD },
		{ "unknown", 0xdeadbeef } };
	char data[4096];
	make_kinds();
	for (size_t i = 0; i < COUNT(commands); i++)
		for (size_t j = 0; j < COUNT(kinds); j++) {
			int fd = open(kinds[j], O_RDONLY | O_NONBLOCK);
			if (fd < 0)
				continue;
			memset(data, 0, sizeof data);
			SAY_WHETHER(ioctl(fd, commands[i].command, data), "ioctl %s %s", kinds[j], commands[i].name);
			close(fd);
		}
}

static void answers_of_fallocate(void)
{
	/* those that a FUSE driver passes on: none collapses or inserts */
	static const int modes[] = { 0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_ZERO_RANGE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_PUNCH_HOLE, 1 << 20 };
	static const off_t ranges[][2] = { { 0, 0 }, { 0, 4096 }, { -1, 4096 }, { 0, -1 }, { 4096, 4096 }, { 4096, 100 }, { 100, 4096 },
		{ 1 << 20, 4096 }, { 16384 - 100, 4096 }, { INT64_MAX, 1 }, { INT64_MAX - 4096, 4096 }, { 1, INT64_MAX } };
	char *data = calloc(1, 65536);
	unsigned char seen[65536];
	make_kinds();
	memset(data, 'd', 16384);
	for (size_t i = 0; i < COUNT(modes); i++)
		for (size_t j = 0; j < COUNT(ranges); j++) {
			int fd = create_file("file", "");
			write_all(fd, data, 16384, 0);
			SAY(fallocate(fd, modes[i], ranges[j][0], ranges[j][1]), "fallocate %x %lld %lld", modes[i],
			    (long long)ranges[j][0], (long long)ranges[j][1]);
			uint64_t sum = 0;
			ssize_t n = OK(pread(fd, seen, sizeof seen, 0));
			for (ssize_t at = 0; at < n; at++)
				sum = sum * 31 + seen[at];
			printf("  %lld bytes, sum %llx\n", (long long)stat_of("file").st_size, (unsigned long long)sum);
			close(fd);
		}
	static const struct {
		const char *path;
		int flags;
	} files[] = { { "file", O_RDONLY }, { "file", O_WRONLY | O_APPEND }, { "empty", O_RDONLY }, { "fifo", O_RDWR }, { "device", O_RDWR },
		{ "file", O_PATH } };
	for (size_t i = 0; i < COUNT(modes); i++)
		for (size_t j = 0; j < COUNT(files); j++) {
			int fd = OK(open(files[j].path, files[j].flags | O_NONBLOCK));
			SAY(fallocate(fd, modes[i], 0, 4096), "fallocate %s %o %x", files[j].path, files[j].flags, modes[i]);
			close(fd);
		}
}

static void answers_of_copy_file_range(void)
{
	static const struct {
		const char *path;
		int flags;
	} files[] = { { "file", O_RDWR }, { "file", O_RDONLY }, { "file", O_WRONLY }, { "file", O_RDWR | O_APPEND }, { "second", O_RDWR },
		{ "empty", O_RDONLY }, { "fifo", O_RDWR }, { "device", O_RDWR }, { "/proc/self/stat", O_RDONLY }, { "file", O_PATH } };
	static const off_t ranges[][3] = { { 0, 8192, 4096 }, { 0, 100, 4096 }, { 4096, 0, 4096 }, { 4096, 0, 1 << 20 }, { -1, 0, 1 },
		{ 0, -1, 1 }, { 0, INT64_MAX, 1 }, { INT64_MAX, 0, 10 }, { 0, 0, 0 }, { 1 << 20, 0, 10 }, { 0, 1 << 20, -1 } };
	char data[16384];
	make_kinds();
	memset(data, 'd', sizeof data);
	for (size_t i = 0; i < COUNT(files); i++)
		for (size_t j = 0; j < COUNT(files); j++)
			for (size_t k = 0; k < COUNT(ranges); k++) {
				close(create_file("second", "second"));
				write_all(OK(open("file", O_RDWR | O_TRUNC)), data, sizeof data, 0);
				int from = OK(open(files[i].path, files[i].flags | O_NONBLOCK)),
				    to = OK(open(files[j].path, files[j].flags | O_NONBLOCK));
				off_t in = ranges[k][0], out = ranges[k][1];
				SAY(copy_file_range(from, &in, to, &out, ranges[k][2], 0), "copy %s %o to %s %o, %lld %lld %lld",
				    files[i].path, files[i].flags, files[j].path, files[j].flags, (long long)ranges[k][0],
				    (long long)ranges[k][1], (long long)ranges[k][2]);
				printf("  %lld %lld\n", (long long)stat_of("file").st_size, (long long)stat_of("second").st_size);
				for (int fd = 3; fd < 32; fd++)
					close(fd);
			}
	SAY(copy_file_range(OK(open("file", O_RDONLY)), NULL, OK(open("second", O_WRONLY)), NULL, 1, 1), "copy with a flag");
}

static void answers_of_sizes(void)
{
	char byte;
	signal(SIGXFSZ, SIG_IGN);
	for (int bits = 30; bits < 64; bits++)
		for (int less = -1; less <= 1; less++) {
			int fd = create_file("f", "");
			off_t size = (off_t)((1ULL << bits) - 1 + less);
			if (size < 0)
				continue;
			SAY(ftruncate(fd, size), "truncate to 2^%d%+d", bits, less - 1);
			SAY(pwrite(fd, "x", 1, size), "write at it");
			SAY(pwrite(fd, "xx", 2, size - 1), "write across it");
			SAY(pread(fd, &byte, 1, size), "read at it");
			SAY(pread(fd, &byte, 1, size - 1), "read before it");
			SAY(lseek(fd, 0, SEEK_END), "seek to the end");
			SAY(lseek(fd, 1, SEEK_CUR), "seek behind the end");
			printf("  %lld\n", (long long)stat_of("f").st_size);
			close(fd);
		}
}

static void answers_of_times(void)
{
	static const int64_t seconds[] = { INT64_MIN, -(1LL << 40), -(1LL << 31) - 1, -(1LL << 31), -1, 0, 1, (1LL << 31) - 1, 1LL << 31, 1LL << 32,
		(1LL << 32) + 1, 1LL << 33, (1LL << 34) - 1, 1LL << 34, 15032385535, 15032385536, 1LL << 36, 1LL << 40, INT64_MAX };
	static const long nanoseconds[] = { 0, 1, 999999999, 1000000000, -1 };
	int fd = create_file("f", "");
	for (size_t i = 0; i < COUNT(seconds); i++)
		for (size_t j = 0; j < COUNT(nanoseconds); j++) {
			struct timespec times[2] = { { seconds[i], nanoseconds[j] }, { seconds[i], nanoseconds[j] } };
			SAY(futimens(fd, times), "times %lld %ld", (long long)seconds[i], nanoseconds[j]);
			struct stat st = stat_of("f");
			printf("  %lld.%09ld %lld.%09ld\n", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec, (long long)st.st_mtim.tv_sec,
			       st.st_mtim.tv_nsec);
		}
}

static void answers_of_mmap(void)
{
	static const int access[] = { O_RDONLY, O_WRONLY, O_RDWR }, protection[] = { PROT_NONE, PROT_READ, PROT_WRITE, PROT_READ | PROT_WRITE,
		PROT_READ | PROT_EXEC };
	static const int flags[] = { MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_SHARED | MAP_POPULATE, MAP_PRIVATE | MAP_LOCKED,
		MAP_SHARED_VALIDATE | MAP_SYNC };
	char data[2 * PAGE] = "text";
	make_kinds();
	write_all(OK(open("file", O_WRONLY)), data, sizeof data, 0);
	for (size_t k = 0; k < 3; k++)
		for (size_t i = 0; i < COUNT(access); i++) {
			int fd = open(k == 0 ? "file" : k == 1 ? "empty" : "fifo", access[i] | O_NONBLOCK);
			if (fd < 0)
				continue;
			for (size_t j = 0; j < COUNT(protection); j++)
				for (size_t l = 0; l < COUNT(flags); l++) {
					char *map = mmap(0, PAGE, protection[j], flags[l], fd, PAGE);
					SAY_WHETHER(map == MAP_FAILED ? -1 : 0, "mmap %zu %o %x %x", k, access[i], protection[j], flags[l]);
					if (map == MAP_FAILED)
						continue;
					SAY(msync(map, PAGE, MS_SYNC), "  msync");
					SAY(mprotect(map, PAGE, PROT_READ | PROT_WRITE), "  mprotect");
					SAY(madvise(map, PAGE, MADV_DONTNEED), "  MADV_DONTNEED");
					SAY(madvise(map, PAGE, MADV_REMOVE), "  MADV_REMOVE");
					SAY_WHETHER(mremap(map, PAGE, 2 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED ? -1 : 0, "  mremap");
				}
		}
	SAY_WHETHER(mmap(0, PAGE, PROT_READ, MAP_SHARED, OK(open("file", O_RDONLY)), 100) == MAP_FAILED ? -1 : 0, "mmap unaligned");
	SAY_WHETHER(mmap(0, 0, PROT_READ, MAP_SHARED, OK(open("file", O_RDONLY)), 0) == MAP_FAILED ? -1 : 0, "mmap nothing");
}

static void answers_of_lseek(void)
{
	static const off_t at[] = { INT64_MIN, -1, 0, 1, 4095, 4096, 65535, 65536, 69632, 131072, 200000, 262143, 262144, 262145, 1LL << 40 };
	char page[PAGE];
	memset(page, 'p', PAGE);
	int fd = create_file("f", "");
	OK(ftruncate(fd, 262144));
	write_all(fd, page, PAGE, 65536);
	write_all(fd, page, PAGE, 131072);
	OK(fsync(fd));
	for (int whence = SEEK_SET; whence <= SEEK_HOLE + 1; whence++)
		for (size_t i = 0; i < COUNT(at); i++) {
			OK(lseek(fd, 10, SEEK_SET));
			SAY(lseek(fd, at[i], whence), "lseek %d %lld", whence, (long long)at[i]);
		}
}

const struct check answer_checks[] = {
	{ "answers of open", answers_of_open },
	{ "answers of rename", answers_of_rename },
	{ "answers of operations on paths", answers_of_paths },
	{ "answers of ioctl", answers_of_ioctl },
	{ "answers of fallocate", answers_of_fallocate },
	{ "answers of copy_file_range", answers_of_copy_file_range },
	{ "answers of sizes and positions", answers_of_sizes },
	{ "answers of times", answers_of_times },
	{ "answers of mmap", answers_of_mmap },
	{ "answers of lseek", answers_of_lseek },
	{ 0 },
};
