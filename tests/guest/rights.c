/*
 * Answers about rights: who may do what, what becomes of modes, lists and capabilities, and which attributes there are. As in
 * answers.c, they are to be the same on a mount and on the directory behind it.
 */
#include "checks.h"

#include <linux/capability.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/xattr.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/xattr.h>

enum { PAGE = 4096 };

/* A file capability as an attribute: CAP_NET_RAW, permitted and effective. */
static const struct vfs_cap_data capability = { .magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE, .data = { { 1 << 13, 0 } } };

static void by_write(int fd) { SAY(pwrite(fd, "x", 1, 0), "  write"); }
static void by_empty_write(int fd) { SAY(pwrite(fd, "", 0, 0), "  write of nothing"); }
static void by_vector(int fd) { SAY(pwritev2(fd, &(struct iovec){ "xy", 2 }, 1, 0, RWF_DSYNC), "  pwritev2"); }
static void by_truncation(int fd) { SAY(ftruncate(fd, 2), "  ftruncate"); }
static void by_same_truncation(int fd) { SAY(ftruncate(fd, 9), "  ftruncate to the same size"); }
static void by_path_truncation(int fd) { (void)fd, SAY(truncate("f", 3), "  truncate"); }
static void by_open(int fd) { (void)fd, SAY_WHETHER(open("f", O_WRONLY | O_TRUNC), "  open with O_TRUNC"); }
static void by_creation(int fd) { (void)fd, SAY_WHETHER(open("f", O_WRONLY | O_CREAT, 0644), "  open with O_CREAT"); }
static void by_allocation(int fd) { SAY(fallocate(fd, 0, 0, 8192), "  fallocate"); }
static void by_kept_allocation(int fd) { SAY(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 8192), "  fallocate with KEEP_SIZE"); }
static void by_punching(int fd) { SAY(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), "  punch"); }
static void by_own_chown(int fd) { SAY(fchown(fd, geteuid(), -1), "  fchown to the caller"); }
static void by_own_chgrp(int fd) { SAY(fchown(fd, -1, getegid()), "  fchown to the caller's group"); }
static void by_second_chgrp(int fd) { SAY(fchown(fd, -1, SECOND_GROUP), "  fchown to the second group"); }
static void by_chmod(int fd) { SAY(fchmod(fd, 06755), "  fchmod"); }
static void by_times(int fd) { SAY(futimens(fd, NULL), "  futimens"); }
static void by_link(int fd) { (void)fd, SAY(link("f", "g"), "  link"), unlink("g"); }
static void by_rename(int fd) { (void)fd, SAY(rename("f", "g"), "  rename"), rename("g", "f"); }
static void by_attribute(int fd) { SAY(fsetxattr(fd, "user.a", "1", 1, 0), "  fsetxattr"); }
static void by_capability(int fd) { SAY(fsetxattr(fd, "security.capability", &capability, XATTR_CAPS_SZ_2, 0), "  set the capability"); }
static void by_no_capability(int fd) { SAY(fremovexattr(fd, "security.capability"), "  remove the capability"); }

static void by_direct_write(int fd)
{
	(void)fd;
	int direct = open("f", O_WRONLY | O_DIRECT);
	void *page = aligned_alloc(PAGE, PAGE);
	memset(page, 'd', PAGE);
	SAY(pwrite(direct, page, PAGE, 0), "  direct write");
}

static void by_copying(int fd)
{
	off_t from = 0, to = 0;
	SAY(copy_file_range(OK(open("source", O_RDONLY)), &from, fd, &to, 4, 0), "  copy_file_range");
}

static void by_mapping(int fd)
{
	char *map = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	SAY_WHETHER(map == MAP_FAILED ? -1 : 0, "  mmap");
	if (map != MAP_FAILED) {
		/* written back, it would be a write, which takes capabilities away */
		if (getxattr("f", "security.capability", 0, 0) == -1)
			map[0] = 'm';
		OK(msync(map, PAGE, MS_SYNC));
	}
}

