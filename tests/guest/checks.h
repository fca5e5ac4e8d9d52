/*
 * The frame of the guest's system-call checks. Each check is a function that runs in a fresh child process whose current
 * directory is a fresh directory of the file system under test. It returns when all is well and otherwise ends through
 * fail() or skip(), so no check can leave another one's state behind.
 */
#ifndef FERRY_CHECKS_H
#define FERRY_CHECKS_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

struct check {
	const char *name;
	void (*run)(void);
};

extern const struct check name_checks[], data_checks[], attr_checks[], lock_checks[], dir_checks[], space_checks[];
extern const struct check privilege_checks[], generic_checks[], answer_checks[];

/* One side of the two-client script: a side and a directory. */
int pair(char **arguments, int count);
int handles(const char *root);

/* Work while the service is killed: a directory, a seed, and how many files to look up and to keep open. */
void endure(char **arguments, int count);

/* The user and group of checks that act without privilege, and a group that this user also belongs to. */
enum { USER = 1234, GROUP = 4321, SECOND_GROUP = 4322 };

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The kernel or the file system does not offer the feature at all; the reason is printed. */
_Noreturn void skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* True when the running kernel is at least MAJOR.MINOR. */
bool kernel_at_least(int major, int minor);

/* Run BODY in a child, which must return or end by fail(); its verdict is passed on. */
void in_child(void (*body)(void));
pid_t start_child(void (*body)(void));
void join_child(pid_t pid);
/* As in_child, as USER:GROUP with SECOND_GROUP as its only supplementary group. */
void as_user(void (*body)(void));

int create_file(const char *path, const char *text);
void write_all(int fd, const void *data, size_t len, off_t offset);
void expect_content(const char *path, const void *data, size_t len);
/* Deterministic bytes: the value at each offset depends on the offset and the seed. */
void fill(unsigned char *buffer, size_t len, uint64_t offset, unsigned seed);
mode_t mode_of(const char *path);
struct stat stat_of(const char *path);
/* Wait until PID sleeps in the kernel, or give up quietly after a while: only ever a help, never a proof. */
void wait_until_asleep(pid_t pid);

#define REQUIRE(condition, ...)                                                                                                \
	do {                                                                                                                   \
		if (!(condition))                                                                                              \
			fail(__VA_ARGS__);                                                                                     \
	} while (0)

/* The value of a call that must succeed. */
#define OK(call)                                                                                                               \
	({                                                                                                                     \
		errno = 0;                                                                                                     \
		long result_ = (long)(call);                                                                                   \
		if (result_ == -1)                                                                                             \
			fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, strerror(errno));                                     \
		result_;                                                                                                       \
	})

/* A call that must fail with exactly this error. */
#define FAILS(error, call)                                                                                                     \
	do {                                                                                                                   \
		errno = 0;                                                                                                     \
		if ((long)(call) != -1)                                                                                        \
			fail("%s:%d: %s succeeded, expected %s", __FILE__, __LINE__, #call, #error);                           \
		if (errno != (error))                                                                                          \
			fail("%s:%d: %s gave %s, expected %s", __FILE__, __LINE__, #call, strerror(errno), #error);            \
	} while (0)

#define EQUAL(left, right)                                                                                                     \
	do {                                                                                                                   \
		long long left_ = (long long)(left), right_ = (long long)(right);                                              \
		if (left_ != right_)                                                                                           \
			fail("%s:%d: %s is %lld, expected %lld (%s)", __FILE__, __LINE__, #left, left_, right_, #right);       \
	} while (0)

#endif
