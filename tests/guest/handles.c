/*
 * File handles as an NFS server keeps them, with no descriptor that would hold the file: `checks handles DIR` makes a file
 * two directories below DIR and takes handles, then opens them again for each line that it reads, whatever has happened to
 * the file system meanwhile. It answers each line with `opened`, with `stale`, or with `one opened`.
 */
#include "checks.h"

struct handle {
	struct file_handle head;
	unsigned char bytes[MAX_HANDLE_SZ];
};

static struct handle take(const char *path)
{
	int mount;
	struct handle handle = { .head.handle_bytes = MAX_HANDLE_SZ };
	OK(name_to_handle_at(AT_FDCWD, path, &handle.head, &mount, 0));
	return handle;
}

static bool opens(const char *root, struct handle *handle, uint64_t number)
{
	struct stat st;
	int mount = OK(open(root, O_RDONLY | O_DIRECTORY));
	int fd = open_by_handle_at(mount, &handle->head, O_RDONLY);
	REQUIRE(fd >= 0 || errno == ESTALE, "a handle is answered with %s", strerror(errno));
	close(mount);
	if (fd < 0)
		return false;
	OK(fstat(fd, &st));
	EQUAL(st.st_ino, number);
	close(fd);
	return true;
}

int handles(const char *root)
{
	char path[4096], line[64];
	struct handle taken[2];
	uint64_t numbers[2];
	static const char *const names[] = { "/of-handles", "/of-handles/d", "/of-handles/d/f" };
	for (int i = 0; i < 3; i++) {
		snprintf(path, sizeof path, "%s%s", root, names[i]);
		if (i < 2)
			OK(mkdir(path, 0755));
		else
			close(create_file(path, "text"));
		if (i > 0) {
			taken[i - 1] = take(path);
			numbers[i - 1] = stat_of(path).st_ino;
		}
	}
	puts("taken");
	for (fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
		static const char *const answers[] = { "stale", "one opened", "opened" };
		puts(answers[opens(root, &taken[0], numbers[0]) + opens(root, &taken[1], numbers[1])]);
	}
	return 0;
}
