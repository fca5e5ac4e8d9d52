/* Checks of locks between processes and between open files. */
#include "checks.h"

#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static struct flock range(short type, off_t start, off_t len)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len };
}

static int lock(int fd, int command, short type, off_t start, off_t len)
{
	struct flock lock = range(type, start, len);
	return fcntl(fd, command, &lock);
}

static void pause_briefly(void)
{
	nanosleep(&(struct timespec){ 0, 10000000 }, 0);
}

/*
 * A lock that becomes free with the last close of a file: FUSE tells the server of it without waiting for the answer, so
 * the lock may be refused for a moment. Trying again, unlike a blocking lock, cannot hang a driver that forwards no signals.
 */
#define RETRY(call)                                                                                                            \
	do {                                                                                                                   \
		int tries_ = 0;                                                                                                \
		while ((call) == -1) {                                                                                         \
			REQUIRE(errno == EAGAIN && tries_++ < 300, "%s:%d: %s: %s", __FILE__, __LINE__, #call, strerror(errno)); \
			pause_briefly();                                                                                       \
		}                                                                                                              \
	} while (0)

/* Shared between parent and child, set up before the fork. */
static struct shared {
	pid_t parent;
	int pipe[2];
	volatile int *step;
} shared;

static void share(void)
{
	shared.parent = getpid();
	OK(pipe(shared.pipe));
	shared.step = (volatile int *)OK(mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

static void see_foreign_locks(void)
{
	int fd = OK(open("f", O_RDWR));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 0, 0));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_RDLCK, 149, 1));
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 100));
	OK(lock(fd, F_SETLK, F_WRLCK, 150, 10));
	OK(lock(fd, F_SETLK, F_RDLCK, 1000, 10));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 1000, 1));
	struct flock found = range(F_WRLCK, 90, 500);
	OK(fcntl(fd, F_GETLK, &found));
	EQUAL(found.l_type, F_WRLCK);
	EQUAL(found.l_pid, shared.parent);
	EQUAL(found.l_start, 100);
	EQUAL(found.l_len, 50);
	found = range(F_WRLCK, 2000, 0);
	OK(fcntl(fd, F_GETLK, &found));
	EQUAL(found.l_type, F_UNLCK);
}

static void posix_locks_conflict(void)
{
	share();
	int fd = create_file("f", "");
	OK(lock(fd, F_SETLK, F_WRLCK, 100, 50));
	OK(lock(fd, F_SETLK, F_RDLCK, 1000, 100));
	in_child(see_foreign_locks);
	/* our own locks never conflict with ourselves, and the child's have gone with it */
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	FAILS(EBADF, lock(OK(open("f", O_RDONLY)), F_SETLK, F_WRLCK, 0, 0));
}

static void see_the_split(void)
{
	int fd = OK(open("f", O_RDWR));
	struct flock found = range(F_WRLCK, 0, 0);
	OK(fcntl(fd, F_GETLK, &found));
	EQUAL(found.l_start, 0);
	EQUAL(found.l_len, 40);
	OK(lock(fd, F_SETLK, F_WRLCK, 40, 20));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 40, 21));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 39, 1));
}

static void see_no_lock(void)
{
	OK(lock(OK(open("f", O_RDWR)), F_SETLK, F_WRLCK, 0, 0));
}

static void posix_locks_split_and_end(void)
{
	int fd = create_file("f", "");
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 100));
	OK(lock(fd, F_SETLK, F_UNLCK, 40, 20));
	in_child(see_the_split);
	/* POSIX: closing any descriptor of the file drops the process's locks on it */
	close(OK(open("f", O_RDONLY)));
	in_child(see_no_lock);
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 100));
	OK(unlink("f"));
	close(create_file("f", ""));
	in_child(see_no_lock);
}