static void (*const changes[])(int fd) = { by_write, by_empty_write, by_vector, by_direct_write, by_mapping, by_truncation, by_same_truncation,
	by_path_truncation, by_open, by_creation, by_allocation, by_kept_allocation, by_punching, by_copying, by_own_chown, by_own_chgrp,
	by_second_chgrp, by_chmod, by_times, by_link, by_rename, by_attribute, by_capability, by_no_capability };

static void (*change)(int fd);

static void change_f(void)
{
	int fd = open("f", O_RDWR);
	change(fd);
}

/*
 * What becomes of set-id bits and file capabilities with each change, by who makes it and whose the file is. Not of both on one
 * file, and not of set-group-ID on what its group cannot execute: FUSE tells a server that something is to go, but not what.
 */
static void answers_about_set_ids(void)
{
	static const mode_t modes[] = { 0777, 04777, 02777, 06777, 04700, 07755 };
	static const struct {
		uid_t user;
		gid_t group;
	} owners[] = { { 0, 0 }, { USER, GROUP }, { USER, 0 }, { USER, SECOND_GROUP }, { 0, GROUP } };
	close(create_file("source", "text"));
	OK(chmod(".", 0777));
	for (size_t i = 0; i < COUNT(changes); i++)
		for (size_t j = 0; j < COUNT(modes); j++)
			for (size_t k = 0; k < COUNT(owners); k++)
				for (int user = 0; user < 2; user++) {
					unlink("f");
					close(create_file("f", "some text"));
					OK(chown("f", owners[k].user, owners[k].group));
					if (modes[j] == 0777)
						OK(setxattr("f", "security.capability", &capability, XATTR_CAPS_SZ_2, 0));
					OK(chmod("f", modes[j]));
					printf("%s, mode %o, owner %u:%u\n", user ? "user" : "root", modes[j], owners[k].user,
					       owners[k].group);
					change = changes[i];
					user ? as_user(change_f) : in_child(change_f);
					struct stat st = stat_of("f");
					printf("  mode %o owner %u:%u size %lld, %s\n", st.st_mode, st.st_uid, st.st_gid, (long long)st.st_size,
					       getxattr("f", "security.capability", 0, 0) > 0 ? "capable" : "not capable");
				}
}

static mode_t mask;

static void create_with_modes(void)
{
	static const mode_t modes[] = { 0, 0644, 0777, 01777, 02755, 02745, 04755, 06777, 07777 };
	umask(mask);
	for (size_t i = 0; i < COUNT(modes); i++) {
		int fd = open("d/file", O_CREAT | O_EXCL | O_RDWR, modes[i]);
		SAY_WHETHER(fd, "create %o umask %o", modes[i], mask);
		SAY(mkdir("d/dir", modes[i]), "mkdir");
		SAY(mknod("d/fifo", S_IFIFO | modes[i], 0), "mkfifo");
		SAY(mknod("d/node", S_IFREG | modes[i], 0), "mknod");
		SAY(mknod("d/device", S_IFCHR | modes[i], makedev(1, 3)), "mknod of a device");
		SAY(symlink("x", "d/link"), "symlink");
		int nameless = open("d", O_TMPFILE | O_RDWR, modes[i]);
		SAY_WHETHER(nameless, "O_TMPFILE");
		static const char *const made[] = { "d/file", "d/dir", "d/fifo", "d/node", "d/device", "d/link" };
		struct stat st;
		for (size_t j = 0; j < COUNT(made) + 1; j++) {
			if ((j < COUNT(made) ? lstat(made[j], &st) : fstat(nameless, &st)) == -1)
				continue;
			printf("  %o %u:%u\n", st.st_mode, st.st_uid, st.st_gid);
			if (j < COUNT(made) && unlink(made[j]) == -1)
				OK(rmdir(made[j]));
		}
		SAY_WHETHER(write(fd, "text", 4), "write");
		SAY(fchmod(fd, modes[i]), "fchmod");
		if (fstat(fd, &st) == 0)
			printf("  %o\n", st.st_mode);
	}
}

