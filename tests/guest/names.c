/* Checks of names and links: creating, renaming, linking and removing entries. */
#include "checks.h"

#include <linux/fs.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

static int rename2(const char *from, const char *to, unsigned flags)
{
	return renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
}

static void create_exclusively(void)
{
	close(OK(open("a", O_CREAT | O_EXCL | O_WRONLY, 0600)));
	FAILS(EEXIST, open("a", O_CREAT | O_EXCL | O_WRONLY, 0600));
	OK(symlink("nowhere", "dangling"));
	FAILS(EEXIST, open("dangling", O_CREAT | O_EXCL | O_WRONLY, 0600));
	FAILS(ENOENT, open("missing", O_RDONLY));
	FAILS(ENOENT, stat("missing", &(struct stat){ 0 }));
	FAILS(ENOTDIR, open("a/b", O_RDONLY));
	FAILS(EEXIST, mkdir("a", 0755));
}

static void rename_over_an_existing_file(void)
{
	close(create_file("a", "first"));
	close(create_file("b", "second"));
	ino_t ino = stat_of("a").st_ino;
	OK(rename("a", "b"));
	FAILS(ENOENT, lstat("a", &(struct stat){ 0 }));
	expect_content("b", "first", 5);
	EQUAL(stat_of("b").st_ino, ino);
	FAILS(ENOENT, rename("a", "c"));
}

static void rename_noreplace(void)
{
	close(create_file("a", "first"));
	close(create_file("b", "second"));
	FAILS(EEXIST, rename2("a", "b", RENAME_NOREPLACE));
	expect_content("a", "first", 5);
	expect_content("b", "second", 6);
	OK(rename2("a", "c", RENAME_NOREPLACE));
	expect_content("c", "first", 5);
	FAILS(ENOENT, lstat("a", &(struct stat){ 0 }));
}

static void rename_exchange(void)
{
	close(create_file("a", "first"));
	OK(mkdir("d", 0755));
	close(create_file("d/inner", "inner"));
	OK(rename2("a", "d", RENAME_EXCHANGE));
	expect_content("d", "first", 5);
	expect_content("a/inner", "inner", 5);
	FAILS(ENOENT, rename2("a", "missing", RENAME_EXCHANGE));
	FAILS(EINVAL, rename2("a", "d", RENAME_EXCHANGE | RENAME_NOREPLACE));
}

static void rename_whiteout(void)
{
	close(create_file("a", "first"));
	OK(rename2("a", "b", RENAME_WHITEOUT));
	expect_content("b", "first", 5);
	struct stat st = stat_of("a");
	REQUIRE(S_ISCHR(st.st_mode) && st.st_rdev == makedev(0, 0), "what is left under the old name is no whiteout");
}

static void rename_a_directory_over_an_empty_one(void)
{
	OK(mkdir("a", 0755));
	OK(mkdir("b", 0755));
	close(create_file("a/inner", "inner"));
	OK(rename("a", "b"));
	expect_content("b/inner", "inner", 5);
	FAILS(ENOENT, lstat("a", &(struct stat){ 0 }));
}

static void rename_a_directory_over_a_full_one(void)
{
	OK(mkdir("a", 0755));
	OK(mkdir("b", 0755));
	close(create_file("b/inner", "inner"));
	if (rename("a", "b") == 0 || (errno != ENOTEMPTY && errno != EEXIST))
		fail("rename over a non-empty directory: %s", strerror(errno));
	expect_content("b/inner", "inner", 5);
	OK(lstat("a", &(struct stat){ 0 }));
}

static void rename_into_the_own_subdirectory(void)
{
	OK(mkdir("a", 0755));
	OK(mkdir("a/b", 0755));
	FAILS(EINVAL, rename("a", "a/b/c"));
	OK(lstat("a/b", &(struct stat){ 0 }));
}

static void rename_between_kinds(void)
{
	close(create_file("f", "file"));
	OK(mkdir("d", 0755));
	FAILS(EISDIR, rename("f", "d"));
	FAILS(ENOTDIR, rename("d", "f"));
}