static void open_file_locks(void)
{
	int one = create_file("f", ""), two = OK(open("f", O_RDWR));
	struct flock wanted = range(F_WRLCK, 10, 10);
	OK(fcntl(one, F_OFD_SETLK, &wanted));
	wanted = range(F_WRLCK, 0, 0);
	FAILS(EAGAIN, fcntl(two, F_OFD_SETLK, &wanted));
	OK(fcntl(two, F_OFD_GETLK, &wanted));
	EQUAL(wanted.l_type, F_WRLCK);
	EQUAL(wanted.l_start, 10);
	EQUAL(wanted.l_len, 10);
	EQUAL(wanted.l_pid, -1);
	/* a duplicate is the same open file; closing one of the two keeps the lock */
	int copy = OK(dup(one));
	close(one);
	wanted = range(F_RDLCK, 10, 1);
	FAILS(EAGAIN, fcntl(two, F_OFD_SETLK, &wanted));
	close(copy);
	RETRY(fcntl(two, F_OFD_SETLK, &wanted));
}

static void whole_file_locks(void)
{
	int one = create_file("f", ""), two = OK(open("f", O_RDONLY)), three = OK(open("f", O_RDONLY));
	OK(flock(one, LOCK_SH));
	OK(flock(two, LOCK_SH | LOCK_NB));
	FAILS(EWOULDBLOCK, flock(three, LOCK_EX | LOCK_NB));
	OK(flock(one, LOCK_UN));
	OK(flock(two, LOCK_EX | LOCK_NB));
	FAILS(EWOULDBLOCK, flock(three, LOCK_SH | LOCK_NB));
	close(two);
	RETRY(flock(three, LOCK_EX | LOCK_NB));
}

static void wait_for_record_lock(void)
{
	int fd = OK(open("f", O_RDWR));
	EQUAL(write(shared.pipe[1], "w", 1), 1);
	OK(lock(fd, F_SETLKW, F_WRLCK, 0, 0));
	REQUIRE(*shared.step == 1, "F_SETLKW returned before the other process had released its lock");
}

static void wait_for_whole_file_lock(void)
{
	int fd = OK(open("f", O_RDWR));
	EQUAL(write(shared.pipe[1], "w", 1), 1);
	OK(flock(fd, LOCK_EX));
	REQUIRE(*shared.step == 1, "flock returned before the other process had released its lock");
}

static void release_while_waited_for(void (*waiter)(void), int fd, int record)
{
	char byte;
	pid_t pid = start_child(waiter);
	EQUAL(read(shared.pipe[0], &byte, 1), 1);
	wait_until_asleep(pid);
	*shared.step = 1;
	if (record)
		OK(lock(fd, F_SETLK, F_UNLCK, 0, 0));
	else
		OK(flock(fd, LOCK_UN));
	join_child(pid);
}

static void blocking_record_lock(void)
{
	share();
	int fd = create_file("f", "");
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	release_while_waited_for(wait_for_record_lock, fd, 1);
}

static void blocking_whole_file_lock(void)
{
	share();
	int fd = create_file("f", "");
	OK(flock(fd, LOCK_EX));
	release_while_waited_for(wait_for_whole_file_lock, fd, 0);
}

static void on_alarm(int signal)
{
	(void)signal;
}

enum { INTERRUPTED = 3, GRANTED = 4 };

static void wait_and_be_interrupted(void)
{
	struct sigaction action = { .sa_handler = on_alarm };
	/* an interval, so that a signal which comes before the wait has begun is followed by another */
	struct itimerval interval = { { 0, 50000 }, { 0, 50000 } };
	int fd = OK(open("f", O_RDWR));
	OK(sigaction(SIGALRM, &action, 0));
	OK(setitimer(ITIMER_REAL, &interval, 0));
	int result = lock(fd, F_SETLKW, F_WRLCK, 0, 0), error = errno;
	OK(setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, 0));
	if (result == 0)
		_exit(GRANTED);
	REQUIRE(error == EINTR, "the interrupted wait ended with %s", strerror(error));
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 0, 0));
	_exit(INTERRUPTED);
}

static void interrupted_lock(void)
{
	int fd = create_file("f", ""), status = 0, tries = 0;
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	pid_t pid = start_child(wait_and_be_interrupted);
	while (OK(waitpid(pid, &status, WNOHANG)) == 0 && tries++ < 300)
		pause_briefly();
	OK(lock(fd, F_SETLK, F_UNLCK, 0, 0));
	if (tries >= 300) {
		/* no signal got through to the wait; then it must at least end with the lock */
		OK(waitpid(pid, &status, 0));
		REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == GRANTED, "the wait ended neither by the signal nor with the lock");
		skip("this driver forwards no signals to a lock that waits");
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status) != INTERRUPTED)
		_exit(1); /* the child has said why */
	/* the wait that was given up must not have become a lock */
	in_child(see_no_lock);
}

