/* Checks of what else a kernel does with a mount: read-only and bind mounts, layers, leases, watches, many files at once. */
#include "checks.h"

#include <dirent.h>
#include <linux/fs.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/quota.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

/* From here on this process has mounts of its own. */
static void own_mounts(void)
{
	if (unshare(CLONE_NEWNS) == -1)
		skip("this kernel has no mount name spaces");
	OK(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
}

static void bind(const char *from, const char *to, unsigned long flags)
{
	OK(mount(from, to, NULL, MS_BIND, NULL));
	OK(mount(NULL, to, NULL, MS_BIND | MS_REMOUNT | flags, NULL));
}

static void read_only_mount(void)
{
	char byte;
	own_mounts();
	OK(mkdir("d", 0755));
	OK(mkdir("at", 0755));
	close(create_file("d/f", "text"));
	OK(mkdir("d/dir", 0755));
	OK(mknod("d/null", S_IFCHR | 0666, makedev(1, 3)));
	OK(mkfifo("d/fifo", 0644));
	bind("d", "at", MS_RDONLY);
	OK(chdir("at"));
	FAILS(EROFS, open("f", O_RDWR));
	FAILS(EROFS, open("new", O_CREAT | O_WRONLY, 0644));
	FAILS(EEXIST, mkdir("dir", 0755));
	FAILS(EEXIST, mknod("null", S_IFREG, 0));
	FAILS(EEXIST, symlink("x", "f"));
	FAILS(EROFS, mkdir("new", 0755));
	FAILS(EROFS, rmdir("dir"));
	FAILS(EROFS, unlink("f"));
	FAILS(EROFS, rename("f", "g"));
	FAILS(EROFS, link("f", "g"));
	FAILS(EROFS, truncate("f", 0));
	FAILS(EROFS, chmod("f", 0600));
	FAILS(EROFS, chown("f", 1, 1));
	FAILS(EROFS, utimensat(AT_FDCWD, "f", NULL, 0));
	FAILS(EROFS, setxattr("f", "user.a", "1", 1, 0));
	FAILS(EROFS, access("f", W_OK));
	int fd = OK(open("f", O_RDONLY)), device = OK(open("null", O_WRONLY));
	EQUAL(write(device, "x", 1), 1); /* devices are not the file system's */
	close(OK(open("fifo", O_RDWR)));
	EQUAL(pread(fd, &byte, 1, 0), 1);
	OK(flock(fd, LOCK_EX));
	OK(fsync(fd));
	FAILS(EXDEV, rename("../d/f", "f"));
	/* what is open for writing keeps a mount from becoming read-only */
	OK(mount(NULL, ".", NULL, MS_BIND | MS_REMOUNT, NULL));
	OK(chdir("../at"));
	FAILS(EXDEV, link("../d/f", "g"));
	int writer = OK(open("f", O_RDWR));
	FAILS(EBUSY, mount(NULL, "../at", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL));
	close(writer);
	OK(mount(NULL, "../at", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL));
}

static void run_in_mount(void)
{
	execl("at/script", "script", (char *)NULL);
	REQUIRE(errno == EACCES, "a program on a noexec mount: %s", strerror(errno));
}

static void restricted_mounts(void)
{
	own_mounts();
	OK(mkdir("d", 0755));
	OK(mkdir("at", 0755));
	close(create_file("d/script", "#!/bin/sh\n"));
	OK(chmod("d/script", 0755));
	OK(mknod("d/null", S_IFCHR | 0666, makedev(1, 3)));
	OK(symlink("script", "d/link"));
	bind("d", "at", MS_NOEXEC | MS_NODEV | MS_NOSUID);
	in_child(run_in_mount);
	FAILS(EACCES, open("at/null", O_RDONLY));
	int fd = OK(open("at/script", O_RDONLY));
	FAILS(EPERM, mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0));
	struct statvfs fs;
	OK(statvfs("at", &fs));
	EQUAL(fs.f_flag & (ST_NOEXEC | ST_NODEV | ST_NOSUID), ST_NOEXEC | ST_NODEV | ST_NOSUID);
	enum { NOSYMFOLLOW = 256 };
	if (mount(NULL, "at", NULL, MS_BIND | MS_REMOUNT | NOSYMFOLLOW, NULL) == 0)
		FAILS(ELOOP, open("at/link", O_RDONLY));
}

