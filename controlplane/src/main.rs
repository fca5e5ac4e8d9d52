//! The control plane process.

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use clap::Parser;
use ferry_controlplane::access;
use ferry_controlplane::access::Rule;
use ferry_controlplane::app::App;
use ferry_controlplane::app::Phase;
use ferry_controlplane::config;
use ferry_controlplane::config::Entry;
use ferry_controlplane::dataplane;
use ferry_controlplane::metrics;
use ferry_controlplane::metrics::Place;
use ferry_controlplane::rpc::table::When;
use ferry_controlplane::server::Endpoint;
use ferry_controlplane::state::Store;
use ferry_shared::EXIT_ASKED;
use ferry_shared::logging;
use nix::unistd::Gid;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::task::LocalSet;

/// The unprivileged half of Ferry: serves RPC, keeps the configuration and directs the data plane.
#[derive(Parser)]
#[command(name = "ferry-controlplane", version, args_override_self = true)]
struct Options {
    /// RPC socket
    #[arg(
        short = 'r',
        long,
        value_name = "PATH",
        default_value = "/var/tmp/spdk.sock"
    )]
    rpc_socket: PathBuf,
    /// Mode of the RPC socket, octal [default: 600, with --socket-group 660]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    socket_mode: Option<u32>,
    /// Group of the RPC socket, by name or number
    #[arg(long, value_name = "GROUP", value_parser = access::parse_group)]
    socket_group: Option<Gid>,
    /// Methods that members of a group may call, as GROUP:METHOD,METHOD or GROUP:*; may be given several times. Once
    /// there is one, root and the own user may call everything and others what is named for their groups
    #[arg(long, value_name = "RULE")]
    allow: Vec<Rule>,
    /// Directory of the data plane's sockets
    #[arg(long, value_name = "DIR", default_value = "/run/ferry")]
    run_dir: PathBuf,
    /// Directory in which what the operator asks for is kept across restarts
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Start from the state directory, and keep nothing new there
    #[arg(long, requires = "state_dir")]
    no_autosave: bool,
    /// Serve metrics in the text form of Prometheus on a unix socket (PATH) or a loopback address (ADDRESS:PORT)
    #[arg(long, value_name = "PLACE")]
    metrics: Option<Place>,
    /// Saved configuration to apply
    #[arg(
        short = 'c',
        long,
        visible_alias = "json",
        value_name = "FILE",
        env = "SPDK_RPC_INIT_CONF_JSON"
    )]
    config: Option<PathBuf>,
    /// Go on when a request of the saved configuration fails
    #[arg(long)]
    json_ignore_init_errors: bool,
    /// Wait for framework_start_init before anything is initialised
    #[arg(long)]
    wait_for_rpc: bool,
    /// Answer only these methods
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    rpcs_allowed: Option<Vec<String>>,
    /// Script of commands to run after the start
    #[arg(long, value_name = "FILE", env = "SPDK_RPC_INIT_CONF")]
    init_conf: Option<PathBuf>,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o777 == 0)
        .ok_or_else(|| format!("{text:?} is not an octal mode up to 777"))
}

fn main() -> ExitCode {
    let options = Options::parse();
    logging::init("RUST_LOG");
    match run(options) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    LocalSet::new().block_on(&runtime, serve(options))
}

/// What is applied after the start.
struct Initial {
    entries: Vec<Entry>,
    ignore_errors: bool,
    script: Option<String>,
}

async fn serve(options: Options) -> anyhow::Result<ExitCode> {
    let app = App::new(options.rpcs_allowed);
    app.keep_off_cores()
        .context("cannot learn which CPUs there are")?;
    // Container templates set variables to nothing.
    let given = |path: &&PathBuf| !path.as_os_str().is_empty();
    let entries = match options.config.as_ref().filter(given) {
        Some(path) => config::parse(&config::read_file(path)?)
            .with_context(|| format!("cannot use configuration {}", path.display()))?,
        None => Vec::new(),
    };
    let script = options
        .init_conf
        .as_ref()
        .filter(given)
        .map(|path| config::read_file(path))
        .transpose()?;
    let initial = Initial {
        entries,
        ignore_errors: options.json_ignore_init_errors,
        script,
    };

    let default = if options.socket_group.is_some() {
        0o660
    } else {
        0o600
    };
    let mode = options.socket_mode.unwrap_or(default);
    let endpoint = Endpoint::bind(&options.rpc_socket, mode, options.socket_group)?;
    if let Some(dir) = &options.state_dir {
        restore(&app, dir, !options.no_autosave)?;
    }
    let before = |when| when != When::Runtime;
    config::apply(&app, &initial.entries, before, initial.ignore_errors).await?;
    if !options.wait_for_rpc {
        app.advance(Phase::Running);
    }
    let stop = stop_signal()?;
    let rpc = async {
        // The first request of a script finds the data plane if there is one.
        app.attempted().await;
        tracing::info!(socket = %options.rpc_socket.display(), "serving RPC");
        let serving = endpoint.serve(Rc::clone(&app), &options.allow);
        serving.await.context("RPC socket")
    };
    let metrics = async {
        match options.metrics.clone() {
            None => core::future::pending().await,
            Some(place) => {
                let serving = metrics::serve(Rc::clone(&app), place.clone());
                let what = || {
                    format!(
                        "cannot serve metrics on {place:?}; choose another place with --metrics"
                    )
                };
                serving.await.with_context(what)
            }
        }
    };
    let ended = tokio::select! {
        never = dataplane::keep_connected(Rc::clone(&app), &options.run_dir) => match never {},
        served = rpc => served,
        served = metrics => served,
        failed = initialise(&app, initial) => failed,
        signal = stop => {
            tracing::info!(signal, "stopping; the data plane goes on");
            Ok(())
        }
    };
    ended.map(|()| match app.is_end_asked() {
        true => ExitCode::from(EXIT_ASKED),
        false => ExitCode::SUCCESS,
    })
}

/// Takes over the state of an earlier run.
fn restore(app: &Rc<App>, dir: &Path, autosave: bool) -> anyhow::Result<()> {
    let (store, state) = Store::open(dir)?;
    if let Some(state) = state {
        tracing::info!(
            state_dir = %dir.display(),
            fsdevs = state.fsdevs.len(),
            devices = state.devices.len(),
            "state of an earlier run"
        );
        app.restore(state)
            .map_err(|failure| store.senseless(failure.detail))?;
    }
    if autosave {
        app.keep_in(store);
    }
    Ok(())
}

/// Applies the initial configuration once the data plane is there; returns only if that fails.
async fn initialise(app: &Rc<App>, initial: Initial) -> anyhow::Result<()> {
    app.reached(Phase::Running).await;
    app.linked().await;
    let after = |when| when == When::Runtime;
    config::apply(app, &initial.entries, after, initial.ignore_errors)
        .await
        .context("the saved configuration could not be applied; --json-ignore-init-errors goes on without what fails")?;
    if let Some(script) = initial.script
        && let Err(error) = config::run_script(app, &script).await
    {
        tracing::error!(%error, "the init script has stopped");
    }
    app.advance(Phase::Ready);
    core::future::pending().await
}

/// Resolves to the name of the signal that asks the process to end.
fn stop_signal() -> anyhow::Result<impl Future<Output = &'static str>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Caught so that it does not end the process.
    let mut user = signal(SignalKind::user_defined1())?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => return "SIGINT",
                _ = terminate.recv() => return "SIGTERM",
                _ = quit.recv() => return "SIGQUIT",
                _ = hangup.recv() => return "SIGHUP",
                _ = user.recv() => tracing::info!("SIGUSR1"),
            }
        }
    })
}
