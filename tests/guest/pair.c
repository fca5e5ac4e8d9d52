/*
 * The two-client script: `checks pair SIDE DIR` runs on two clients of one directory at once, one with SIDE 0 and one with 1.
 * They take turns: what one has done, the other must see. SIDE may be followed by `local`, for a client that is a process of
 * the machine which serves the directory: nothing tells the server what it waits for, so no deadlock can be found.
 */
#include "checks.h"

#include <dirent.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <time.h>

enum { SECONDS_PER_STEP = 300, RECORD = 32, RECORDS = 200, NAMES = 100, ENTRIES = 50 };

static int side;
static bool local;
static int step;

static void wait_for(const char *name)
{
	for (time_t end = time(0) + SECONDS_PER_STEP; access(name, F_OK); sched_yield())
		REQUIRE(time(0) < end, "side %d: the other side has not reached %s", side, name);
}

static void mark(int who)
{
	char name[32];
	snprintf(name, sizeof name, "step-%d-%d", step, who);
	if (who == side)
		close(OK(open(name, O_CREAT | O_EXCL | O_WRONLY, 0644)));
	else
		wait_for(name);
}

/* The turn passes from side WHO to the other. */
static void turn(int who)
{
	step++;
	mark(who);
}

/* Both sides are here. */
static void meet(void)
{
	step++;
	mark(side);
	mark(!side);
}

static void create_see_append(void)
{
	char seen[8];
	if (side == 0) {
		int fd = create_file("f", "one");
		turn(0);
		turn(1);
		struct stat st;
		OK(fstat(fd, &st));
		EQUAL(st.st_size, 6);
		EQUAL(pread(fd, seen, 8, 0), 6);
		expect_content("f", "onetwo", 6);
		OK(ftruncate(fd, 2));
		turn(0);
	} else {
		turn(0);
		EQUAL(stat_of("f").st_size, 3);
		expect_content("f", "one", 3);
		int fd = OK(open("f", O_RDWR | O_APPEND));
		EQUAL(write(fd, "two", 3), 3);
		turn(1);
		turn(0);
		struct stat st;
		OK(fstat(fd, &st));
		EQUAL(st.st_size, 2);
		EQUAL(pread(fd, seen, 8, 0), 2);
	}
}

static void append_at_once(void)
{
	char record[RECORD];
	int counts[2] = { 0 };
	int fd = OK(open("log", O_CREAT | O_RDWR | O_APPEND, 0644));
	meet();
	memset(record, 'a' + side, RECORD);
	for (int i = 0; i < RECORDS; i++)
		EQUAL(write(fd, record, RECORD), RECORD);
	meet();
	EQUAL(stat_of("log").st_size, 2 * RECORDS * RECORD);
	for (int i = 0; i < 2 * RECORDS; i++) {
		EQUAL(pread(fd, record, RECORD, (off_t)i * RECORD), RECORD);
		for (int j = 1; j < RECORD; j++)
			REQUIRE(record[j] == record[0], "record %d is torn", i);
		REQUIRE(record[0] == 'a' || record[0] == 'b', "record %d is lost", i);
		counts[record[0] - 'a']++;
	}
	EQUAL(counts[0], RECORDS);
	EQUAL(counts[1], RECORDS);
}

static void rename_and_replace(void)
{
	char seen[8];
	if (side == 0) {
		close(create_file("old", "content"));
		turn(0);
		turn(1);
		OK(rename("old", "renamed"));
		turn(0);
		turn(1);
		expect_content("renamed", "new", 3);
		int fd = OK(open("renamed", O_RDONLY));
		turn(0);
		turn(1);
		struct stat st;
		OK(fstat(fd, &st));
		EQUAL(st.st_nlink, 0);
		EQUAL(pread(fd, seen, 8, 0), 3);
		FAILS(ENOENT, open("renamed", O_RDONLY));
	} else {
		turn(0);
		int fd = OK(open("old", O_RDONLY));
		turn(1);
		turn(0);
		FAILS(ENOENT, stat("old", &(struct stat){ 0 }));
		expect_content("renamed", "content", 7);
		close(create_file("next", "new"));
		OK(rename("next", "renamed"));
		EQUAL(pread(fd, seen, 8, 0), 7);
		turn(1);
		turn(0);
		OK(unlink("renamed"));
		turn(1);
	}
}

