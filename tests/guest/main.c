/*
 * The driver of the checks:
 *   checks list               print every check's name, one a line
 *   checks run NAME DIR       run one; exit 0 passed, 1 failed, 77 skipped, with the reason on standard output
 *   checks pair 0|1 DIR [local]   one side of the two-client script
 *   checks handles DIR        take file handles and open them for each line of standard input
 *   checks endure DIR SEED [FILES OPENED]   work until a file `stop` is in DIR
 *   checks hello              print a word: this program, copied to the file system under test, proves that it executes
 *   checks wait               end at the end of standard input: a copy of this program that runs for as long as a check wants
 */
#include "checks.h"

#include <ftw.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/utsname.h>

enum { SKIPPED = 77, SECONDS_PER_CHECK = 600 };

static const struct check *const groups[] = { name_checks, data_checks, space_checks, attr_checks, lock_checks, dir_checks,
	privilege_checks, generic_checks, answer_checks };

static void say(const char *format, va_list args)
{
	vprintf(format, args);
	putchar('\n');
	fflush(stdout);
}

void fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	say(format, args);
	_exit(1);
}

void skip(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	say(format, args);
	_exit(SKIPPED);
}

bool kernel_at_least(int major, int minor)
{
	struct utsname name;
	int have_major = 0, have_minor = 0;
	uname(&name);
	sscanf(name.release, "%d.%d", &have_major, &have_minor);
	return have_major > major || (have_major == major && have_minor >= minor);
}

pid_t start_child(void (*body)(void))
{
	pid_t pid = OK(fork());
	if (pid == 0) {
		body();
		_exit(0);
	}
	return pid;
}

void join_child(pid_t pid)
{
	int status;
	OK(waitpid(pid, &status, 0));
	if (WIFSIGNALED(status))
		fail("a child process was ended by signal %d", WTERMSIG(status));
	if (WEXITSTATUS(status) != 0)
		_exit(WEXITSTATUS(status)); /* the child has printed why */
}

void in_child(void (*body)(void))
{
	join_child(start_child(body));
}

void as_user(void (*body)(void))
{
	pid_t pid = OK(fork());
	if (pid == 0) {
		gid_t second = SECOND_GROUP;
		OK(setgroups(1, &second));
		OK(setresgid(GROUP, GROUP, GROUP));
		OK(setresuid(USER, USER, USER));
		body();
		_exit(0);
	}
	join_child(pid);
}

int create_file(const char *path, const char *text)
{
	int fd = OK(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	write_all(fd, text, strlen(text), 0);
	return fd;
}

void write_all(int fd, const void *data, size_t len, off_t offset)
{
	size_t done = 0;
	while (done < len)
		done += OK(pwrite(fd, (const char *)data + done, len - done, offset + done));
}

void expect_content(const char *path, const void *data, size_t len)
{
	int fd = OK(open(path, O_RDONLY | O_CLOEXEC));
	char *seen = malloc(len + 1);
	size_t done = 0;
	ssize_t n;
	while (done <= len && (n = OK(pread(fd, seen + done, len + 1 - done, done))) > 0)
		done += n;
	REQUIRE(done == len, "%s: has %zu bytes or more, expected %zu", path, done, len);
	for (size_t i = 0; i < len; i++)
		REQUIRE(seen[i] == ((const char *)data)[i], "%s: wrong byte at offset %zu", path, i);
	free(seen);
	close(fd);
}

void fill(unsigned char *buffer, size_t len, uint64_t offset, unsigned seed)
{
	for (size_t i = 0; i < len; i++) {
		uint64_t x = (offset + i) * 0x9e3779b97f4a7c15u + seed;
		buffer[i] = (x >> 29) ^ (x >> 47);
	}
}

struct stat stat_of(const char *path)
{
	struct stat st;
	OK(lstat(path, &st));
	return st;
}

mode_t mode_of(const char *path)
{
	return stat_of(path).st_mode & 07777;
}

void wait_until_asleep(pid_t pid)
{
	char path[64], line[512];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	for (int tries = 0; tries < 2000; tries++) {
		int fd = open(path, O_RDONLY);
		if (fd < 0)
			return;
		ssize_t n = read(fd, line, sizeof line - 1);
		close(fd);
		if (n <= 0)
			return;
		line[n] = 0;
		char *state = strrchr(line, ')');
		if (state && (state[2] == 'S' || state[2] == 'D'))
			return;
		sched_yield();
	}
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type, (void)ftw;
	return remove(path);
}

static int run(const struct check *check, const char *dir)
{
	char work[4096];
	int status;
	snprintf(work, sizeof work, "%s/check-%s", dir, check->name);
	for (char *c = work + strlen(dir) + 1; *c; c++)
		if (*c == ' ')
			*c = '-';
	nftw(work, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
	OK(mkdir(work, 0755));
	pid_t pid = OK(fork());
	if (pid == 0) {
		OK(setpgid(0, 0));
		OK(chdir(work));
		umask(022);
		alarm(SECONDS_PER_CHECK);
		check->run();
		_exit(0);
	}
	OK(waitpid(pid, &status, 0));
	kill(-pid, SIGKILL); /* whatever the check has left running */
	nftw(work, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
	if (WIFSIGNALED(status)) {
		printf("ended by signal %d%s\n", WTERMSIG(status), WTERMSIG(status) == SIGALRM ? ": took too long" : "");
		return 1;
	}
	return WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "hello"))
		return puts("hello from the mount") < 0;
	if (argc >= 4 && !strcmp(argv[1], "pair"))
		return pair(argv + 2, argc - 2);
	if (argc == 3 && !strcmp(argv[1], "handles"))
		return handles(argv[2]);
	if ((argc == 4 || argc == 6) && !strcmp(argv[1], "endure"))
		return endure(argv + 2, argc - 2), 0;
	if (argc == 2 && !strcmp(argv[1], "wait"))
		return getchar() != EOF;
	setvbuf(stdout, NULL, _IOLBF, 0); /* children say things too */
	bool list = argc == 2 && !strcmp(argv[1], "list");
	if (!list && !(argc == 4 && !strcmp(argv[1], "run"))) {
		fprintf(stderr, "usage: checks list | checks run NAME DIR | checks pair 0|1 DIR [local] | checks hello\n");
		return 2;
	}
	for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
		for (const struct check *check = groups[g]; check->name; check++) {
			if (list)
				puts(check->name);
			else if (!strcmp(check->name, argv[2]))
				return run(check, argv[3]);
		}
	if (list)
		return 0;
	printf("no check is called '%s'\n", argv[2]);
	return 2;
}
