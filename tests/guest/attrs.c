/* Checks of attributes: modes, owners, times, permission and extended attributes. */
#include "checks.h"

#include <sys/statfs.h>
#include <sys/xattr.h>

static void modes(void)
{
	close(create_file("f", ""));
	OK(mkdir("d", 0755));
	for (int mode = 0; mode < 01000; mode += 037) {
		OK(chmod("f", mode));
		EQUAL(mode_of("f"), mode);
	}
	OK(fchmod(OK(open("d", O_RDONLY)), 0711));
	EQUAL(mode_of("d"), 0711);
	FAILS(ENOENT, chmod("missing", 0644));
}

static void special_mode_bits(void)
{
	close(create_file("f", ""));
	OK(mkdir("d", 0755));
	OK(chmod("f", 06755));
	EQUAL(mode_of("f"), 06755);
	OK(chmod("d", 03777));
	EQUAL(mode_of("d"), 03777);
}

static void write_by_user(void)
{
	int fd = OK(open("f", O_WRONLY));
	EQUAL(write(fd, "x", 1), 1);
	close(fd);
}

static void write_clears_set_user_id(void)
{
	close(create_file("f", "some text"));
	OK(chmod("f", 06777));
	as_user(write_by_user);
	EQUAL(mode_of("f"), 0777);
}

static void owners(void)
{
	close(create_file("f", ""));
	OK(chown("f", USER, GROUP));
	EQUAL(stat_of("f").st_uid, USER);
	EQUAL(stat_of("f").st_gid, GROUP);
	OK(chown("f", -1, 77));
	EQUAL(stat_of("f").st_uid, USER);
	EQUAL(stat_of("f").st_gid, 77);
	OK(chown("f", 4000000000u, -1));
	EQUAL(stat_of("f").st_uid, 4000000000u);
	OK(symlink("f", "s"));
	OK(lchown("s", 5, 6));
	EQUAL(stat_of("s").st_uid, 5);
	EQUAL(stat_of("f").st_uid, 4000000000u);
	OK(chmod("f", 06755));
	OK(chown("f", 0, 0));
	EQUAL(mode_of("f"), 0755);
}

static void change_what_is_not_ours(void)
{
	FAILS(EPERM, chown("f", USER, GROUP));
	FAILS(EPERM, chmod("f", 0777));
	FAILS(EPERM, utimensat(AT_FDCWD, "f", (struct timespec[2]){ { 1, 0 }, { 1, 0 } }, 0));
	FAILS(EPERM, chown("own", 0, -1));
	OK(chown("own", -1, SECOND_GROUP));
	EQUAL(stat_of("own").st_gid, SECOND_GROUP);
	OK(chmod("own", 0640));
}

static void owners_and_other_users(void)
{
	close(create_file("f", ""));
	close(create_file("own", ""));
	OK(chown("own", USER, GROUP));
	as_user(change_what_is_not_ours);
	EQUAL(stat_of("f").st_uid, 0);
}

static void times_to_the_nanosecond(void)
{
	struct timespec times[2] = { { 1000000007, 123456789 }, { 1500000001, 987654321 } };
	close(create_file("f", ""));
	OK(utimensat(AT_FDCWD, "f", times, 0));
	struct stat st = stat_of("f");
	EQUAL(st.st_atim.tv_sec, 1000000007);
	EQUAL(st.st_atim.tv_nsec, 123456789);
	EQUAL(st.st_mtim.tv_sec, 1500000001);
	EQUAL(st.st_mtim.tv_nsec, 987654321);
	OK(futimens(OK(open("f", O_RDONLY)), (struct timespec[2]){ { 5000000000, 1 }, { 5000000000, 2 } }));
	EQUAL(stat_of("f").st_mtim.tv_sec, 5000000000);
	OK(symlink("f", "s"));
	OK(utimensat(AT_FDCWD, "s", times, AT_SYMLINK_NOFOLLOW));
	EQUAL(stat_of("s").st_mtim.tv_sec, 1500000001);
	EQUAL(stat_of("f").st_mtim.tv_sec, 5000000000);
}