static void layers(void)
{
	own_mounts();
	OK(mkdir("lower", 0755));
	OK(mkdir("upper", 0755));
	OK(mkdir("work", 0755));
	OK(mkdir("merged", 0755));
	OK(mkdir("lower/dir", 0755));
	close(create_file("lower/f", "lower"));
	close(create_file("lower/gone", "gone"));
	close(create_file("lower/dir/inner", "inner"));
	if (mount("overlay", "merged", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work") == -1) {
		REQUIRE(errno == ENODEV || errno == EINVAL, "overlay: %s", strerror(errno));
		skip("this kernel lays nothing over this mount");
	}
	expect_content("merged/f", "lower", 5);
	write_all(OK(open("merged/f", O_WRONLY)), "UPPER", 5, 0);
	expect_content("merged/f", "UPPER", 5);
	expect_content("upper/f", "UPPER", 5);
	expect_content("lower/f", "lower", 5);
	OK(unlink("merged/gone"));
	FAILS(ENOENT, open("merged/gone", O_RDONLY));
	REQUIRE(S_ISCHR(stat_of("upper/gone").st_mode), "what was removed has no whiteout");
	OK(unlink("merged/dir/inner"));
	OK(rmdir("merged/dir"));
	OK(mkdir("merged/dir", 0755));
	FAILS(ENOENT, open("merged/dir/inner", O_RDONLY));
	close(create_file("merged/new", "new"));
	OK(rename("merged/new", "merged/newer"));
	expect_content("upper/newer", "new", 3);
	OK(umount2("merged", MNT_DETACH));
}

static volatile sig_atomic_t breaks;

static void on_break(int signal)
{
	(void)signal;
	breaks++;
}

static void break_lease(void)
{
	FAILS(EAGAIN, open("f", O_WRONLY | O_NONBLOCK));
}

static void leases(void)
{
	close(create_file("f", "text"));
	int fd = OK(open("f", O_RDONLY));
	signal(SIGIO, on_break);
	if (fcntl(fd, F_SETLEASE, F_RDLCK) == -1) {
		REQUIRE(errno == EINVAL || errno == EAGAIN, "F_SETLEASE: %s", strerror(errno));
		skip("the file system has no leases");
	}
	EQUAL(fcntl(fd, F_GETLEASE), F_RDLCK);
	close(OK(open("f", O_RDONLY)));
	EQUAL(breaks, 0);
	in_child(break_lease);
	EQUAL(breaks, 1);
	OK(fcntl(fd, F_SETLEASE, F_UNLCK));
	EQUAL(fcntl(fd, F_GETLEASE), F_UNLCK);
	close(OK(open("f", O_WRONLY)));
	FAILS(EAGAIN, fcntl(OK(open("f", O_RDWR)), F_SETLEASE, F_RDLCK));
	FAILS(EINVAL, fcntl(OK(open(".", O_RDONLY)), F_SETLEASE, F_RDLCK));
}

static void no_quota(void)
{
	struct stat st = stat_of(".");
	long result = syscall(SYS_quotactl_fd, OK(open(".", O_RDONLY)), QCMD(Q_GETFMT, USRQUOTA), 0, &st);
	REQUIRE(result == -1 && (errno == ENOSYS || errno == ESRCH || errno == ENOTBLK), "quotactl_fd: %s", strerror(errno));
	FAILS(EINVAL, mount(NULL, ".", NULL, MS_REMOUNT, NULL)); /* no mount point */
}

static void many_unlinked_files(void)
{
	enum { MANY = 3000 };
	struct rlimit limit = { MANY + 100, MANY + 100 };
	OK(setrlimit(RLIMIT_NOFILE, &limit));
	static int fds[MANY];
	for (int i = 0; i < MANY; i++) {
		if (i % 2) {
			fds[i] = open(".", O_TMPFILE | O_RDWR, 0600);
			if (fds[i] == -1 && errno == EOPNOTSUPP)
				skip("this kernel's FUSE has no O_TMPFILE");
			OK(fds[i]);
		} else {
			fds[i] = create_file("f", "");
			OK(unlink("f"));
		}
		write_all(fds[i], &i, sizeof i, 0);
	}
	for (int i = 0; i < MANY; i++) {
		int seen;
		EQUAL(pread(fds[i], &seen, sizeof seen, 0), (ssize_t)sizeof seen);
		EQUAL(seen, i);
		close(fds[i]);
	}
}

static void thousands_of_links(void)
{
	enum { MANY = 3000 };
	char name[32];
	close(create_file("f", "linked"));
	OK(mkdir("d", 0755));
	for (int i = 0; i < MANY; i++) {
		snprintf(name, sizeof name, "d/%d", i);
		OK(link("f", name));
	}
	EQUAL(stat_of("f").st_nlink, MANY + 1);
	expect_content("d/1234", "linked", 6);
	for (int i = 0; i < MANY; i += 2) {
		snprintf(name, sizeof name, "d/%d", i);
		OK(unlink(name));
	}
	EQUAL(stat_of("d/1").st_nlink, MANY / 2 + 1);
	EQUAL(stat_of("f").st_nlink, MANY / 2 + 1);
}

static void working_directory_has_a_name(void)
{
	static char start[8192], path[8192];
	char name[256];
	OK(syscall(SYS_getcwd, start, sizeof start));
	memset(name, 'n', 255);
	name[255] = 0;
	for (int depth = 1; depth < 20; depth++) {
		OK(mkdir(name, 0755));
		OK(chdir(name));
		size_t len = strlen(start) + depth * 256;
		if (len < 4096) {
			EQUAL(syscall(SYS_getcwd, path, sizeof path), len + 1);
			EQUAL(strlen(path), len);
		} else
			FAILS(ENAMETOOLONG, syscall(SYS_getcwd, path, 4096));
	}
	close(create_file("f", "deep"));
	OK(unlink("f"));
	for (int depth = 1; depth < 20; depth++) { /* no path is long enough to remove it later */
		OK(chdir(".."));
		OK(rmdir(name));
	}
	OK(mkdir("one", 0755));
	OK(chdir("one"));
	OK(rename("../one", "../two"));
	OK(syscall(SYS_getcwd, path, sizeof path));
	REQUIRE(!strcmp(path + strlen(path) - 4, "/two"), "the working directory is called %s", path);
	OK(rmdir("../two"));
	FAILS(ENOENT, syscall(SYS_getcwd, path, sizeof path));
	EQUAL(stat_of(".").st_nlink, 0);
}

struct entry {
	uint64_t ino;
	int64_t off;
	unsigned short reclen;
	unsigned char type;
	char name[];
};

/* Each position that the kernel gave leads to what followed it, also in another open directory and after changes. */
static void positions_outlive_their_directory(void)
{
	enum { COUNT = 300 };
	static char buffer[65536] __attribute__((aligned(8))), again[65536] __attribute__((aligned(8)));
	char name[32];
	for (int i = 0; i < COUNT; i++) {
		snprintf(name, sizeof name, "entry-%03d", i);
		close(create_file(name, ""));
	}
	int fd = OK(open(".", O_RDONLY | O_DIRECTORY)), other = OK(open(".", O_RDONLY | O_DIRECTORY));
	long n = OK(syscall(SYS_getdents64, fd, buffer, sizeof buffer));
	for (long at = 0; at < n;) {
		struct entry *entry = (struct entry *)(buffer + at), *next = (struct entry *)(buffer + at + entry->reclen);
		at += entry->reclen;
		OK(lseek(other, entry->off, SEEK_SET));
		long m = OK(syscall(SYS_getdents64, other, again, sizeof again));
		if (at >= n)
			break;
		REQUIRE(m > 0 && !strcmp(((struct entry *)again)->name, next->name), "behind '%s' comes '%s', expected '%s'", entry->name,
			m > 0 ? ((struct entry *)again)->name : "nothing", next->name);
	}
	/* the end stays the end */
	while (OK(syscall(SYS_getdents64, fd, buffer, sizeof buffer)) > 0)
		;
	EQUAL(syscall(SYS_getdents64, fd, buffer, sizeof buffer), 0);
}

static void churn(void)
{
	char from[32], to[32];
	for (int round = 0; round < 20; round++)
		for (int i = 0; i < 50; i++) {
			snprintf(from, sizeof from, "d/moving-%d-%d", round, i);
			snprintf(to, sizeof to, "d/moving-%d-%d", round + 1, i);
			if (round == 0)
				close(create_file(from, ""));
			OK(rename(from, to));
		}
}

/* What is there all the time is listed once, whatever happens around it. */
static void lists_are_whole_while_names_change(void)
{
	enum { COUNT = 400 };
	char name[32];
	OK(mkdir("d", 0755));
	for (int i = 0; i < COUNT; i++) {
		snprintf(name, sizeof name, "d/stays-%d", i);
		close(create_file(name, ""));
	}
	pid_t pid = start_child(churn);
	for (int round = 0; round < 10; round++) {
		unsigned char seen[COUNT] = { 0 };
		DIR *dir = opendir("d");
		struct dirent *entry;
		int number, found = 0;
		while ((entry = readdir(dir)))
			if (sscanf(entry->d_name, "stays-%d", &number) == 1) {
				REQUIRE(number >= 0 && number < COUNT && !seen[number], "'%s' is listed twice", entry->d_name);
				seen[number] = 1;
				found++;
			}
		EQUAL(found, COUNT);
		closedir(dir);
	}
	join_child(pid);
}

static void work_in_removed_directory(void)
{
	char buffer[1024] __attribute__((aligned(8)));
	OK(mkdir("d", 0755));
	int fd = OK(open("d", O_RDONLY | O_DIRECTORY));
	OK(rmdir("d"));
	struct stat st;
	OK(fstat(fd, &st));
	EQUAL(st.st_nlink, 0);
	FAILS(ENOENT, openat(fd, "f", O_CREAT | O_WRONLY, 0644));
	FAILS(ENOENT, mkdirat(fd, "d", 0755));
	FAILS(ENOENT, symlinkat("x", fd, "s"));
	FAILS(ENOENT, syscall(SYS_getdents64, fd, buffer, sizeof buffer));
	OK(fchmod(fd, 0700));
	OK(fsync(fd));
}

static void drop_set_ids(void)
{
	long result = chown("f", -1, -1);
	REQUIRE(result == 0 || errno == EPERM, "chown: %s", strerror(errno)); /* allowed or not: it changes nothing */
}

static void strangers_clear_no_set_ids(void)
{
	close(create_file("f", "text"));
	OK(chmod("f", 06755));
	as_user(drop_set_ids);
	EQUAL(mode_of("f"), 06755);
}

const struct check mount_checks[] = {
	{ "read-only mount", read_only_mount },
	{ "mounts without programs and devices", restricted_mounts },
	{ "layers of an overlay", layers },
	{ "leases", leases },
	{ "no quota", no_quota },
	{ "many unlinked files", many_unlinked_files },
	{ "thousands of links", thousands_of_links },
	{ "the working directory has a name", working_directory_has_a_name },
	{ "positions outlive their directory", positions_outlive_their_directory },
	{ "lists are whole while names change", lists_are_whole_while_names_change },
	{ "work in a removed directory", work_in_removed_directory },
	{ "strangers clear no set-id bits", strangers_clear_no_set_ids },
	{ 0 },
};