enum { PAGE = 4096 };

/* Puts four bytes at the start of a page, or takes them, through a mapping; as a plain transfer where files cannot be mapped. */
static void through_a_mapping(char *text, int page, bool put)
{
	int fd = OK(open("mapped", O_RDWR));
	char *at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED) {
		EQUAL(errno, ENODEV);
		EQUAL(put ? pwrite(fd, text, 4, page * PAGE) : pread(fd, text, 4, page * PAGE), 4);
	} else if (put) {
		memcpy(at + page * PAGE, text, 4);
		OK(msync(at, 2 * PAGE, MS_SYNC));
		OK(munmap(at, 2 * PAGE));
	} else {
		memcpy(text, at + page * PAGE, 4);
		OK(munmap(at, 2 * PAGE));
	}
	close(fd);
}

static void expect_mapped(const char *text, int page)
{
	char seen[5] = "";
	through_a_mapping(seen, page, false);
	REQUIRE(!strcmp(seen, text), "page %d begins with '%s', not with '%s'", page, seen, text);
}

static void mappings(void)
{
	if (side == 0) {
		int fd = create_file("mapped", "");
		OK(ftruncate(fd, 2 * PAGE));
		close(fd);
		through_a_mapping("zero", 0, true);
		through_a_mapping("zero", 1, true);
		turn(0);
		turn(1);
		expect_mapped("zero", 0);
		expect_mapped("one!", 1);
	} else {
		turn(0);
		expect_mapped("zero", 0);
		expect_mapped("zero", 1);
		through_a_mapping("one!", 1, true);
		turn(1);
	}
}

static int entries_of(const char *path)
{
	int found = 0;
	DIR *dir = opendir(path);
	REQUIRE(dir, "opendir: %s", strerror(errno));
	while (readdir(dir))
		found++;
	closedir(dir);
	return found - 2;
}

static void directories_and_attributes(void)
{
	char name[32];
	if (side == 0) {
		OK(mkdir("d", 0755));
		for (int i = 0; i < ENTRIES; i++) {
			snprintf(name, sizeof name, "d/%d", i);
			close(create_file(name, ""));
		}
		turn(0);
		turn(1);
		EQUAL(entries_of("d"), ENTRIES / 2);
		FAILS(ENOENT, open("d/0", O_RDONLY));
		OK(chmod("d/1", 0640));
		OK(chown("d/1", USER, GROUP));
		OK(utimensat(AT_FDCWD, "d/1", (struct timespec[2]){ { 1, 2 }, { 3, 4 } }, 0));
		OK(link("d/1", "linked"));
		turn(0);
	} else {
		turn(0);
		EQUAL(entries_of("d"), ENTRIES);
		for (int i = 0; i < ENTRIES; i += 2) {
			snprintf(name, sizeof name, "d/%d", i);
			OK(unlink(name));
		}
		EQUAL(mode_of("d/1"), 0644);
		turn(1);
		turn(0);
		struct stat st = stat_of("d/1");
		EQUAL(st.st_mode & 07777, 0640);
		EQUAL(st.st_uid, USER);
		EQUAL(st.st_gid, GROUP);
		EQUAL(st.st_mtim.tv_sec, 3);
		EQUAL(st.st_nlink, 2);
		EQUAL(stat_of("linked").st_ino, st.st_ino);
	}
}

static void exclusive_creation(void)
{
	char name[32];
	int won = 0, theirs = 0;
	meet();
	for (int i = 0; i < NAMES; i++) {
		snprintf(name, sizeof name, "exclusive-%d", i);
		int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
		REQUIRE(fd >= 0 || errno == EEXIST, "O_EXCL: %s", strerror(errno));
		won += fd >= 0;
		close(fd);
	}
	snprintf(name, sizeof name, "won-%d", side);
	int fd = OK(open(name, O_CREAT | O_RDWR, 0644));
	write_all(fd, &won, sizeof won, 0);
	meet();
	snprintf(name, sizeof name, "won-%d", !side);
	EQUAL(pread(OK(open(name, O_RDONLY)), &theirs, sizeof theirs, 0), sizeof theirs);
	EQUAL(won + theirs, NAMES);
}