static void rename_between_directories(void)
{
	OK(mkdir("a", 0755));
	OK(mkdir("b", 0755));
	OK(mkdir("a/sub", 0755));
	close(create_file("a/sub/f", "moved"));
	OK(rename("a/sub", "b/sub2"));
	expect_content("b/sub2/f", "moved", 5);
	FAILS(ENOENT, lstat("a/sub", &(struct stat){ 0 }));
	OK(chdir("b/sub2"));
	expect_content("../../b/sub2/f", "moved", 5);
	OK(lstat("../../a", &(struct stat){ 0 }));
}

static void rename_of_an_open_file(void)
{
	int fd = create_file("a", "before");
	OK(mkdir("d", 0755));
	OK(rename("a", "d/b"));
	write_all(fd, "after!", 6, 0);
	OK(fsync(fd));
	expect_content("d/b", "after!", 6);
	struct stat st;
	OK(fstat(fd, &st));
	EQUAL(st.st_ino, stat_of("d/b").st_ino);
}

static void hard_links(void)
{
	close(create_file("a", "shared"));
	OK(link("a", "b"));
	OK(mkdir("d", 0755));
	OK(link("b", "d/c"));
	EQUAL(stat_of("a").st_nlink, 3);
	EQUAL(stat_of("a").st_ino, stat_of("d/c").st_ino);
	int fd = OK(open("d/c", O_WRONLY));
	write_all(fd, "SHARED", 6, 0);
	close(fd);
	expect_content("a", "SHARED", 6);
	FAILS(EEXIST, link("a", "b"));
	FAILS(EPERM, link("d", "e"));
	OK(unlink("a"));
	EQUAL(stat_of("b").st_nlink, 2);
	/* POSIX: renaming one link over another link of the same file does nothing */
	OK(rename("b", "d/c"));
	EQUAL(stat_of("b").st_nlink, 2);
	OK(symlink("b", "s"));
	OK(linkat(AT_FDCWD, "s", AT_FDCWD, "s2", 0));
	REQUIRE(S_ISLNK(stat_of("s2").st_mode), "linkat followed a symbolic link without AT_SYMLINK_FOLLOW");
}

static void symbolic_links(void)
{
	char target[64];
	OK(mkdir("d", 0755));
	close(create_file("d/f", "through"));
	OK(symlink("d/f", "s"));
	EQUAL(readlink("s", target, sizeof target), 3);
	REQUIRE(!memcmp(target, "d/f", 3), "readlink gave another target");
	EQUAL(stat_of("s").st_size, 3);
	REQUIRE(S_ISLNK(stat_of("s").st_mode), "lstat of a symbolic link gives another type");
	expect_content("s", "through", 7);
	FAILS(ELOOP, open("s", O_RDONLY | O_NOFOLLOW));
	OK(symlink("d", "sd"));
	expect_content("sd/f", "through", 7);
	FAILS(EINVAL, readlink("d/f", target, sizeof target));
	FAILS(EEXIST, symlink("x", "s"));
	OK(unlink("s"));
	expect_content("d/f", "through", 7);
}

static void symbolic_link_to_nothing(void)
{
	OK(symlink("missing/target", "s"));
	FAILS(ENOENT, stat("s", &(struct stat){ 0 }));
	OK(lstat("s", &(struct stat){ 0 }));
	OK(symlink("loop", "loop"));
	FAILS(ELOOP, stat("loop", &(struct stat){ 0 }));
}

static void symbolic_link_with_a_long_target(void)
{
	static char target[4096], seen[4096];
	memset(target, 'x', 4000);
	for (int i = 99; i < 4000; i += 100)
		target[i] = '/';
	OK(symlink(target, "s"));
	EQUAL(readlink("s", seen, sizeof seen), 4000);
	REQUIRE(!memcmp(target, seen, 4000), "a long target changed");
	EQUAL(readlink("s", seen, 10), 10);
}