static void times_omit_and_now(void)
{
	struct timespec old[2] = { { 1000, 1 }, { 2000, 2 } };
	close(create_file("f", ""));
	OK(utimensat(AT_FDCWD, "f", old, 0));
	OK(utimensat(AT_FDCWD, "f", (struct timespec[2]){ { 0, UTIME_OMIT }, { 3000, 3 } }, 0));
	EQUAL(stat_of("f").st_atim.tv_sec, 1000);
	EQUAL(stat_of("f").st_mtim.tv_sec, 3000);
	OK(utimensat(AT_FDCWD, "f", (struct timespec[2]){ { 0, UTIME_NOW }, { 0, UTIME_OMIT } }, 0));
	REQUIRE(stat_of("f").st_atim.tv_sec > 1000000, "UTIME_NOW did not set the time");
	EQUAL(stat_of("f").st_mtim.tv_sec, 3000);
}

static void times_follow_changes(void)
{
	struct timespec old[2] = { { 1000, 0 }, { 1000, 0 } };
	int fd = create_file("f", "x");
	OK(fsync(fd));
	OK(futimens(fd, old));
	write_all(fd, "y", 1, 0);
	OK(fsync(fd));
	REQUIRE(stat_of("f").st_mtim.tv_sec > 1000, "a write did not change mtime");
	OK(mkdir("d", 0755));
	OK(utimensat(AT_FDCWD, "d", old, 0));
	close(create_file("d/f", ""));
	REQUIRE(stat_of("d").st_mtim.tv_sec > 1000, "a new entry did not change the directory's mtime");
	OK(utimensat(AT_FDCWD, "d", old, 0));
	OK(unlink("d/f"));
	REQUIRE(stat_of("d").st_mtim.tv_sec > 1000, "a removed entry did not change the directory's mtime");
	REQUIRE(stat_of("f").st_ctim.tv_sec > 1000000, "ctime is not the time of the last change");
}

static void birth_time(void)
{
	struct statx first, second;
	int fd = create_file("f", "x");
	OK(statx(AT_FDCWD, "f", 0, STATX_BASIC_STATS | STATX_BTIME, &first));
	if (!(first.stx_mask & STATX_BTIME) && !kernel_at_least(6, 6))
		skip("this kernel's FUSE has no birth time");
	REQUIRE(first.stx_mask & STATX_BTIME, "statx gives no birth time");
	REQUIRE(first.stx_btime.tv_sec > 1000000, "the birth time is %lld", (long long)first.stx_btime.tv_sec);
	OK(futimens(fd, (struct timespec[2]){ { 1000, 0 }, { 1000, 0 } }));
	OK(statx(AT_FDCWD, "f", AT_STATX_FORCE_SYNC, STATX_BASIC_STATS | STATX_BTIME, &second));
	EQUAL(second.stx_btime.tv_sec, first.stx_btime.tv_sec);
	EQUAL(second.stx_btime.tv_nsec, first.stx_btime.tv_nsec);
	EQUAL(second.stx_mtime.tv_sec, 1000);
}

static void try_access(void)
{
	OK(access("readable", R_OK));
	FAILS(EACCES, access("readable", W_OK));
	FAILS(EACCES, access("secret", R_OK));
	FAILS(EACCES, open("secret", O_RDONLY));
	FAILS(EACCES, open("readable", O_WRONLY));
	FAILS(EACCES, open("new", O_CREAT | O_WRONLY, 0644));
	FAILS(EACCES, mkdir("new", 0755));
	FAILS(EACCES, unlink("readable"));
	FAILS(EACCES, rename("readable", "other"));
	FAILS(EACCES, stat("closed/f", &(struct stat){ 0 }));
	OK(access("by-group", R_OK | W_OK));
	OK(access("by-second-group", R_OK | W_OK));
	FAILS(ENOENT, access("missing", F_OK));
	FAILS(EACCES, access("readable", X_OK));
}

static void permission_of_other_users(void)
{
	close(create_file("readable", ""));
	close(create_file("secret", ""));
	OK(chmod("secret", 0600));
	OK(mkdir("closed", 0700));
	close(create_file("closed/f", ""));
	close(create_file("by-group", ""));
	OK(chown("by-group", 0, GROUP));
	OK(chmod("by-group", 0060));
	close(create_file("by-second-group", ""));
	OK(chown("by-second-group", 0, SECOND_GROUP));
	OK(chmod("by-second-group", 0060));
	as_user(try_access);
	FAILS(EACCES, access("readable", X_OK)); /* root too */
}