static void hold_until_killed(void)
{
	int fd = OK(open("f", O_RDWR));
	OK(lock(fd, F_SETLK, F_WRLCK, 0, 0));
	EQUAL(write(shared.pipe[1], "h", 1), 1);
	for (;;)
		pause();
}

static void killed_holder(void)
{
	char byte;
	share();
	int fd = create_file("f", "");
	pid_t pid = start_child(hold_until_killed);
	EQUAL(read(shared.pipe[0], &byte, 1), 1);
	FAILS(EAGAIN, lock(fd, F_SETLK, F_WRLCK, 0, 0));
	OK(kill(pid, SIGKILL));
	OK(waitpid(pid, 0, 0));
	OK(lock(fd, F_SETLKW, F_WRLCK, 0, 0));
}

static void wait_in_a_circle(void)
{
	char byte;
	int one = OK(open("one", O_RDWR)), two = OK(open("two", O_RDWR));
	OK(lock(two, F_SETLK, F_WRLCK, 0, 0));
	EQUAL(write(shared.pipe[1], "h", 1), 1);
	EQUAL(read(shared.pipe[0], &byte, 1), 1);
	OK(lock(one, F_SETLKW, F_WRLCK, 0, 0));
}

/* Whichever request comes second is the one that would close the circle. */
static void deadlock(void)
{
	char byte;
	share();
	int one = create_file("one", ""), two = create_file("two", ""), status;
	OK(lock(one, F_SETLK, F_WRLCK, 0, 0));
	int back[2];
	OK(pipe(back));
	int there[2] = { shared.pipe[0], shared.pipe[1] };
	shared.pipe[0] = back[0];
	pid_t pid = start_child(wait_in_a_circle);
	EQUAL(read(there[0], &byte, 1), 1);
	EQUAL(write(back[1], "g", 1), 1);
	int result = lock(two, F_SETLKW, F_WRLCK, 0, 0), error = errno;
	OK(lock(one, F_SETLK, F_UNLCK, 0, 0));
	OK(waitpid(pid, &status, 0));
	if (result == -1) {
		REQUIRE(error == EDEADLK, "the wait that would never end gives %s", strerror(error));
		REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other side of the deadlock failed too");
	} else {
		REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 1, "neither side of a deadlock was told");
	}
}

static pid_t holders[3];

static void hold_one_part(void)
{
	int fd = OK(open("f", O_RDWR));
	OK(lock(fd, F_SETLK, F_WRLCK, *shared.step * 10, 10));
	EQUAL(write(shared.pipe[1], "h", 1), 1);
	for (;;)
		pause();
}

static void name_the_holder(void)
{
	char byte;
	share();
	int fd = create_file("f", "");
	for (int i = 0; i < 3; i++) {
		*shared.step = i;
		holders[i] = start_child(hold_one_part);
		EQUAL(read(shared.pipe[0], &byte, 1), 1);
	}
	for (int i = 0; i < 3; i++) {
		struct flock found = range(F_RDLCK, i * 10 + 5, 1);
		OK(fcntl(fd, F_GETLK, &found));
		EQUAL(found.l_type, F_WRLCK);
		EQUAL(found.l_start, i * 10);
		EQUAL(found.l_len, 10);
		EQUAL(found.l_pid, holders[i]);
	}
	for (int i = 0; i < 3; i++)
		OK(kill(holders[i], SIGKILL));
}

const struct check lock_checks[] = {
	{ "record locks between processes", posix_locks_conflict },
	{ "record locks split and end with close", posix_locks_split_and_end },
	{ "open file description locks", open_file_locks },
	{ "flock shared and exclusive", whole_file_locks },
	{ "blocking record lock", blocking_record_lock },
	{ "blocking flock", blocking_whole_file_lock },
	{ "record lock interrupted by a signal", interrupted_lock },
	{ "locks of a killed process end", killed_holder },
	{ "deadlock is told", deadlock },
	{ "the holder of a lock among several", name_the_holder },
	{ 0 },
};
