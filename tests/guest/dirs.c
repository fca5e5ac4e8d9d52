/* Checks of directory listings and of many entries. */
#include "checks.h"

#include <dirent.h>
#include <sys/syscall.h>

enum { MANY = 10000 };

static void make_entries(int count)
{
	char name[32];
	for (int i = 0; i < count; i++) {
		snprintf(name, sizeof name, "entry-%05d", i);
		OK(mknod(name, S_IFREG | 0644, 0));
	}
}

static DIR *open_directory(void)
{
	DIR *dir = opendir(".");
	REQUIRE(dir, "opendir: %s", strerror(errno));
	return dir;
}

/* Counts what readdir gives from here on; every entry must be new and known. */
static int count_entries(DIR *dir, unsigned char *seen, int count)
{
	int dots = 0, found = 0;
	struct dirent *entry;
	errno = 0;
	while ((entry = readdir(dir))) {
		int number = -1;
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) {
			dots++;
			continue;
		}
		sscanf(entry->d_name, "entry-%d", &number);
		REQUIRE(number >= 0 && number < count, "readdir gives '%s', which does not exist", entry->d_name);
		REQUIRE(!seen[number], "readdir gives '%s' twice", entry->d_name);
		seen[number] = 1;
		found++;
	}
	REQUIRE(errno == 0, "readdir: %s", strerror(errno));
	REQUIRE(dots <= 2, "readdir gives . and .. %d times", dots);
	return found;
}

static void ten_thousand_entries(void)
{
	static unsigned char seen[MANY];
	make_entries(MANY);
	DIR *dir = open_directory();
	EQUAL(count_entries(dir, seen, MANY), MANY);
	memset(seen, 0, sizeof seen);
	rewinddir(dir);
	EQUAL(count_entries(dir, seen, MANY), MANY);
}

static void seek_in_a_directory(void)
{
	enum { COUNT = 2000, STEP = 97 };
	static long at[COUNT];
	static char names[COUNT][256];
	int n = 0, i = 0;
	struct dirent *entry;
	make_entries(COUNT - 10);
	DIR *dir = open_directory();
	for (;;) {
		long here = telldir(dir);
		if (!(entry = readdir(dir)))
			break;
		if (i++ % STEP == 0) {
			at[n] = here;
			strcpy(names[n++], entry->d_name);
		}
	}
	for (int k = n - 1; k >= 0; k--) {
		seekdir(dir, at[k]);
		entry = readdir(dir);
		REQUIRE(entry && !strcmp(entry->d_name, names[k]), "seekdir leads to '%s', expected '%s'",
			entry ? entry->d_name : "the end", names[k]);
	}
}

static void delete_while_listing(void)
{
	enum { COUNT = 2000 };
	struct dirent *entry;
	make_entries(COUNT);
	DIR *dir = open_directory();
	int removed = 0;
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.') {
			OK(unlink(entry->d_name));
			removed++;
		}
	EQUAL(removed, COUNT);
	rewinddir(dir);
	while ((entry = readdir(dir)))
		REQUIRE(entry->d_name[0] == '.', "'%s' is still listed after it was removed", entry->d_name);
}

static void entries_have_types_and_numbers(void)
{
	struct dirent *entry;
	int found = 0;
	close(create_file("file", ""));
	OK(mkdir("directory", 0755));
	OK(symlink("x", "link"));
	OK(mkfifo("fifo", 0644));
	DIR *dir = open_directory();
	while ((entry = readdir(dir))) {
		struct stat st = stat_of(entry->d_name);
		if (!strcmp(entry->d_name, ".."))
			continue; /* the number of a mount's parent may be hidden */
		found++;
		REQUIRE(entry->d_type == IFTODT(st.st_mode), "'%s' has type %d, expected %d", entry->d_name, entry->d_type,
			IFTODT(st.st_mode));
		REQUIRE(entry->d_ino == st.st_ino, "'%s' has another inode number in the listing than in stat", entry->d_name);
	}
	EQUAL(found, 5);
}