enum kind { RECORD_LOCK, OPEN_FILE_LOCK, WHOLE_FILE_LOCK, KINDS };

static int lock(int fd, enum kind kind, short type, bool wait)
{
	struct flock range = { .l_type = type, .l_whence = SEEK_SET, .l_start = 100, .l_len = 10 };
	switch (kind) {
	case RECORD_LOCK: return fcntl(fd, wait ? F_SETLKW : F_SETLK, &range);
	case OPEN_FILE_LOCK: return fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &range);
	default: return flock(fd, (type == F_WRLCK ? LOCK_EX : type == F_RDLCK ? LOCK_SH : LOCK_UN) | (wait ? 0 : LOCK_NB));
	}
}

static void locks_conflict(enum kind kind)
{
	char name[32];
	snprintf(name, sizeof name, "lock-%d", kind);
	int fd = OK(open(name, O_CREAT | O_RDWR, 0644));
	meet();
	if (side == 0) {
		OK(lock(fd, kind, F_WRLCK, false));
		turn(0);
		turn(1);
		/* the other side may wait by now; it must not get the lock before this */
		write_all(fd, "unlocked", 8, 0);
		OK(lock(fd, kind, F_UNLCK, false));
		turn(1);
		FAILS(EAGAIN, lock(fd, kind, F_RDLCK, false));
		turn(0);
		OK(lock(fd, kind, F_RDLCK, true));
		meet();
	} else {
		turn(0);
		FAILS(EAGAIN, lock(fd, kind, F_RDLCK, false));
		if (kind == RECORD_LOCK) {
			struct flock found = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0 };
			OK(fcntl(fd, F_GETLK, &found));
			EQUAL(found.l_type, F_WRLCK);
			EQUAL(found.l_start, 100);
			EQUAL(found.l_len, 10);
		}
		turn(1);
		OK(lock(fd, kind, F_WRLCK, true));
		expect_content(name, "unlocked", 8);
		if (kind == RECORD_LOCK) /* the check of the content has closed the file, which ends the process's locks */
			OK(lock(fd, kind, F_WRLCK, true));
		turn(1);
		turn(0);
		close(fd);
		meet();
	}
}

static void count_under_a_lock(void)
{
	uint32_t count = 0;
	int fd = OK(open("counter", O_CREAT | O_RDWR, 0644));
	meet();
	for (int i = 0; i < RECORDS; i++) {
		OK(lock(fd, RECORD_LOCK, F_WRLCK, true));
		if (pread(fd, &count, sizeof count, 0) == 0)
			count = 0;
		count++;
		write_all(fd, &count, sizeof count, 0);
		OK(lock(fd, RECORD_LOCK, F_UNLCK, false));
	}
	meet();
	EQUAL(pread(fd, &count, sizeof count, 0), sizeof count);
	EQUAL(count, 2 * RECORDS);
}

static void deadlock(void)
{
	static const char *const names[] = { "mine-0", "mine-1" };
	int mine = OK(open(names[side], O_CREAT | O_RDWR, 0644));
	OK(lock(mine, RECORD_LOCK, F_WRLCK, false));
	meet();
	int theirs = OK(open(names[!side], O_RDWR));
	int result = lock(theirs, RECORD_LOCK, F_WRLCK, true);
	REQUIRE(result == 0 || errno == EDEADLK, "a circle of two waits ends with %s", strerror(errno));
	if (result == -1)
		close(create_file("deadlocked", ""));
	OK(lock(mine, RECORD_LOCK, F_UNLCK, false));
	meet();
	OK(access("deadlocked", F_OK));
}

int pair(char **arguments, int count)
{
	if (count < 2)
		return 2;
	side = arguments[0][0] == '1';
	local = count > 2;
	OK(chdir(arguments[1]));
	meet();
	create_see_append();
	append_at_once();
	rename_and_replace();
	mappings();
	directories_and_attributes();
	exclusive_creation();
	for (int kind = 0; kind < KINDS; kind++)
		locks_conflict(kind);
	count_under_a_lock();
	if (!local)
		deadlock();
	meet();
	printf("side %d is done\n", side);
	return 0;
}
