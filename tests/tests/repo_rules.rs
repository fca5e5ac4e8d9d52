//! The repository's own rules, checked like any other behaviour: who may depend on whom, what source files may hold, what lies
//! at the top level, and under which licences the dependencies come.

use anyhow::{Context, Result, ensure};
use ferry_tests::repository;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which of our crates each crate may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("ferry-shared", &[]),
    ("ferry-ffi", &["ferry-shared"]),
    ("ferry-dataplane", &["ferry-shared", "ferry-ffi"]),
    ("ferry-controlplane", &["ferry-shared"]),
    (
        "ferry-tools",
        &[
            "ferry-shared",
            "ferry-ffi",
            "ferry-dataplane",
            "ferry-controlplane",
        ],
    ),
    (
        "ferry-fuzz",
        &[
            "ferry-shared",
            "ferry-ffi",
            "ferry-dataplane",
            "ferry-controlplane",
            "ferry-tools",
        ],
    ),
    (
        "ferry-tests",
        &[
            "ferry-shared",
            "ferry-ffi",
            "ferry-dataplane",
            "ferry-controlplane",
            "ferry-tools",
            "ferry-fuzz",
        ],
    ),
];

const TOP_LEVEL: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "clippy.toml",
    "controlplane",
    "dataplane",
    "ffi",
    "fuzz",
    "rustfmt.toml",
    "shared",
    "tests",
    "tools",
];

const MOST_CODE_LINES: usize = 600;

/// Files that are longer than a file should be, and why.
const LONGER: &[(&str, &str)] = &[(
    "dataplane/src/fuse/abi.rs",
    "one struct after another, as in the kernel's header",
)];

/// Licences that a dependency may have.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .current_dir(repository())
        .output()
        .with_context(|| format!("run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {args:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn metadata(more: &[&str]) -> Result<Value> {
    let args = [
        &["metadata", "--format-version", "1", "--offline", "--locked"],
        more,
    ]
    .concat();
    Ok(serde_json::from_str(&run(env!("CARGO"), &args)?)?)
}

/// The files of the repository: those under version control, or not yet but not ignored either.
fn files() -> Vec<PathBuf> {
    let list = run(
        "git",
        &["ls-files", "--cached", "--others", "--exclude-standard"],
    )
    .unwrap();
    list.lines()
        .map(PathBuf::from)
        .filter(|path| repository().join(path).is_file())
        .collect()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(repository().join(path)).unwrap()).into_owned()
}

fn sources() -> Vec<(PathBuf, String)> {
    let rust = files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    rust.map(|path| (path.clone(), read(&path))).collect()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Fails with all that is wrong at once.
fn none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn crates_depend_only_on_those_below_them() {
    let metadata = metadata(&["--no-deps"]).unwrap();
    for package in array(&metadata["packages"]) {
        let name = package["name"].as_str().unwrap();
        let Some((_, allowed)) = MAY_USE.iter().find(|(known, _)| *known == name) else {
            panic!("crate {name} has no place in the order of crates; add it to MAY_USE");
        };
        for dependency in array(&package["dependencies"]) {
            let on = dependency["name"].as_str().unwrap();
            let ours = on.starts_with("ferry-");
            assert!(
                !ours || allowed.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    let metadata = metadata(&["--no-deps"]).unwrap();
    for package in array(&metadata["packages"]) {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{} does not take the workspace's lints",
            package["name"]
        );
    }
}

#[test]
fn nothing_new_lies_at_the_top_level() {
    let top: BTreeSet<String> = files()
        .iter()
        .filter_map(|path| {
            path.iter()
                .next()
                .map(|part| part.to_string_lossy().into_owned())
        })
        .collect();
    for entry in top {
        assert!(
            entry.starts_with('.') || TOP_LEVEL.contains(&entry.as_str()),
            "{entry} does not belong at the top level"
        );
    }
}

/// Lines that are neither blank nor only a comment.
fn code_lines(text: &str) -> usize {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

fn is_test_file(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "tests.rs")
        || path.iter().any(|part| part == "tests")
}

#[test]
fn source_files_are_short_enough_to_read() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = code_lines(&text);
        let exempt =
            is_test_file(&path) || LONGER.iter().any(|(known, _)| Path::new(known) == path);
        if lines > MOST_CODE_LINES && !exempt {
            wrong.push(format!(
                "{} has {lines} lines of code, {MOST_CODE_LINES} are enough",
                path.display()
            ));
        }
    }
    none(&wrong);
}

/// The files of the modules that hold this one; an inner attribute of theirs holds here too.
fn enclosing_modules(path: &Path) -> Vec<PathBuf> {
    let mut modules = Vec::new();
    for dir in path
        .ancestors()
        .skip(1)
        .filter(|dir| !dir.as_os_str().is_empty())
    {
        modules.extend([
            dir.join("mod.rs"),
            dir.with_extension("rs"),
            dir.join("lib.rs"),
            dir.join("main.rs"),
        ]);
    }
    modules.retain(|module| repository().join(module).is_file());
    modules
}

/// Whether an attribute expects (or, for generated code, allows) unsafe code and gives its reason.
fn opts_in(text: &str, attribute: &str) -> bool {
    let dense: String = text.split_whitespace().collect();
    dense
        .split(attribute)
        .skip(1)
        .filter_map(|rest| rest.split(")]").next())
        .any(|lints| {
            lints.split(',').any(|lint| lint == "unsafe_code") && lints.contains(",reason=")
        })
}

/// Code without comments and without what stands in strings.
fn has_unsafe_code(text: &str) -> bool {
    let code = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("//"))
        .filter_map(|line| line.split('"').next());
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
    code.into_iter()
        .any(|line| words.iter().any(|word| line.contains(word)))
}

