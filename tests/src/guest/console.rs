//! Guests whose root file system is a virtio-fs tag, driven by what a user types at their console.
//!
//! QEMU's kernel mounts the root itself. User-Mode-Linux has the driver as a module, so `tests/guest/root-init` loads it and
//! mounts the root as the kernel's command line says, as a distribution's initramfs does.

use super::{Guest, Machine, QEMU_KERNEL, only_guests};
use crate::TempDir;
use crate::process::{Process, wait_until};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::io::Write;
use std::process::ChildStdin;
use std::sync::MutexGuard;
use std::time::Duration;

/// What the end of a command looks like on the console; the shell puts it together, so that the echo of it does not match.
const END: &str = "ended with ";

/// The console of a guest that runs.
#[derive(Debug)]
pub struct Console {
    process: Process,
    input: ChildStdin,
    /// Up to here the output has been waited for.
    seen: usize,
    _dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Guest {
    /// The guest's terminal on which a user can log in.
    #[must_use]
    pub fn terminal(&self) -> &'static str {
        match self.machine {
            Machine::Qemu { .. } => "ttyS0",
            Machine::UserMode => "tty0",
        }
    }

    /// Boots from the root file system behind `tag`.
    ///
    /// # Errors
    /// When the guest cannot be started.
    pub fn boot_root(&self, tag: &str) -> Result<Console> {
        let alone = only_guests();
        let dir = TempDir::new();
        let root = format!("root={tag} rootfstype=virtiofs rw");
        let command = match self.machine {
            Machine::Qemu { kernel, processors } => {
                let mut command = self.qemu_command(kernel, processors)?;
                command.arg("-append").arg(format!("{QEMU_KERNEL} {root}"));
                command
            }
            Machine::UserMode => {
                let initramfs = dir.join("initrd");
                self.initramfs("root-init")?.write(&initramfs)?;
                let mut command = self.user_mode_command(&dir)?;
                command
                    .arg("con0=fd:0,fd:1")
                    .arg(format!("initrd={}", initramfs.display()))
                    .args(root.split(' '));
                command
            }
        };
        let (process, input) =
            Process::start_reading(Signal::SIGKILL, &command, &dir.join("console"))?;
        Ok(Console {
            process,
            input,
            seen: 0,
            _dir: dir,
            _alone: alone,
        })
    }
}

impl Console {
    /// Waits for the login prompt, logs in as root, who has no password, and starts a shell that neither edits nor echoes.
    ///
    /// # Errors
    /// When `limit` passes before one of the steps is done.
    pub fn log_in(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("login: ", limit)?;
        self.type_line("root")?;
        self.wait_for("# ", limit)?;
        self.type_line("exec sh")?;
        self.type_line("PS1=; stty -echo; echo 'no ''echo'")?;
        self.wait_for("no echo", limit).map(drop)
    }

    /// Runs a command line in the shell and gives what it printed.
    ///
    /// # Errors
    /// When it fails, or has not ended after `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.type_line(&format!("{{ {command}\n}}; echo {END}$?."))?;
        let output = self.wait_for(END, limit)?;
        let status = self.wait_for(".", limit)?;
        ensure!(status == "0", "'{command}' ended with {status}:\n{output}");
        Ok(output.replace('\r', ""))
    }

    /// Types a line.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")
            .and_then(|()| self.input.flush())
            .with_context(|| format!("type '{line}' at the guest's console"))
    }

    /// Waits until `text` comes after what has been waited for before; gives what came before it.
    fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let mut before = String::new();
        let said = wait_until(&format!("the guest says '{text}'"), limit, || {
            let output = self.process.output();
            let new = output.get(self.seen..).unwrap_or_default();
            let Some(at) = new.find(text) else {
                ensure!(self.process.running()?, "the guest has ended");
                return Ok(false);
            };
            new[..at].clone_into(&mut before);
            self.seen += at + text.len();
            Ok(true)
        });
        said.with_context(|| format!("console of the guest:\n{}", self.process.output()))?;
        Ok(before)
    }

    /// Waits for the end of a machine that switches itself off.
    ///
    /// # Errors
    /// When it has not ended after `limit`, or not well.
    pub fn wait(mut self, limit: Duration) -> Result<()> {
        let status = self.process.wait(limit);
        let status =
            status.with_context(|| format!("console of the guest:\n{}", self.process.output()))?;
        ensure!(status.success(), "the machine ended with {status}");
        Ok(())
    }
}