static const struct acl_entries {
	uint32_t version;
	struct {
		uint16_t tag, permissions;
		uint32_t id;
	} entry[5];
} default_acl = { 2, { { 1, 7, -1 }, { 2, 6, USER }, { 4, 5, -1 }, { 16, 7, -1 }, { 32, 1, -1 } } };

/* The owner, group and mode of whatever is created, by umask, set-group-ID directory and default list. */
static void answers_about_new_inodes(void)
{
	static const mode_t masks[] = { 0, 022, 077, 0777 }, dirs[] = { 0777, 02777, 03777 };
	for (size_t i = 0; i < COUNT(dirs); i++)
		for (int list = 0; list < 2; list++)
			for (size_t j = 0; j < COUNT(masks); j++) {
				OK(mkdir("d", 0777));
				OK(chown("d", 0, i == 1 ? 0 : SECOND_GROUP));
				OK(chmod("d", dirs[i]));
				if (list)
					SAY(setxattr("d", "system.posix_acl_default", &default_acl, sizeof default_acl, 0), "default list");
				mask = masks[j];
				in_child(create_with_modes);
				as_user(create_with_modes);
				OK(rmdir("d"));
			}
}

static void say_names(const char *path)
{
	char list[8192];
	ssize_t len = llistxattr(path, list, sizeof list);
	if (len == -1) {
		printf("  names: %s\n", strerrorname_np(errno));
		return;
	}
	/* the order is the file system's own */
	int found = 0;
	size_t bytes = 0;
	for (char *at = list; at < list + len; at += strlen(at) + 1)
		if (strncmp(at, "security.selinux", 16))
			found++, bytes += strlen(at);
	printf("  %d names of %zu bytes\n", found, bytes);
}

static void set_attributes(void)
{
	static const char *const paths[] = { "file", "dir", "link", "fifo", "device", "sticky", "closed", "list" };
	static const char *const names[] = { "user.a", "user.", "user", "", "trusted.a", "trusted.", "security.a", "security.", "security.capability",
		"system.a", "system.posix_acl_access", "system.posix_acl_default", "unknown.a", ".", "user.a/b", "USER.a" };
	static const size_t lens[] = { 0, 1, 20 };
	char value[64];
	for (size_t i = 0; i < COUNT(paths); i++) {
		for (size_t j = 0; j < COUNT(names); j++) {
			for (size_t k = 0; k < COUNT(lens); k++)
				SAY(lsetxattr(paths[i], names[j], (size_t)lens[k] == 20 ? (const char *)&capability : "v", lens[k], 0),
				    "set %s %s %zu", paths[i], names[j], lens[k]);
			SAY(lsetxattr(paths[i], names[j], "v", 1, XATTR_CREATE), "  create");
			SAY(lsetxattr(paths[i], names[j], "v", 1, XATTR_REPLACE), "  replace");
			SAY(lsetxattr(paths[i], names[j], "v", 1, XATTR_CREATE | XATTR_REPLACE), "  both");
			SAY(lsetxattr(paths[i], names[j], "v", 1, 4), "  an unknown flag");
			SAY(lgetxattr(paths[i], names[j], 0, 0), "  size");
			SAY(lgetxattr(paths[i], names[j], value, 1), "  get 1");
			SAY(lgetxattr(paths[i], names[j], value, sizeof value), "  get");
		}
		say_names(paths[i]);
		for (size_t j = 0; j < COUNT(names); j++)
			SAY(lremovexattr(paths[i], names[j]), "remove %s %s", paths[i], names[j]);
		say_names(paths[i]);
	}
}

