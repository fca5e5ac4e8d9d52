//! rsync and tar: a tree with every kind of file, and everything about it, goes there and comes back.

use super::Places;
use crate::outcome::output_of;
use anyhow::{Context, Result, ensure};
use std::ffi::OsStr;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// No directory is from this very second, for rsync leaves a time alone that differs in its fraction only.
const MAKE: &str = r#"
cd "$1"
mkdir -p dir/deep/er empty
for i in $(seq 60); do printf 'file %d\n' $i > dir/file-$i; done
head -c 300000 /dev/zero | tr '\0' 'x' > dir/deep/large
printf start > sparse; truncate -s 5M sparse; printf end >> sparse; fallocate -p -o 65536 -l 1048576 sparse
ln dir/file-1 dir/deep/hard-1; ln dir/file-1 hard-2; ln -s dir/file-2 link; ln -s missing dangling; ln link hard-link
mkfifo -m 620 fifo; mknod -m 640 block b 7 200; mknod -m 606 character c 1 3
chown 1234:4321 dir/file-3; chown -h 77:88 link; chown 1001:1002 dir/deep
chmod 4751 dir/file-4; chmod 2770 dir/deep; chmod 1777 empty; chmod 0 dir/file-5
setfattr -n user.one -v 1 dir/file-6; setfattr -n user.empty dir/file-6; setfattr -n user.dir -v x dir
setfattr -n trusted.two -v 0x0001ff dir/file-7; setfattr -h -n trusted.link -v y dangling
setfacl -m u:1234:rw,g:4321:r,m:rw dir/file-8; setfacl -m u:1234:rwx -m d:u:1234:rx,d:g::- dir/deep/er
touch -d '2001-02-03 04:05:06.123456789' dir/file-9; touch -d '1960-01-01' dir/file-10; touch -h -d '2030-01-01 00:00:00.5' link
touch -d '2010-10-10 10:10:10.987654321' dir/deep; touch -d '2011-11-11 11:11:11.123456789' dir dir/deep/er empty
"#;

/// Everything about each file that both rsync and tar keep: not the time of a device or socket, for example. A file is sparse when it has fewer blocks than its size needs.
const DESCRIBE: &str = r#"
cd "$1"
find . -mindepth 1 ! -type d -printf '%P %y %#m %U:%G %n links %s %l\n' | LC_ALL=C sort
find . -mindepth 1 \( -type f -o -type l \) -printf '%P %T@\n' | LC_ALL=C sort
find . -mindepth 1 -type d -printf '%P %y %#m %U:%G %T@\n' | LC_ALL=C sort
find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
find . -mindepth 1 \( -type b -o -type c \) -exec stat -c '%n %t,%T' {} + | LC_ALL=C sort
find . -mindepth 1 -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m - -e hex --
find . -inum "$(stat -c %i dir/file-1)" | LC_ALL=C sort
[ $(($(stat -c %b sparse) * 512)) -lt 1000000 ] && echo sparse
true
"#;

fn shell(script: &str, argument: &Path) -> Result<String> {
    output_of(
        Command::new("sh")
            .args(["-euc", script, "sh"])
            .arg(argument),
    )
}

fn make_tree(at: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir(&at)?;
    shell(MAKE, &at)?;
    Ok(at)
}

fn run(program: &str, args: &[&OsStr]) -> Result<()> {
    output_of(Command::new(program).args(args)).map(drop)
}

/// Fails with the lines in which two descriptions differ.
fn same(what: &str, from: &str, to: &str) -> Result<()> {
    let missing: Vec<&str> = from
        .lines()
        .filter(|line| !to.lines().any(|l| l == *line))
        .collect();
    let extra: Vec<&str> = to
        .lines()
        .filter(|line| !from.lines().any(|l| l == *line))
        .collect();
    ensure!(
        from == to,
        "{what} is not what it was: {missing:#?} became {extra:#?}"
    );
    Ok(())
}

fn digest(description: &str) -> String {
    format!("{} lines", description.lines().count())
}

pub(super) fn rsync_both_ways(places: &Places<'_>) -> Result<String> {
    let source = make_tree(places.scratch.join("source"))?;
    let _socket = UnixListener::bind(source.join("socket")).context("make a socket")?;
    let before = shell(DESCRIBE, &source)?;
    let (there, back) = (places.dir.join("there"), places.scratch.join("back"));
    for (from, to) in [(&source, &there), (&there, &back)] {
        let mut contents = from.clone().into_os_string();
        contents.push("/");
        run("rsync", &["-aAXHS".as_ref(), &contents, to.as_os_str()])?;
    }
    same("the copy", &before, &shell(DESCRIBE, &there)?)?;
    same("the copy of the copy", &before, &shell(DESCRIBE, &back)?)?;
    // a second run finds nothing to do
    let changes = output_of(
        Command::new("rsync")
            .args(["-aAXHSi", "--checksum"])
            .arg(source.join(""))
            .arg(&there),
    )?;
    ensure!(changes.is_empty(), "rsync finds differences:\n{changes}");
    Ok(digest(&before))
}

/// tar leaves sockets out.
pub(super) fn tar_both_ways(places: &Places<'_>) -> Result<String> {
    const KEEP: [&str; 4] = [
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
    ];
    let tree = make_tree(places.dir.join("tree"))?;
    let before = shell(DESCRIBE, &tree)?;
    let archive = places.dir.join("archive.tar");
    output_of(
        Command::new("tar")
            .args(KEEP)
            .args(["--sparse", "-C"])
            .arg(&tree)
            .arg("-cf")
            .arg(&archive)
            .arg("."),
    )?;
    for to in [places.dir.join("unpacked"), places.scratch.join("unpacked")] {
        std::fs::create_dir(&to)?;
        output_of(
            Command::new("tar")
                .args(KEEP)
                .args(["-p", "-C"])
                .arg(&to)
                .arg("-xf")
                .arg(&archive),
        )?;
        same("what tar unpacked", &before, &shell(DESCRIBE, &to)?)?;
    }
    output_of(
        Command::new("tar")
            .args(KEEP)
            .arg("--compare")
            .arg("-C")
            .arg(&tree)
            .arg("-f")
            .arg(&archive),
    )?;
    Ok(digest(&before))
}
