//! The `ferry` tool: one program, one sub-command per job.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Ferry: virtio-fs devices for hosts and virtual machines.
#[derive(Parser)]
#[command(name = "ferry", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print a script that completes command lines, for bash, zsh or fish.
    Completion(ferry_tools::completion::Args),
    /// What the scripts of `completion` call.
    #[command(hide = true)]
    Complete(ferry_tools::completion::Words),
    /// Put load on virtio-fs devices and measure them.
    Bench(ferry_tools::bench::Args),
    /// Attach to a function from this host and mount it through the kernel's FUSE.
    Mount(ferry_tools::mount::Args),
    /// Show what the service does: cores, devices, operations, latencies.
    Top(ferry_tools::top::Args),
    /// Print what the cores have written down at their trace points.
    Trace(ferry_tools::trace::Args),
    /// Start and supervise both processes, for machines without a service manager.
    Up(Box<ferry_tools::up::Args>),
    /// Show and change the emulated firmware's configuration; also under the name `mlxconfig`.
    Fwconfig(ferry_tools::fwconfig::Args),
    /// Send RPCs to the control plane; `ferry rpc -h` lists them.
    #[command(name = "rpc")]
    Rpc,
}

fn main() -> ExitCode {
    // Its command lines follow the original tool, also under that tool's names.
    if let Some(words) = ferry_tools::rpc::requested(std::env::args_os()) {
        return ferry_tools::rpc::run(words);
    }
    let command = match ferry_tools::fwconfig::requested(std::env::args_os()) {
        Some(words) => Command::Fwconfig(ferry_tools::fwconfig::Args::parse_from(words)),
        None => Cli::parse().command,
    };
    let outcome = match command {
        Command::Fwconfig(args) => ferry_tools::fwconfig::run(args),
        Command::Completion(args) => ferry_tools::completion::run(&args),
        Command::Complete(words) => ferry_tools::completion::complete(&words, &Cli::command()),
        Command::Bench(args) => ferry_tools::bench::run(&args),
        Command::Mount(args) => ferry_tools::mount::run(&args),
        Command::Top(args) => ferry_tools::top::run(&args),
        Command::Trace(args) => ferry_tools::trace::run(&args),
        Command::Up(args) => ferry_tools::up::run(*args),
        Command::Rpc => return ferry_tools::rpc::run(std::iter::empty()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}
