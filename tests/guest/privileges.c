/* Checks of who may do what: set-id bits, access control lists, mapped ids and protected inodes. */
#include "checks.h"

#include <linux/fs.h>
#include <linux/mount.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

/* What is done to the file under test by who has it open. */
static void (*change)(int fd);

static void by_write(int fd)
{
	EQUAL(write(fd, "x", 1), 1);
}

static void by_truncation(int fd)
{
	OK(ftruncate(fd, 100));
}

static void by_allocation(int fd)
{
	OK(fallocate(fd, 0, 0, 8192));
}

static void by_punching(int fd)
{
	OK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
}

static void by_copying(int fd)
{
	off_t from = 0, to = 0;
	EQUAL(copy_file_range(OK(open("source", O_RDONLY)), &from, fd, &to, 4, 0), 4);
}

static void by_chown(int fd)
{
	OK(fchown(fd, -1, -1));
}

static void (*const changes[])(int fd) = { by_write, by_truncation, by_allocation, by_punching, by_copying };
enum { CHANGES = sizeof changes / sizeof *changes };

static void change_f(void)
{
	int fd = OK(open("f", O_RDWR));
	change(fd);
	close(fd);
}

static void new_f(mode_t mode)
{
	unlink("f");
	close(create_file("f", "some text"));
	OK(chmod("f", mode));
}

static void changes_clear_set_ids(void)
{
	close(create_file("source", "text"));
	for (int i = 0; i < CHANGES; i++) {
		change = changes[i];
		new_f(06777);
		as_user(change_f);
		REQUIRE(mode_of("f") == 0777, "change %d by a user leaves mode %o", i, mode_of("f"));
		new_f(06777);
		change_f();
		REQUIRE(mode_of("f") == 06777, "change %d by root leaves mode %o", i, mode_of("f"));
	}
}

static void own_f(void)
{
	change_f();
}

static void chown_to_nobody_clears_set_ids(void)
{
	change = by_chown;
	new_f(06755);
	OK(chown("f", USER, GROUP));
	OK(chmod("f", 06755));
	as_user(own_f);
	EQUAL(mode_of("f"), 0755);
	new_f(06755);
	change_f();
	EQUAL(mode_of("f"), 0755);
}

/* An access control list as an attribute: version 2, then entries of tag, permissions and id. */
struct acl {
	uint32_t version;
	struct {
		uint16_t tag, permissions;
		uint32_t id;
	} entry[5];
};

static struct acl acl_for(uint32_t user, uint16_t permissions, uint16_t mask)
{
	return (struct acl){ 2, { { 1, 7, -1 }, { 2, permissions, user }, { 4, 0, -1 }, { 16, mask, -1 }, { 32, 0, -1 } } };
}

static void set_acl(const char *path, const char *name, struct acl acl)
{
	if (setxattr(path, name, &acl, sizeof acl, 0) == -1 && errno == EOPNOTSUPP)
		skip("the file system has no access control lists");
	OK(getxattr(path, name, 0, 0));
}

static void read_only_by_acl(void)
{
	close(OK(open("f", O_RDONLY)));
	FAILS(EACCES, open("f", O_WRONLY));
}

static void locked_out_by_acl(void)
{
	FAILS(EACCES, open("f", O_RDONLY));
}

static void acl_decides(void)
{
	close(create_file("f", "text"));
	OK(chmod("f", 0600));
	set_acl("f", "system.posix_acl_access", acl_for(USER, 6, 4));
	EQUAL(mode_of("f"), 0740);
	as_user(read_only_by_acl);
	OK(chmod("f", 0700)); /* the group's bits are the mask */
	as_user(locked_out_by_acl);
	OK(removexattr("f", "system.posix_acl_access"));
	FAILS(ENODATA, getxattr("f", "system.posix_acl_access", 0, 0));
}

static void acl_is_inherited(void)
{
	struct acl got;
	OK(mkdir("d", 0755));
	set_acl("d", "system.posix_acl_default", acl_for(USER, 4, 7));
	umask(077);
	close(OK(open("d/f", O_CREAT | O_WRONLY, 0666)));
	EQUAL(mode_of("d/f"), 0660); /* the mask of the list, not the umask */
	EQUAL(getxattr("d/f", "system.posix_acl_access", &got, sizeof got), sizeof got);
	OK(mkdir("d/sub", 0777));
	EQUAL(getxattr("d/sub", "system.posix_acl_default", &got, sizeof got), sizeof got);
	FAILS(EACCES, setxattr("d/f", "system.posix_acl_default", &got, sizeof got, 0));
}

static void inode_flags(void)
{
	int flags = 0, fd = create_file("f", "text");
	if (ioctl(fd, FS_IOC_GETFLAGS, &flags) == -1 && errno == ENOTTY)
		skip("the file system has no inode flags");
	OK(fsync(fd)); /* a driver that caches writes could not write them any more */
	flags |= FS_IMMUTABLE_FL;
	if (ioctl(fd, FS_IOC_SETFLAGS, &flags) == -1 && errno == EOPNOTSUPP)
		skip("the file system has no immutable inodes");
	FAILS(EPERM, open("f", O_WRONLY));
	FAILS(EPERM, unlink("f"));
	FAILS(EPERM, rename("f", "g"));
	FAILS(EPERM, link("f", "g"));
	FAILS(EPERM, chmod("f", 0600));
	FAILS(EPERM, truncate("f", 0));
	flags = (flags & ~FS_IMMUTABLE_FL) | FS_APPEND_FL;
	OK(ioctl(fd, FS_IOC_SETFLAGS, &flags));
	FAILS(EPERM, open("f", O_WRONLY));
	FAILS(EPERM, truncate("f", 0));
	int end = OK(open("f", O_WRONLY | O_APPEND));
	EQUAL(write(end, "more", 4), 4);
	flags &= ~FS_APPEND_FL;
	OK(ioctl(fd, FS_IOC_SETFLAGS, &flags));
	struct fsxattr attr;
	OK(ioctl(fd, FS_IOC_FSGETXATTR, &attr));
	EQUAL(attr.fsx_xflags & (FS_XFLAG_IMMUTABLE | FS_XFLAG_APPEND), 0);
	close(end);
	expect_content("f", "textmore", 8);
}