static void answers_about_attributes(void)
{
	close(create_file("file", ""));
	OK(chmod("file", 0666));
	OK(mkdir("dir", 0777));
	OK(chmod("dir", 0777));
	OK(symlink("file", "link"));
	OK(mkfifo("fifo", 0666));
	OK(mknod("device", S_IFCHR | 0666, makedev(1, 3)));
	OK(mkdir("sticky", 0777));
	OK(chmod("sticky", 01777));
	close(create_file("closed", ""));
	OK(chmod("closed", 0600));
	close(create_file("list", ""));
	OK(chown("list", USER, GROUP));
	in_child(set_attributes);
	OK(setxattr("closed", "user.hidden", "v", 1, 0));
	as_user(set_attributes);
	/* lengths of names and values */
	char name[300] = "user.", *value = calloc(1, 70000);
	static const size_t lens[] = { 1, 249, 250, 251, 260 }, sizes[] = { 4000, 4096, 65535, 65536, 65537, 70000 };
	for (size_t i = 0; i < COUNT(lens); i++) {
		memset(name + 5, 'n', lens[i]);
		name[5 + lens[i]] = 0;
		SAY(setxattr("dir", name, "v", 1, 0), "set a name of %zu", lens[i] + 5);
		SAY(getxattr("dir", name, 0, 0), "  get");
		SAY(removexattr("dir", name), "  remove");
	}
	for (size_t i = 0; i < COUNT(sizes); i++) {
		SAY(setxattr("dir", "user.large", value, sizes[i], 0), "set a value of %zu", sizes[i]);
		SAY(getxattr("dir", "user.large", value, 70000), "  get");
		SAY(getxattr("dir", "user.large", value, sizes[i] - 1), "  get less");
	}
	int i;
	for (i = 0; i < 3000; i++) {
		snprintf(name, sizeof name, "user.number.%d", i);
		if (setxattr("file", name, value, 10, 0) == -1)
			break;
	}
	printf("%s attributes fit\n", i > 50 ? "many" : "few");
}

/* Lists: what is refused, and what the mode becomes. */
static void set_lists(void)
{
	struct acl_entries list;
	static const char *const names[] = { "system.posix_acl_access", "system.posix_acl_default" };
	static const char *const paths[] = { "file", "dir", "own", "link", "fifo" };
	for (size_t i = 0; i < COUNT(paths); i++)
		for (size_t j = 0; j < COUNT(names); j++)
			for (int wrong = 0; wrong < 12; wrong++) {
				list = default_acl;
				size_t len = sizeof list;
				switch (wrong) {
				case 1: list.version = 1; break;
				case 2: len = 0; break;
				case 3: len = 4; break;
				case 4: len -= 8; break;
				case 5: len -= 3; break;
				case 6: list.entry[0].permissions = 8; break;
				case 7: list.entry[0].tag = 3; break;
				case 8: list.entry[1] = list.entry[2]; break;
				case 9: list.entry[3] = list.entry[4]; break;
				case 10: list.entry[1].id = -1; break;
				case 11: list.entry[1].permissions = 0, list.entry[3].permissions = 4; break;
				}
				SAY(lsetxattr(paths[i], names[j], &list, len, 0), "list %s %s %d", paths[i], names[j], wrong);
				struct stat st = stat_of(paths[i]);
				ssize_t got = lgetxattr(paths[i], names[j], &list, sizeof list);
				printf("  mode %o, list of %zd, mask %x\n", st.st_mode, got, got == sizeof list ? list.entry[3].permissions : 0);
				SAY(chmod(paths[i], 02751), "  chmod");
				got = lgetxattr(paths[i], names[j], &list, sizeof list);
				printf("  mode %o, mask %x\n", stat_of(paths[i]).st_mode, got == sizeof list ? list.entry[3].permissions : 0);
				SAY(lremovexattr(paths[i], names[j]), "  remove");
				printf("  mode %o\n", stat_of(paths[i]).st_mode);
			}
}

