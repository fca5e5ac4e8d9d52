//! Methods about file-system devices.

use std::rc::Rc;

use serde_json::Value;
use serde_json::json;

use ferry_shared::limits;
use ferry_shared::msg::AioSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Placement;

use super::RpcError;
use super::decode::Args;
use super::table::Answer;
use crate::app::App;
use crate::model::Fsdev;
use crate::model::FsdevOptions;
use crate::model::module_name;
use crate::model::parse_placement;
use crate::model::placement_name;

pub(super) fn fsdev_set_opts(app: &App, args: &Args) -> Result<Value, RpcError> {
    let options = FsdevOptions {
        io_pool_size: args.number("fsdev_io_pool_size").unwrap_or_default(),
        io_cache_size: args.number("fsdev_io_cache_size").unwrap_or_default(),
    };
    app.model_mut().set_options(options).map_err(|failure| {
        let text = format!(
            "spdk_fsdev_set_opts failed with -{}: {}",
            failure.errno.raw(),
            failure.detail
        );
        RpcError::new(RpcError::INVALID_PARAMS, text)
    })?;
    Ok(Value::Bool(true))
}

fn options_json(options: FsdevOptions) -> Value {
    json!({"fsdev_io_pool_size": options.io_pool_size, "fsdev_io_cache_size": options.io_cache_size})
}

pub(super) fn fsdev_get_opts(app: &App, _: &Args) -> Result<Value, RpcError> {
    Ok(options_json(app.model().options()))
}

/// The parameters that rebuild an fsdev, without its name.
fn specifics(kind: &FsdevKind) -> Value {
    match kind {
        FsdevKind::Null => json!({}),
        FsdevKind::Aio(aio) => json!({
            "root_path": aio.root_path,
            "enable_xattr": aio.enable_xattr,
            "enable_writeback_cache": aio.enable_writeback_cache,
            "max_xfer_size": aio.max_xfer_size,
            "max_readahead": aio.max_readahead,
            "skip_rw": aio.skip_rw,
            "attr_valid_ms": aio.attr_valid_ms,
            "metadata": placement_name(aio.metadata),
        }),
    }
}

fn describe(fsdev: &Fsdev) -> Value {
    json!({
        "name": fsdev.spec.name,
        "module_name": module_name(&fsdev.spec.kind),
        "module_specific": specifics(&fsdev.spec.kind),
    })
}

pub(super) fn fsdev_get_fsdevs(app: &App, args: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    match args.text("name") {
        Some(name) => Ok(describe(model.fsdev(name)?)),
        None => Ok(Value::Array(model.fsdevs().map(describe).collect())),
    }
}

/// The requests that rebuild the subsystem.
pub(super) fn config(app: &App) -> Vec<Value> {
    let model = app.model();
    let mut requests =
        vec![json!({"method": "fsdev_set_opts", "params": options_json(model.options())})];
    for fsdev in model.fsdevs() {
        let mut params = serde_json::Map::new();
        params.insert("name".to_owned(), json!(fsdev.spec.name));
        if let Value::Object(specifics) = specifics(&fsdev.spec.kind) {
            params.extend(specifics);
        }
        let method = format!("fsdev_{}_create", module_name(&fsdev.spec.kind));
        requests.push(json!({"method": method, "params": params}));
    }
    requests
}

fn aio_spec(args: &Args) -> Result<AioSpec, Failure> {
    let metadata = match args.text("metadata") {
        None => Placement::default(),
        Some(name) => parse_placement(name)?,
    };
    Ok(AioSpec {
        root_path: args.required("root_path").to_owned(),
        enable_xattr: args.flag("enable_xattr").unwrap_or(false),
        enable_writeback_cache: args.flag("enable_writeback_cache").unwrap_or(false),
        max_xfer_size: args
            .number("max_xfer_size")
            .unwrap_or(limits::DEFAULT_XFER_SIZE),
        max_readahead: args
            .number("max_readahead")
            .unwrap_or(limits::DEFAULT_XFER_SIZE),
        skip_rw: args.flag("skip_rw").unwrap_or(false),
        attr_valid_ms: args.number("attr_valid_ms").unwrap_or(0),
        metadata,
    })
}

/// Clients of the creators know every failure by this code.
fn internal(failure: Failure) -> RpcError {
    RpcError::with_code(RpcError::INTERNAL_ERROR, failure)
}

fn create(app: Rc<App>, name: String, kind: Result<FsdevKind, Failure>) -> Answer {
    Box::pin(async move {
        let spec = FsdevSpec {
            name: name.clone(),
            kind: kind.map_err(internal)?,
        };
        let step = app.model_mut().fsdev_create(spec).map_err(internal)?;
        app.carry_out(step).await.map_err(internal)?;
        Ok(Value::String(name))
    })
}

fn delete(app: Rc<App>, name: String, module: &'static str) -> Answer {
    Box::pin(async move {
        let step = app.model_mut().fsdev_delete(&name, module)?;
        app.carry_out(step).await?;
        Ok(Value::Bool(true))
    })
}

pub(super) fn fsdev_aio_create(app: Rc<App>, args: Args) -> Answer {
    create(
        app,
        args.required("name").to_owned(),
        aio_spec(&args).map(FsdevKind::Aio),
    )
}

pub(super) fn fsdev_aio_delete(app: Rc<App>, args: Args) -> Answer {
    delete(app, args.required("name").to_owned(), "aio")
}

pub(super) fn fsdev_null_create(app: Rc<App>, args: Args) -> Answer {
    create(app, args.required("name").to_owned(), Ok(FsdevKind::Null))
}

pub(super) fn fsdev_null_delete(app: Rc<App>, args: Args) -> Answer {
    delete(app, args.required("name").to_owned(), "null")
}