static void commands_that_files_do_not_have(void)
{
	int fd = create_file("f", ""), other = create_file("g", "");
	char data[256] = { 0 };
	FAILS(ENOTTY, ioctl(fd, 0x5401 /* TCGETS */, data));
	FAILS(ENOTTY, ioctl(fd, 0x1272 /* BLKGETSIZE64 */, data));
	/* a copy that shares blocks is either made or refused, never half made */
	write_all(fd, "shared", 6, 0);
	if (ioctl(other, FICLONE, fd) == 0)
		expect_content("g", "shared", 6);
	else
		REQUIRE(errno == EOPNOTSUPP || errno == ENOTTY, "FICLONE: %s", strerror(errno));
}

static void write_text(const char *path, const char *text)
{
	int fd = OK(open(path, O_WRONLY));
	EQUAL(write(fd, text, strlen(text)), (ssize_t)strlen(text));
	close(fd);
}

/* A user name space in which the ids from 0 on are those from FIRST on outside. */
static int mapped_ids(int first)
{
	int ready[2], done[2];
	char byte, path[64], text[32];
	OK(pipe(ready));
	OK(pipe(done));
	pid_t pid = OK(fork());
	if (pid == 0) {
		byte = unshare(CLONE_NEWUSER) == 0;
		EQUAL(write(ready[1], &byte, 1), 1);
		EQUAL(read(done[0], &byte, 1), 1);
		_exit(0);
	}
	EQUAL(read(ready[0], &byte, 1), 1);
	if (!byte)
		skip("this kernel has no user name spaces");
	snprintf(text, sizeof text, "0 %d 65536", first);
	snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
	write_text(path, text);
	snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
	write_text(path, text);
	snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
	int ns = OK(open(path, O_RDONLY | O_CLOEXEC));
	EQUAL(write(done[1], "x", 1), 1);
	join_child(pid);
	return ns;
}

static int idmapped;

static void create_through_the_mapping(void)
{
	close(OK(openat(idmapped, "new", O_CREAT | O_WRONLY, 0644)));
	OK(mkdirat(idmapped, "dir", 0755));
	OK(symlinkat("x", idmapped, "link"));
	FAILS(EACCES, openat(idmapped, "closed", O_RDONLY));
}

/* A mount that shows the ids from 0 on as those from 100000 on. */
static void mapped_mount(void)
{
	struct mount_attr attr = { .attr_set = MOUNT_ATTR_IDMAP };
	struct stat st;
	OK(mkdir("d", 0777));
	OK(chmod("d", 0777));
	close(create_file("d/old", "text"));
	close(create_file("d/closed", "text"));
	OK(chmod("d/closed", 0600));
	attr.userns_fd = mapped_ids(100000);
	idmapped = syscall(SYS_open_tree, AT_FDCWD, "d", OPEN_TREE_CLONE | O_CLOEXEC);
	OK(idmapped);
	if (syscall(SYS_mount_setattr, idmapped, "", AT_EMPTY_PATH, &attr, sizeof attr) == -1)
		skip("the file system cannot be mounted with mapped ids: %s", strerror(errno));
	OK(fstatat(idmapped, "old", &st, 0));
	EQUAL(st.st_uid, 100000);
	EQUAL(st.st_gid, 100000);
	OK(fchownat(idmapped, "old", 100000 + USER, 100000 + GROUP, 0));
	EQUAL(stat_of("d/old").st_uid, USER);
	EQUAL(stat_of("d/old").st_gid, GROUP);
	FAILS(EOVERFLOW, openat(idmapped, "unmapped", O_CREAT | O_WRONLY, 0644));
	OK(setresgid(100000 + GROUP, 100000 + GROUP, 0));
	OK(setresuid(100000 + USER, 100000 + USER, 0));
	in_child(create_through_the_mapping);
	OK(setresuid(0, 0, 0));
	OK(setresgid(0, 0, 0));
	static const char *const made[] = { "d/new", "d/dir", "d/link" };
	for (int i = 0; i < 3; i++) {
		EQUAL(stat_of(made[i]).st_uid, USER);
		EQUAL(stat_of(made[i]).st_gid, GROUP);
	}
}

const struct check privilege_checks[] = {
	{ "changes of content clear set-id bits", changes_clear_set_ids },
	{ "chown to nobody clears set-id bits", chown_to_nobody_clears_set_ids },
	{ "access control list decides", acl_decides },
	{ "access control list is inherited", acl_is_inherited },
	{ "immutable and append-only inodes", inode_flags },
	{ "ioctls that files do not have", commands_that_files_do_not_have },
	{ "mount with mapped ids", mapped_mount },
	{ 0 },
};