static void answers_about_lists(void)
{
	close(create_file("file", ""));
	OK(mkdir("dir", 0755));
	close(create_file("own", ""));
	OK(chown("own", USER, SECOND_GROUP));
	OK(symlink("file", "link"));
	OK(mkfifo("fifo", 0644));
	in_child(set_lists);
	as_user(set_lists);
	OK(chown("own", USER, 0));
	as_user(set_lists);
}

/* What is told to who watches a directory. */
static void answers_about_watches(void)
{
	char buffer[4096] __attribute__((aligned(8)));
	OK(mkdir("d", 0755));
	int watch = OK(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
	OK(inotify_add_watch(watch, "d", IN_ALL_EVENTS));
	for (int step = 0; step < 14; step++) {
		switch (step) {
		case 0: close(create_file("d/f", "text")); break;
		case 1: OK(chmod("d/f", 0600)); break;
		case 2: OK(setxattr("d/f", "user.a", "1", 1, 0)); break;
		case 3: OK(truncate("d/f", 1)); break;
		case 4: OK(rename("d/f", "d/g")); break;
		case 5: OK(link("d/g", "d/h")); break;
		case 6: OK(unlink("d/g")); break;
		case 7: OK(mkdir("d/sub", 0755)); break;
		case 8: OK(rmdir("d/sub")); break;
		case 9: OK(symlink("x", "d/s")); break;
		case 10: expect_content("d/h", "t", 1); break;
		case 11: OK(utimensat(AT_FDCWD, "d/h", NULL, 0)); break;
		case 12: OK(fallocate(OK(open("d/h", O_WRONLY)), 0, 0, 100)); break;
		case 13: OK(copy_file_range(OK(open("d/h", O_RDONLY)), NULL, OK(open("d/c", O_CREAT | O_WRONLY, 0644)), NULL, 50, 0)); break;
		}
		ssize_t n = read(watch, buffer, sizeof buffer);
		printf("step %d\n", step);
		for (ssize_t at = 0; at < n;) {
			struct inotify_event *event = (struct inotify_event *)(buffer + at);
			printf("  %x %s\n", event->mask, event->len ? event->name : "");
			at += sizeof *event + event->len;
		}
	}
}

static void say_statx(const char *path, int flags)
{
	struct statx st;
	if (SAY(statx(AT_FDCWD, path, flags, STATX_ALL, &st), "statx %s", path) == -1)
		return;
	/* a file system may tell more of itself than a driver passes on, and a driver may not know when it must not ask */
	printf("  mask %x mode %o links %u owner %u:%u size %llu device %u:%u\n", st.stx_mask & STATX_BASIC_STATS, st.stx_mode, st.stx_nlink,
	       st.stx_uid, st.stx_gid, S_ISDIR(st.stx_mode) ? 0 : (unsigned long long)st.stx_size, st.stx_rdev_major, st.stx_rdev_minor);
	if (!(flags & AT_STATX_DONT_SYNC))
		printf("  birth %d\n", st.stx_mask & STATX_BTIME && st.stx_btime.tv_sec > 1000000);
}

static void answers_of_statx(void)
{
	static const char *const paths[] = { "file", "dir", "link", "fifo", "block", "missing", "" };
	static const int flags[] = { 0, AT_SYMLINK_NOFOLLOW, AT_STATX_FORCE_SYNC, AT_STATX_DONT_SYNC, AT_STATX_FORCE_SYNC | AT_STATX_DONT_SYNC, 1 << 20 };
	close(create_file("file", "text"));
	OK(chown("file", USER, GROUP));
	OK(mkdir("dir", 0711));
	OK(symlink("file", "link"));
	OK(mkfifo("fifo", 0600));
	OK(mknod("block", S_IFBLK | 0600, makedev(259, 70000)));
	for (size_t i = 0; i < COUNT(paths); i++)
		for (size_t j = 0; j < COUNT(flags); j++)
			say_statx(paths[i], flags[j]);
}

/* Which times each operation changes, of what it works on and of the directories; older than all of them before. */
static void say_changed(const char *path, const char *name)
{
	struct stat st;
	if (stat(path, &st) == 0)
		printf("  %s:%s%s\n", name, st.st_mtim.tv_sec > 1000000 ? " mtime" : "", st.st_ctim.tv_sec > 1000000 ? " ctime" : "");
}

static void answers_about_changed_times(void)
{
	static const struct timespec old[2] = { { 1000, 0 }, { 1000, 0 } };
	static const char *const watched[] = { "a", "b", "a/f", "b/g", "a/sub", "b/moved" };
	char page[10] = "new text";
	for (int step = 0; step < 26; step++) {
		OK(mkdir("a", 0755));
		OK(mkdir("b", 0755));
		OK(mkdir("a/sub", 0755));
		close(create_file("a/f", "text"));
		close(create_file("b/g", "text"));
		int fd = OK(open("a/f", O_RDWR));
		OK(fsync(fd));
		for (size_t i = 0; i < COUNT(watched); i++)
			utimensat(AT_FDCWD, watched[i], old, 0);
		switch (step) {
		case 0: OK(pwrite(fd, page, 8, 0)); break;
		case 1: OK(pwrite(fd, page, 0, 0)); break;
		case 2: OK(ftruncate(fd, 2)); break;
		case 3: OK(ftruncate(fd, 4)); break;
		case 4: OK(truncate("a/f", 5)); break;
		case 5: close(OK(open("a/f", O_WRONLY | O_TRUNC))); break;
		case 6: close(OK(open("a/f", O_WRONLY | O_CREAT, 0600))); break;
		case 7: OK(fallocate(fd, 0, 0, 100)); break;
		case 8: OK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 100)); break;
		case 9: OK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2)); break;
		case 10: OK(link("a/f", "b/h")); break;
		case 11: OK(rename("a/f", "b/g")); break;
		case 12: OK(rename("a/sub", "b/moved")); break;
		case 13: OK(unlink("a/f")); break;
		case 14: OK(rmdir("a/sub")); break;
		case 15: OK(symlink("x", "a/link")); break;
		case 16: OK(mkfifo("a/fifo", 0600)); break;
		case 17: OK(mkdir("a/sub/new", 0755)); break;
		case 18: OK(chmod("a/f", 0600)); break;
		case 19: OK(chown("a/f", 1, 1)); break;
		case 20: OK(setxattr("a/f", "user.a", "1", 1, 0)); break;
		case 21: OK(renameat2(AT_FDCWD, "a/f", AT_FDCWD, "b/g", RENAME_EXCHANGE)); break;
		case 22: OK(copy_file_range(OK(open("b/g", O_RDONLY)), NULL, fd, NULL, 4, 0)); break;
		case 23: OK(pread(fd, page, 4, 0)); break;
		case 24: OK(setxattr("a", "system.posix_acl_default", &default_acl, sizeof default_acl, 0)); break;
		case 25: OK(close(OK(open("a", O_TMPFILE | O_RDWR, 0600)))); break;
		}
		printf("step %d\n", step);
		for (size_t i = 0; i < COUNT(watched); i++)
			say_changed(watched[i], watched[i]);
		close(fd);
		remove_all();
	}
}

const struct check right_checks[] = {
	{ "answers about set-id bits and capabilities", answers_about_set_ids },
	{ "answers about new inodes", answers_about_new_inodes },
	{ "answers about attributes", answers_about_attributes },
	{ "answers about access control lists", answers_about_lists },
	{ "answers about watches", answers_about_watches },
	{ "answers of statx", answers_of_statx },
	{ "answers about changed times", answers_about_changed_times },
	{ 0 },
};
