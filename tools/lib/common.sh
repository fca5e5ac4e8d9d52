# Shared by tools/quickstart and tools/test; sourced, never run. Needs $ROOT, the repository.

say() { printf '\n== %s\n' "$*" >&2; }
die() { echo "${0##*/}: $*" >&2; exit 1; }

# need_command COMMAND PACKAGE / need_file GLOB PACKAGE: note PACKAGE as missing unless the thing is there.
MISSING=()
need_command() { command -v "$1" > /dev/null || MISSING+=("$2"); }
need_file() { compgen -G "$1" > /dev/null || MISSING+=("$2"); }

# Install whatever was noted, from this machine's own apt sources.
install_missing() {
    [ ${#MISSING[@]} -gt 0 ] || return 0
    local packages=("${MISSING[@]}")
    MISSING=()
    command -v apt-get > /dev/null || die "missing: ${packages[*]} (Debian's names); install them and try again"
    [ "$(id -u)" = 0 ] || die "missing: ${packages[*]}; run as root: apt-get install ${packages[*]}"
    say "installing ${packages[*]}"
    apt-get -qq update || die "apt-get update failed; check this machine's apt sources"
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${packages[@]}" > /dev/null ||
        die "apt-get could not install ${packages[*]}"
}

# What every build needs: the generator of the kernel bindings reads C headers with libclang, build scripts link with gcc.
need_build_tools() {
    [ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
    command -v cargo > /dev/null || die "no cargo: install the stable Rust toolchain (rust-version in Cargo.toml) first"
    need_command gcc gcc
    need_file '/usr/include/stdio.h' libc6-dev
    need_file '/usr/include/linux/fuse.h' linux-libc-dev
    need_file '/usr/lib/llvm-*/lib/libclang*.so*' libclang-dev
}