static void create_as_user(void)
{
	close(create_file("open/f", "mine"));
	OK(mkdir("open/d", 0777));
	OK(symlink("f", "open/s"));
	OK(mkfifo("open/p", 0666));
}

static void new_files_belong_to_their_creator(void)
{
	static const char *const made[] = { "open/f", "open/d", "open/s", "open/p" };
	OK(mkdir("open", 0777));
	OK(chmod("open", 0777));
	as_user(create_as_user);
	for (int i = 0; i < 4; i++) {
		EQUAL(stat_of(made[i]).st_uid, USER);
		EQUAL(stat_of(made[i]).st_gid, GROUP);
	}
}

static void create_by_group(void)
{
	close(create_file("shared/f", "mine"));
	EQUAL(stat_of("shared/f").st_uid, USER);
	OK(mkdir("shared/d", 0755));
	OK(unlink("shared/f"));
}

static void supplementary_groups_count(void)
{
	if (!kernel_at_least(6, 3))
		skip("this kernel's FUSE does not send supplementary groups");
	OK(mkdir("shared", 0770));
	OK(chown("shared", 0, SECOND_GROUP));
	OK(chmod("shared", 0770));
	as_user(create_by_group);
}

static void umask_is_honoured(void)
{
	umask(077);
	close(OK(open("f", O_CREAT | O_WRONLY, 0666)));
	EQUAL(mode_of("f"), 0600);
	OK(mkdir("d", 0777));
	EQUAL(mode_of("d"), 0700);
	OK(mkfifo("p", 0666));
	EQUAL(mode_of("p"), 0600);
	umask(0);
	close(OK(open("g", O_CREAT | O_WRONLY, 0666)));
	EQUAL(mode_of("g"), 0666);
	OK(mkdir("e", 01777));
	EQUAL(mode_of("e"), 01777);
}

static void group_is_inherited(void)
{
	OK(mkdir("d", 0755));
	OK(chown("d", 0, GROUP));
	OK(chmod("d", 02775));
	close(create_file("d/f", ""));
	OK(mkdir("d/sub", 0755));
	EQUAL(stat_of("d/f").st_gid, GROUP);
	EQUAL(stat_of("d/sub").st_gid, GROUP);
	EQUAL(mode_of("d/sub"), 02755);
	EQUAL(mode_of("d/f"), 0644);
}

static void delete_from_sticky(void)
{
	FAILS(EPERM, unlink("d/theirs"));
	FAILS(EPERM, rename("d/theirs", "d/mine"));
	OK(unlink("d/own"));
}

static void sticky_directories_protect(void)
{
	OK(mkdir("d", 0755));
	OK(chmod("d", 01777));
	close(create_file("d/theirs", ""));
	close(create_file("d/own", ""));
	OK(chown("d/own", USER, GROUP));
	as_user(delete_from_sticky);
}

static void require_xattr(void)
{
	close(create_file("f", ""));
	if (setxattr("f", "user.probe", "x", 1, 0) && errno == EOPNOTSUPP)
		skip("the export has no extended attributes");
	OK(removexattr("f", "user.probe"));
}

static void xattr_set_and_get(void)
{
	char value[64];
	require_xattr();
	OK(setxattr("f", "user.one", "first", 5, 0));
	OK(setxattr("f", "user.two", "", 0, 0));
	EQUAL(getxattr("f", "user.one", value, sizeof value), 5);
	REQUIRE(!memcmp(value, "first", 5), "the value changed");
	EQUAL(getxattr("f", "user.two", value, sizeof value), 0);
	OK(setxattr("f", "user.one", "longer value", 12, 0));
	EQUAL(getxattr("f", "user.one", value, sizeof value), 12);
	int fd = OK(open("f", O_RDWR));
	OK(fsetxattr(fd, "user.one", "\0\xff\n", 3, 0));
	EQUAL(fgetxattr(fd, "user.one", value, sizeof value), 3);
	REQUIRE(!memcmp(value, "\0\xff\n", 3), "a binary value changed");
	OK(mkdir("d", 0755));
	OK(setxattr("d", "user.dir", "d", 1, 0));
	EQUAL(getxattr("d", "user.dir", value, sizeof value), 1);
}