static void new_entries_after_rewind(void)
{
	static unsigned char seen[200];
	make_entries(100);
	DIR *dir = open_directory();
	EQUAL(count_entries(dir, seen, 100), 100);
	OK(mknod("entry-00150", S_IFREG | 0644, 0));
	memset(seen, 0, sizeof seen);
	rewinddir(dir);
	EQUAL(count_entries(dir, seen, 200), 101);
}

static void list_through_a_small_buffer(void)
{
	enum { COUNT = 500 };
	struct entry {
		uint64_t ino;
		int64_t off;
		unsigned short reclen;
		unsigned char type;
		char name[];
	};
	char buffer[280] __attribute__((aligned(8)));
	static unsigned char seen[COUNT];
	make_entries(COUNT);
	int fd = OK(open(".", O_RDONLY | O_DIRECTORY)), found = 0;
	long n;
	while ((n = OK(syscall(SYS_getdents64, fd, buffer, sizeof buffer))) > 0)
		for (long at = 0; at < n; at += ((struct entry *)(buffer + at))->reclen) {
			int number = -1;
			if (sscanf(((struct entry *)(buffer + at))->name, "entry-%d", &number) != 1)
				continue;
			REQUIRE(number >= 0 && number < COUNT && !seen[number], "entry %d is wrong or given twice", number);
			seen[number] = 1;
			found++;
		}
	EQUAL(found, COUNT);
	FAILS(EINVAL, ({
		      OK(lseek(fd, 0, SEEK_SET));
		      syscall(SYS_getdents64, fd, buffer, 1);
	      }));
}

static void a_thousand_small_files(void)
{
	char name[32], text[32];
	for (int i = 0; i < 1000; i++) {
		snprintf(name, sizeof name, "small-%d", i);
		snprintf(text, sizeof text, "content of %d", i);
		close(create_file(name, text));
	}
	for (int i = 0; i < 1000; i++) {
		snprintf(name, sizeof name, "small-%d", i);
		snprintf(text, sizeof text, "content of %d", i);
		EQUAL(stat_of(name).st_size, strlen(text));
	}
	for (int i = 0; i < 1000; i += 50) {
		snprintf(name, sizeof name, "small-%d", i);
		snprintf(text, sizeof text, "content of %d", i);
		expect_content(name, text, strlen(text));
	}
	for (int i = 0; i < 1000; i++) {
		snprintf(name, sizeof name, "small-%d", i);
		OK(unlink(name));
	}
	FAILS(ENOENT, stat("small-999", &(struct stat){ 0 }));
}

static void work_relative_to_a_directory(void)
{
	OK(mkdir("d", 0755));
	int dir = OK(open("d", O_PATH | O_DIRECTORY));
	int fd = OK(openat(dir, "f", O_CREAT | O_RDWR, 0644));
	write_all(fd, "relative", 8, 0);
	OK(rename("d", "e"));
	struct stat st;
	OK(fstatat(dir, "f", &st, 0));
	EQUAL(st.st_size, 8);
	OK(mkdirat(dir, "sub", 0755));
	OK(renameat(dir, "f", dir, "g"));
	OK(fchdir(OK(open("e", O_RDONLY))));
	expect_content("g", "relative", 8);
	OK(unlinkat(dir, "sub", AT_REMOVEDIR));
}

const struct check dir_checks[] = {
	{ "list ten thousand entries", ten_thousand_entries },
	{ "telldir and seekdir", seek_in_a_directory },
	{ "delete while listing", delete_while_listing },
	{ "types and numbers of entries", entries_have_types_and_numbers },
	{ "new entries after rewinddir", new_entries_after_rewind },
	{ "list through a small buffer", list_through_a_small_buffer },
	{ "a thousand small files", a_thousand_small_files },
	{ "work relative to a directory", work_relative_to_a_directory },
	{ 0 },
};
