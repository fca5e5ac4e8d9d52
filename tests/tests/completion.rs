//! Command lines completed by real shells, with the scripts that `ferry completion` prints.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, binary, need};
use std::path::Path;
use std::process::Command;

/// Says what bash would offer for the words in `$@`, the last being typed.
const BASH: &str = r#"
source <("$FERRY" completion bash)
compopt() { echo :files; }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_ferry
printf '%s\n' "${COMPREPLY[@]}"
"#;

/// The same of zsh, whose own functions are there only while a line is edited.
const ZSH: &str = r#"
compdef() { registered=("$@") }
_files() { echo :files }
_describe() { print -l -- ${(P)2%%:*} }
source <("$FERRY" completion zsh)
[[ $registered[1] == _ferry ]] || exit 1
words=("$@") CURRENT=$#
_ferry
"#;

const FISH: &str = "
$FERRY completion fish | source
complete --do-complete (string join ' ' -- $argv)
";

#[derive(Clone, Copy, Debug)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Shell {
    /// The candidates for a line that ends where the last word is typed.
    fn complete(self, line: &str) -> Result<Vec<String>> {
        let ferry = binary("ferry")?;
        let (program, options, script): (_, &[&str], _) = match self {
            Shell::Bash => ("bash", &["--norc", "-c"], BASH),
            Shell::Zsh => ("zsh", &["-f", "-c"], ZSH),
            Shell::Fish => ("fish", &["--no-config", "-c"], FISH),
        };
        let mut command = Command::new(program);
        command.args(options).arg(script);
        match self {
            Shell::Bash | Shell::Zsh => command.arg(program),
            Shell::Fish => command.arg("--"),
        };
        let output = command
            .args(line.split(' '))
            .env("FERRY", ferry)
            .output()
            .with_context(|| format!("run {program}"))?;
        let err = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && err.is_empty(),
            "{program}: {line:?}: {err}"
        );
        let out = String::from_utf8(output.stdout)?;
        let word = |line: &str| line.split('\t').next().unwrap_or_default().to_owned();
        Ok(out
            .lines()
            .map(word)
            .filter(|word| !word.is_empty())
            .collect())
    }

    fn offers(self, line: &str, expected: &[&str]) -> Result<()> {
        let mut found = self.complete(line)?;
        found.sort();
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        ensure!(found == expected, "{self:?}: {line:?}: {found:?}");
        Ok(())
    }
}

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn shells_are_there() -> Result<()> {
    for name in ["bash", "zsh", "fish"] {
        let found = Command::new(name).arg("--version").output();
        found.with_context(|| format!("{name} is not installed"))?;
    }
    binary("ferry").map(drop)
}

#[test]
fn shells_offer_commands_methods_options_and_listed_values() {
    need!(shells_are_there());
    let cases: &[(&str, &[&str])] = &[
        ("ferry comp", &["completion"]),
        ("ferry completion ", &["bash", "zsh", "fish"]),
        ("ferry top --sor", &["--sort"]),
        ("ferry top --sort i", &["iops"]),
        ("ferry top --sort=b", &["bytes"]),
        (
            "ferry rpc virtio_fs_device_st",
            &["virtio_fs_device_start", "virtio_fs_device_stop"],
        ),
        (
            "spdk_rpc.py -v --plugin x virtio_fs_get_tr",
            &["virtio_fs_get_transports"],
        ),
        ("ferry rpc --dry", &["--dry-run"]),
        ("ferry rpc --verbose ", &["ERROR", "INFO", "DEBUG"]),
        (
            "ferry rpc virtio_fs_device_create --num",
            &["--num-request-queues"],
        ),
        (
            "ferry rpc virtio_fs_transport_start -t ",
            &["DOCA", "VHOST_USER"],
        ),
        ("ferry rpc virtio_fs_transport_start D", &["DOCA"]),
        ("ferry rpc log_set_level W", &["WARNING"]),
        ("ferry rpc nosuch ", &[]),
    ];
    for shell in SHELLS {
        for (line, expected) in cases {
            let mut expected = expected.to_vec();
            let attached: Vec<String>;
            // bash has taken the option off already; the others offer the word whole.
            if let (Some((before, _)), false) = (line.split_once('='), matches!(shell, Shell::Bash))
            {
                let option = before.rsplit(' ').next().unwrap_or_default();
                attached = expected
                    .iter()
                    .map(|value| format!("{option}={value}"))
                    .collect();
                expected = attached.iter().map(String::as_str).collect();
            }
            // As bash takes it apart.
            let line = match shell {
                Shell::Bash => line.replace('=', " = "),
                _ => (*line).to_owned(),
            };
            shell.offers(&line, &expected).unwrap();
        }
    }
}

#[test]
fn shells_offer_files_where_files_are_expected() {
    need!(shells_are_there());
    for line in [
        "ferry rpc load_config -j ",
        "ferry rpc fsdev_aio_create a ",
        "ferry rpc -s ",
        "ferry mount ",
    ] {
        Shell::Bash.offers(line, &[":files"]).unwrap();
        Shell::Zsh.offers(line, &[":files"]).unwrap();
    }
    Shell::Fish
        .offers(
            "ferry rpc load_config -j /etc/host.con",
            &["/etc/host.conf"],
        )
        .unwrap();
}

fn names_of_the_service(socket: &Path, vuid: &str) -> Result<()> {
    let socket = socket.display();
    for shell in SHELLS {
        let offers = |line: &str, expected: &[&str]| {
            shell.offers(&format!("ferry rpc -s {socket} {line}"), expected)
        };
        offers("virtio_fs_device_stop --dev-name ", &["vfsdev0"])?;
        offers("virtio_fs_device_create -t DOCA --dev-name ", &[])?;
        offers("virtio_fs_device_modify -d vfsdev0 --fsdev ", &["aio0"])?;
        offers("fsdev_aio_delete ", &["aio0"])?;
        offers("virtio_fs_doca_manager_destroy -m mlx5_", &["mlx5_0"])?;
        let found = shell.complete(&format!(
            "ferry rpc -s {socket} virtio_fs_doca_device_modify --vuid {}",
            &vuid[..4]
        ))?;
        ensure!(
            found.iter().any(|found| found == vuid),
            "{shell:?}: {found:?}"
        );
    }
    Ok(())
}

#[test]
fn shells_offer_the_names_of_what_the_service_has() {
    need!(shells_are_there());
    let service = Service::start().unwrap();
    let export = service.dir().make_dir("export");
    service
        .call(&format!("fsdev_aio_create aio0 {}", export.display()))
        .unwrap();
    service.start_doca_device("vfsdev0", "t", "aio0").unwrap();
    let (vuid, _) = service.first_function().unwrap();
    names_of_the_service(service.rpc_socket(), &vuid).unwrap();
}