static void xattr_flags(void)
{
	require_xattr();
	FAILS(ENODATA, setxattr("f", "user.a", "1", 1, XATTR_REPLACE));
	OK(setxattr("f", "user.a", "1", 1, XATTR_CREATE));
	FAILS(EEXIST, setxattr("f", "user.a", "2", 1, XATTR_CREATE));
	OK(setxattr("f", "user.a", "3", 1, XATTR_REPLACE));
	char value;
	EQUAL(getxattr("f", "user.a", &value, 1), 1);
	EQUAL(value, '3');
}

static void xattr_sizes(void)
{
	char value[16];
	require_xattr();
	OK(setxattr("f", "user.a", "12345678", 8, 0));
	EQUAL(getxattr("f", "user.a", 0, 0), 8);
	FAILS(ERANGE, getxattr("f", "user.a", value, 7));
	EQUAL(getxattr("f", "user.a", value, 8), 8);
	ssize_t need = OK(listxattr("f", 0, 0));
	REQUIRE(need >= 7, "listxattr needs %zd bytes", need);
	FAILS(ERANGE, listxattr("f", value, 3));
}

static void xattr_list_and_remove(void)
{
	char name[32], list[4096];
	require_xattr();
	for (int i = 0; i < 30; i++) {
		snprintf(name, sizeof name, "user.number-%02d", i);
		OK(setxattr("f", name, "v", 1, 0));
	}
	OK(removexattr("f", "user.number-07"));
	FAILS(ENODATA, removexattr("f", "user.number-07"));
	FAILS(ENODATA, getxattr("f", "user.number-07", list, 1));
	ssize_t len = OK(listxattr("f", list, sizeof list));
	int seen = 0;
	for (char *at = list; at < list + len; at += strlen(at) + 1) {
		REQUIRE(strcmp(at, "user.number-07"), "a removed name is still listed");
		seen += !strncmp(at, "user.number-", 12);
	}
	EQUAL(seen, 29);
}

static void xattr_large_value(void)
{
	enum { LARGE = 60 * 1024 };
	static unsigned char value[LARGE], seen[LARGE];
	require_xattr();
	fill(value, LARGE, 0, 1);
	if (setxattr("f", "user.large", value, LARGE, 0) && (errno == ENOSPC || errno == E2BIG))
		skip("the export does not take a value of 60 KiB");
	EQUAL(getxattr("f", "user.large", seen, LARGE), LARGE);
	REQUIRE(!memcmp(value, seen, LARGE), "a value of 60 KiB changed");
}

static void xattr_by_user(void)
{
	char value[8];
	FAILS(EACCES, setxattr("f", "user.a", "1", 1, 0));
	EQUAL(getxattr("f", "user.a", value, sizeof value), 1);
	FAILS(EACCES, getxattr("secret", "user.a", value, sizeof value));
}

static void xattr_permission(void)
{
	require_xattr();
	OK(setxattr("f", "user.a", "1", 1, 0));
	close(create_file("secret", ""));
	OK(setxattr("secret", "user.a", "1", 1, 0));
	OK(chmod("secret", 0600));
	as_user(xattr_by_user);
	OK(symlink("f", "s"));
	FAILS(EPERM, lsetxattr("s", "user.a", "1", 1, 0));
	FAILS(EOPNOTSUPP, setxattr("f", "nonsense", "1", 1, 0));
}

const struct check attr_checks[] = {
	{ "modes", modes },
	{ "set-user-ID, set-group-ID and sticky bits", special_mode_bits },
	{ "a write clears set-user-ID", write_clears_set_user_id },
	{ "owners", owners },
	{ "owners and other users", owners_and_other_users },
	{ "times to the nanosecond", times_to_the_nanosecond },
	{ "times with OMIT and NOW", times_omit_and_now },
	{ "times follow changes", times_follow_changes },
	{ "statx birth time", birth_time },
	{ "permission of other users", permission_of_other_users },
	{ "new files belong to their creator", new_files_belong_to_their_creator },
	{ "supplementary groups count", supplementary_groups_count },
	{ "umask", umask_is_honoured },
	{ "set-group-ID directory inheritance", group_is_inherited },
	{ "sticky directories protect", sticky_directories_protect },
	{ "xattr set and get", xattr_set_and_get },
	{ "xattr CREATE and REPLACE", xattr_flags },
	{ "xattr sizes", xattr_sizes },
	{ "xattr list and remove", xattr_list_and_remove },
	{ "xattr of 60 KiB", xattr_large_value },
	{ "xattr permission", xattr_permission },
	{ 0 },
};