static void longest_name(void)
{
	char name[257] = { 0 };
	memset(name, 'n', 255);
	close(create_file(name, "long"));
	expect_content(name, "long", 4);
	name[255] = 'n';
	FAILS(ENAMETOOLONG, open(name, O_CREAT | O_WRONLY, 0600));
	FAILS(ENAMETOOLONG, mkdir(name, 0755));
	FAILS(ENAMETOOLONG, lstat(name, &(struct stat){ 0 }));
}

static void unusual_names(void)
{
	static const char *const names[] = { "žluťoučký kůň", "日本語のファイル", "🦀", "a b", "tab\there", "new\nline", "quote'\"", "-rf",
					     "back\\slash", "\x80\xff\xfe", "...", "*?[x]", " ", "\x01" };
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		char path[128];
		snprintf(path, sizeof path, "./%s", names[i]);
		close(create_file(path, names[i]));
		expect_content(path, names[i], strlen(names[i]));
	}
}

static void deep_directories(void)
{
	for (int depth = 0; depth < 100; depth++) {
		char name[32];
		snprintf(name, sizeof name, "level-%d", depth);
		OK(mkdir(name, 0755));
		OK(chdir(name));
	}
	close(create_file("bottom", "deep"));
	for (int depth = 0; depth < 100; depth++)
		OK(chdir(".."));
	OK(lstat("level-0/level-1/level-2", &(struct stat){ 0 }));
}

static void removing_the_wrong_kind(void)
{
	OK(mkdir("d", 0755));
	close(create_file("d/f", ""));
	FAILS(EISDIR, unlink("d"));
	FAILS(ENOTDIR, rmdir("d/f"));
	FAILS(ENOTEMPTY, rmdir("d"));
	FAILS(EINVAL, rmdir("d/."));
	FAILS(ENOENT, rmdir("missing"));
	FAILS(ENOENT, unlink("missing"));
	OK(unlink("d/f"));
	OK(rmdir("d"));
	FAILS(ENOENT, chdir("d"));
}

static void open_as_a_directory(void)
{
	close(create_file("f", ""));
	OK(mkdir("d", 0755));
	FAILS(ENOTDIR, open("f", O_RDONLY | O_DIRECTORY));
	FAILS(EISDIR, open("d", O_WRONLY));
	close(OK(open("d", O_RDONLY | O_DIRECTORY)));
}

static void fifo_writer(void)
{
	int fd = OK(open("fifo", O_WRONLY));
	EQUAL(write(fd, "through the fifo", 16), 16);
}

static void fifo_between_processes(void)
{
	char seen[32];
	OK(mkfifo("fifo", 0640));
	REQUIRE(S_ISFIFO(stat_of("fifo").st_mode), "mkfifo made another type");
	pid_t writer = start_child(fifo_writer);
	int fd = OK(open("fifo", O_RDONLY));
	size_t done = 0;
	ssize_t n;
	while ((n = OK(read(fd, seen + done, sizeof seen - done))) > 0)
		done += n;
	EQUAL(done, 16);
	REQUIRE(!memcmp(seen, "through the fifo", 16), "the reader got other bytes");
	join_child(writer);
}

static void device_nodes(void)
{
	OK(mknod("char", S_IFCHR | 0600, makedev(1, 3)));
	OK(mknod("block", S_IFBLK | 0600, makedev(259, 70000)));
	struct stat character = stat_of("char"), block = stat_of("block");
	REQUIRE(S_ISCHR(character.st_mode) && character.st_rdev == makedev(1, 3), "the character device changed");
	REQUIRE(S_ISBLK(block.st_mode) && block.st_rdev == makedev(259, 70000), "the block device changed");
	OK(mknod("file", S_IFREG | 0600, 0));
	REQUIRE(S_ISREG(stat_of("file").st_mode), "mknod of a regular file made another type");
}

static void unix_sockets(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "socket" };
	int server = OK(socket(AF_UNIX, SOCK_STREAM, 0)), client = OK(socket(AF_UNIX, SOCK_STREAM, 0));
	OK(bind(server, (struct sockaddr *)&address, sizeof address));
	REQUIRE(S_ISSOCK(stat_of("socket").st_mode), "bind made another type");
	OK(listen(server, 1));
	OK(connect(client, (struct sockaddr *)&address, sizeof address));
	FAILS(EADDRINUSE, bind(OK(socket(AF_UNIX, SOCK_STREAM, 0)), (struct sockaddr *)&address, sizeof address));
	FAILS(ENXIO, open("socket", O_RDONLY));
}

