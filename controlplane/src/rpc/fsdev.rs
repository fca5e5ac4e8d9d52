//! Methods about file-system devices.

use std::rc::Rc;

use serde_json::Value;
use serde_json::json;

use ferry_shared::export::Cache;
use ferry_shared::export::ExportSpec;
use ferry_shared::export::IdMap;
use ferry_shared::export::OVERFLOW_ID;
use ferry_shared::export::Squash;
use ferry_shared::export::XattrMap;
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
use crate::model::method_stem;
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
    let aio = match kind {
        FsdevKind::Aio(aio) => aio,
        FsdevKind::Null => return json!({}),
        FsdevKind::Passthru { base } => return json!({"base_fsdev_name": base}),
    };
    let export = &aio.export;
    let mut params = json!({
        "root_path": aio.root_path,
        "enable_xattr": aio.enable_xattr,
        "enable_writeback_cache": aio.enable_writeback_cache,
        "max_xfer_size": aio.max_xfer_size,
        "max_readahead": aio.max_readahead,
        "skip_rw": aio.skip_rw,
        "metadata": placement_name(aio.metadata),
        "cache": export.cache.name(),
        "read_only": export.read_only,
        "map_uid": export.map_uid.to_string(),
        "map_gid": export.map_gid.to_string(),
        "squash": export.squash.name(),
        "anon_uid": export.anon_uid,
        "anon_gid": export.anon_gid,
        "xattr_map": export.xattr_map.to_string(),
    });
    // Those that were not given stay so: what they are depends on others.
    for (name, given) in [
        ("attr_valid_ms", export.attr_valid_ms),
        ("entry_valid_ms", export.entry_valid_ms),
        ("negative_valid_ms", export.negative_valid_ms),
    ] {
        if let Some(ms) = given {
            params[name] = json!(ms);
        }
    }
    params
}

/// The same for reading, with what is in force where nothing was given.
fn describe(fsdev: &Fsdev) -> Value {
    let mut specific = specifics(&fsdev.spec.kind);
    if let FsdevKind::Aio(aio) = &fsdev.spec.kind {
        specific["attr_valid_ms"] = json!(aio.export.attr_ms());
        specific["entry_valid_ms"] = json!(aio.export.entry_ms());
        specific["negative_valid_ms"] = json!(aio.export.negative_ms());
    }
    if let FsdevKind::Passthru { .. } = &fsdev.spec.kind {
        specific["name"] = json!(fsdev.spec.name);
        specific = json!({"passthru_external": specific});
    }
    json!({
        "name": fsdev.spec.name,
        "module_name": module_name(&fsdev.spec.kind),
        "module_specific": specific,
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
        let method = format!("{}_create", method_stem(&fsdev.spec.kind));
        requests.push(json!({"method": method, "params": params}));
    }
    requests
}

fn export_spec(args: &Args) -> Result<ExportSpec, Failure> {
    let text = |name| args.text(name).unwrap_or_default();
    Ok(ExportSpec {
        cache: args
            .text("cache")
            .map_or(Ok(Cache::default()), Cache::parse)?,
        attr_valid_ms: args.number("attr_valid_ms"),
        entry_valid_ms: args.number("entry_valid_ms"),
        negative_valid_ms: args.number("negative_valid_ms"),
        read_only: args.flag("read_only").unwrap_or(false),
        map_uid: IdMap::parse("map_uid", text("map_uid"))?,
        map_gid: IdMap::parse("map_gid", text("map_gid"))?,
        squash: args
            .text("squash")
            .map_or(Ok(Squash::None), Squash::parse)?,
        anon_uid: args.number("anon_uid").unwrap_or(OVERFLOW_ID),
        anon_gid: args.number("anon_gid").unwrap_or(OVERFLOW_ID),
        xattr_map: XattrMap::parse(text("xattr_map"))?,
    })
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
        metadata,
        export: export_spec(args)?,
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

/// Unlike the other creators it tells failures apart.
pub(super) fn fsdev_passthru_create(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let name = args.required("name").to_owned();
        let base = args.required("base_fsdev_name").to_owned();
        let spec = FsdevSpec {
            name: name.clone(),
            kind: FsdevKind::Passthru { base },
        };
        let step = app.model_mut().fsdev_create(spec)?;
        app.carry_out(step).await?;
        Ok(Value::String(name))
    })
}

pub(super) fn fsdev_passthru_delete(app: Rc<App>, args: Args) -> Answer {
    delete(app, args.required("name").to_owned(), "passthru_external")
}

pub(super) fn fsdev_null_create(app: Rc<App>, args: Args) -> Answer {
    create(app, args.required("name").to_owned(), Ok(FsdevKind::Null))
}

pub(super) fn fsdev_null_delete(app: Rc<App>, args: Args) -> Answer {
    delete(app, args.required("name").to_owned(), "null")
}