/// What bindgen makes; nothing else may be allowed to be unsafe without saying where it stops being so.
const GENERATED: &str = "ffi/src/lib.rs";

#[test]
fn unsafe_code_is_announced_with_its_reason() {
    let (expect, allow) = ("expect(", ["al", "low("].concat());
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path != Path::new(GENERATED) && opts_in(&text, &allow) {
            wrong.push(format!(
                "{} allows unsafe code instead of expecting it",
                path.display()
            ));
        }
        // the proof that the request path needs no std is a crate of its own, outside the workspace's lints
        if !has_unsafe_code(&text) || path.starts_with("tests/no_std") {
            continue;
        }
        if !opts_in(&text, expect)
            && !enclosing_modules(&path)
                .iter()
                .any(|module| opts_in(&read(module), expect))
        {
            wrong.push(format!(
                "{} has unsafe code without #![expect(unsafe_code, reason = ...)]",
                path.display()
            ));
        }
        if !text.contains("SAFETY:") {
            wrong.push(format!(
                "{} has unsafe code without a word on why it is sound",
                path.display()
            ));
        }
    }
    none(&wrong);
}

/// Words that have no place in the tree, spelled so that this file does not hold them.
fn forbidden_words() -> Vec<String> {
    let halves = [
        ("TO", "DO"),
        ("FIX", "ME"),
        ("unimpl", "emented!"),
        ("to", "do!("),
        ("db", "g!("),
        ("thread::", "sleep"),
        ("/wo", "rk/"),
        ("deb.", "debian.org"),
        ("crates", ".io"),
        ("index.", "crates"),
    ];
    halves
        .iter()
        .map(|(left, right)| format!("{left}{right}"))
        .collect()
}

#[test]
fn no_file_holds_a_forbidden_word() {
    let words = forbidden_words();
    let text_files = files().into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default();
        name != "Cargo.lock"
            && name != "LICENSE"
            && !path.iter().any(|part| part == "corpus" || part == "seeds")
    });
    for path in text_files {
        let text = read(&path);
        for (number, line) in text.lines().enumerate() {
            for word in &words {
                assert!(
                    !line.contains(word.as_str()),
                    "{}:{}: {word}",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

/// Whether a licence expression can be met by the licences that we take.
fn licence_is_fine(expression: &str) -> bool {
    expression.replace('/', " OR ").split(" AND ").all(|part| {
        part.split(" OR ")
            .any(|licence| LICENCES.contains(&licence.trim().trim_matches(['(', ')'])))
    })
}

#[test]
fn dependencies_have_licences_that_fit() {
    let version = run("rustc", &["-vV"]).unwrap();
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .unwrap();
    let metadata = metadata(&["--filter-platform", host]).unwrap();
    for package in array(&metadata["packages"]) {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(
            licence_is_fine(licence),
            "{} comes under {licence}",
            package["name"]
        );
    }
}

#[test]
fn licence_expressions_are_understood() {
    for fine in [
        "MIT",
        "MIT OR GPL-3.0",
        "Apache-2.0 WITH LLVM-exception OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR X) AND Unicode-3.0",
    ] {
        assert!(licence_is_fine(fine), "{fine}");
    }
    for bad in [
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "none",
        "(GPL-2.0 OR GPL-3.0) AND MIT",
    ] {
        assert!(!licence_is_fine(bad), "{bad}");
    }
}
