/* Checks of space: holes, allocation and the figures of the file system. */
#include "checks.h"

#include <linux/falloc.h>
#include <sys/statfs.h>

enum { MIB = 1 << 20 };

static blkcnt_t blocks_of(const char *path)
{
	return stat_of(path).st_blocks;
}

static void holes_are_found(void)
{
	unsigned char page[4096];
	int fd = create_file("f", "");
	fill(page, sizeof page, 0, 1);
	OK(ftruncate(fd, 4 * MIB));
	write_all(fd, page, sizeof page, MIB);
	write_all(fd, page, sizeof page, 3 * MIB);
	OK(fsync(fd));
	EQUAL(lseek(fd, 0, SEEK_DATA), MIB);
	EQUAL(lseek(fd, MIB, SEEK_HOLE), MIB + 4096);
	EQUAL(lseek(fd, MIB + 4096, SEEK_DATA), 3 * MIB);
	EQUAL(lseek(fd, 0, SEEK_HOLE), 0);
	EQUAL(lseek(fd, 3 * MIB, SEEK_HOLE), 3 * MIB + 4096);
	FAILS(ENXIO, lseek(fd, 3 * MIB + 4096, SEEK_DATA));
	FAILS(ENXIO, lseek(fd, 4 * MIB, SEEK_DATA));
	FAILS(ENXIO, lseek(fd, 4 * MIB, SEEK_HOLE));
}

static void sparse_files_take_little_space(void)
{
	int fd = create_file("f", "");
	write_all(fd, "x", 1, 64 * MIB);
	OK(fsync(fd));
	EQUAL(stat_of("f").st_size, 64 * MIB + 1);
	REQUIRE(blocks_of("f") > 0 && blocks_of("f") < 2048, "a file with one byte has %lld blocks", (long long)blocks_of("f"));
}

static void fallocate_grows(void)
{
	int fd = create_file("f", "data");
	OK(fallocate(fd, 0, 0, MIB));
	EQUAL(stat_of("f").st_size, MIB);
	REQUIRE(blocks_of("f") >= MIB / 512, "fallocate reserved %lld blocks", (long long)blocks_of("f"));
	char seen[5];
	EQUAL(pread(fd, seen, 5, 0), 5);
	REQUIRE(!memcmp(seen, "data\0", 5), "fallocate changed the data");
	FAILS(EINVAL, fallocate(fd, 0, 0, 0));
	FAILS(EBADF, fallocate(OK(open("f", O_RDONLY)), 0, 0, MIB));
}

static void fallocate_keep_size(void)
{
	int fd = create_file("f", "data");
	OK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, MIB));
	EQUAL(stat_of("f").st_size, 4);
	REQUIRE(blocks_of("f") >= MIB / 512, "fallocate reserved %lld blocks", (long long)blocks_of("f"));
}

static void punch_hole(void)
{
	unsigned char *data = malloc(MIB);
	int fd = create_file("f", "");
	fill(data, MIB, 0, 2);
	write_all(fd, data, MIB, 0);
	OK(fsync(fd));
	blkcnt_t before = blocks_of("f");
	OK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536 + 10, 524288));
	memset(data + 65536 + 10, 0, 524288);
	expect_content("f", data, MIB);
	OK(fsync(fd));
	REQUIRE(blocks_of("f") < before, "a punched hole gave no space back");
}

static void zero_range(void)
{
	unsigned char *data = malloc(MIB);
	int fd = create_file("f", "");
	fill(data, MIB, 0, 3);
	write_all(fd, data, MIB, 0);
	if (fallocate(fd, FALLOC_FL_ZERO_RANGE, 1000, 100000) && errno == EOPNOTSUPP)
		skip("the file system has no FALLOC_FL_ZERO_RANGE");
	memset(data + 1000, 0, 100000);
	expect_content("f", data, MIB);
	OK(fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, MIB - 10, 100));
	EQUAL(stat_of("f").st_size, MIB);
	OK(fallocate(fd, FALLOC_FL_ZERO_RANGE, MIB - 10, 100));
	EQUAL(stat_of("f").st_size, MIB + 90);
}

static void figures_of_the_file_system(void)
{
	struct statfs by_path, by_fd;
	OK(statfs(".", &by_path));
	OK(fstatfs(OK(open(".", O_RDONLY)), &by_fd));
	REQUIRE(by_path.f_bsize >= 512 && by_path.f_bsize == by_fd.f_bsize, "f_bsize is %ld", (long)by_path.f_bsize);
	REQUIRE(by_path.f_blocks > 0 && by_path.f_bfree <= by_path.f_blocks && by_path.f_bavail <= by_path.f_bfree,
		"blocks %llu, free %llu, available %llu", (unsigned long long)by_path.f_blocks,
		(unsigned long long)by_path.f_bfree, (unsigned long long)by_path.f_bavail);
	EQUAL(by_path.f_namelen, 255);
	struct stat st = stat_of(".");
	REQUIRE(st.st_blksize >= 512, "st_blksize is %ld", (long)st.st_blksize);
}

const struct check space_checks[] = {
	{ "holes are found", holes_are_found },
	{ "sparse files take little space", sparse_files_take_little_space },
	{ "fallocate", fallocate_grows },
	{ "fallocate with KEEP_SIZE", fallocate_keep_size },
	{ "fallocate with PUNCH_HOLE", punch_hole },
	{ "fallocate with ZERO_RANGE", zero_range },
	{ "statfs", figures_of_the_file_system },
	{ 0 },
};