static void nameless_file_gets_a_name(void)
{
	int fd = open(".", O_TMPFILE | O_RDWR, 0600);
	if (fd < 0 && errno == EOPNOTSUPP && !kernel_at_least(6, 2))
		skip("this kernel's FUSE has no O_TMPFILE");
	REQUIRE(fd >= 0, "O_TMPFILE: %s", strerror(errno));
	write_all(fd, "nameless", 8, 0);
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	OK(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
	expect_content("named", "nameless", 8);
	EQUAL(stat_of("named").st_nlink, 1);
	EQUAL(mode_of("named"), 0600);
	close(fd);
	fd = OK(open(".", O_TMPFILE | O_RDWR | O_EXCL, 0600));
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	FAILS(ENOENT, linkat(AT_FDCWD, path, AT_FDCWD, "never", AT_SYMLINK_FOLLOW));
}

static void unlinked_file_stays_usable(void)
{
	char seen[16];
	struct stat st;
	int fd = create_file("a", "before");
	OK(unlink("a"));
	OK(fstat(fd, &st));
	EQUAL(st.st_nlink, 0);
	EQUAL(st.st_size, 6);
	write_all(fd, " and after", 10, 6);
	EQUAL(pread(fd, seen, sizeof seen, 0), 16);
	REQUIRE(!memcmp(seen, "before and after", 16), "an unlinked file lost its content");
	OK(ftruncate(fd, 3));
	OK(fchmod(fd, 0600));
	OK(fstat(fd, &st));
	EQUAL(st.st_size, 3);
	/* the name is free again, and a new file under it is another one */
	close(create_file("a", "new"));
	REQUIRE(stat_of("a").st_ino != st.st_ino, "the new file has the inode number of the unlinked one that is still open");
	EQUAL(pread(fd, seen, sizeof seen, 0), 3);
	close(fd);
	expect_content("a", "new", 3);
}

static void removed_working_directory(void)
{
	OK(mkdir("d", 0755));
	OK(chdir("d"));
	OK(rmdir("../d"));
	FAILS(ENOENT, open("f", O_CREAT | O_WRONLY, 0600));
	FAILS(ENOENT, mkdir("sub", 0755));
}

const struct check name_checks[] = {
	{ "create exclusively", create_exclusively },
	{ "rename over an existing file", rename_over_an_existing_file },
	{ "rename with NOREPLACE", rename_noreplace },
	{ "rename with EXCHANGE", rename_exchange },
	{ "rename with WHITEOUT", rename_whiteout },
	{ "rename a directory over an empty one", rename_a_directory_over_an_empty_one },
	{ "rename a directory over a full one", rename_a_directory_over_a_full_one },
	{ "rename a directory into itself", rename_into_the_own_subdirectory },
	{ "rename between kinds", rename_between_kinds },
	{ "rename between directories", rename_between_directories },
	{ "rename of an open file", rename_of_an_open_file },
	{ "hard links", hard_links },
	{ "symbolic links", symbolic_links },
	{ "symbolic link to nothing", symbolic_link_to_nothing },
	{ "symbolic link with a long target", symbolic_link_with_a_long_target },
	{ "longest name", longest_name },
	{ "unusual names", unusual_names },
	{ "deep directories", deep_directories },
	{ "removing the wrong kind", removing_the_wrong_kind },
	{ "open as a directory", open_as_a_directory },
	{ "fifo between processes", fifo_between_processes },
	{ "device nodes", device_nodes },
	{ "unix sockets", unix_sockets },
	{ "nameless file gets a name", nameless_file_gets_a_name },
	{ "unlinked file stays usable", unlinked_file_stays_usable },
	{ "removed working directory", removed_working_directory },
	{ 0 },
};
