//! Methods about trace points. What is on is the data plane's to know; here it is only read and changed.

use std::rc::Rc;

use ferry_shared::errno::Errno;
use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::trace;
use ferry_shared::trace::GROUPS;
use ferry_shared::trace::POINTS_PER_GROUP;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use super::table::Answer;
use crate::app::App;

const TRUE: Value = Value::Bool(true);

fn hex(number: u64) -> String {
    format!("{number:#x}")
}

/// The points of a group that are on, counted from its first one.
fn of_group(mask: u64, group: usize) -> u64 {
    (mask & trace::group_mask(group)) >> (group * POINTS_PER_GROUP)
}

/// The groups in which anything is on.
fn groups_on(mask: u64) -> u64 {
    let groups = 0..GROUPS.len();
    groups.fold(0, |on, group| {
        on | u64::from(of_group(mask, group) != 0) << group
    })
}

/// The points of a group or of all of them.
fn points(name: &str) -> Result<u64, RpcError> {
    if name == "all" {
        return Ok(trace::all_points());
    }
    let found = GROUPS.iter().position(|group| group.name == name);
    found.map(trace::group_mask).ok_or_else(|| {
        let names: Vec<&str> = GROUPS.iter().map(|group| group.name).collect();
        let text = format!(
            "Invalid parameters: there is no group {name:?}; the groups are all, {}",
            names.join(", ")
        );
        RpcError::new(RpcError::INVALID_PARAMS, text)
    })
}

/// The points of a group that `tpoint_mask` names; all of them if it is absent.
fn named_points(args: &Args) -> Result<u64, RpcError> {
    let name = args.required("name");
    let all = points(name)?;
    let named = match (
        args.big("tpoint_mask"),
        GROUPS.iter().position(|group| group.name == name),
    ) {
        (None, _) => return Ok(all),
        (Some(mask), None) => (0..GROUPS.len()).fold(0, |points, group| {
            points | mask.wrapping_shl((group * POINTS_PER_GROUP) as u32) & trace::group_mask(group)
        }),
        (Some(mask), Some(group)) if mask >> POINTS_PER_GROUP == 0 || mask == u64::MAX => {
            mask.wrapping_shl((group * POINTS_PER_GROUP) as u32) & all
        }
        (Some(_), Some(_)) => 0,
    };
    if named == 0 {
        let text = format!("Invalid parameters: tpoint_mask names no trace point of group {name}");
        return Err(RpcError::new(RpcError::INVALID_PARAMS, text));
    }
    Ok(named)
}

/// Changes the mask of the data plane; one request at a time, so that none undoes what another one does.
fn change(app: Rc<App>, change: impl FnOnce(u64) -> Result<u64, RpcError> + 'static) -> Answer {
    Box::pin(async move {
        let _turn = app.turn().await;
        let mask = change(app.tuning().await?.trace_mask)?;
        app.send(Command::SetTrace { mask }).await?;
        Ok(TRUE)
    })
}

pub(super) fn enable_group(app: Rc<App>, args: Args) -> Answer {
    change(app, move |mask| Ok(mask | points(args.required("name"))?))
}

pub(super) fn disable_group(app: Rc<App>, args: Args) -> Answer {
    change(app, move |mask| Ok(mask & !points(args.required("name"))?))
}

pub(super) fn set_mask(app: Rc<App>, args: Args) -> Answer {
    change(app, move |mask| Ok(mask | named_points(&args)?))
}

pub(super) fn clear_mask(app: Rc<App>, args: Args) -> Answer {
    change(app, move |mask| Ok(mask & !named_points(&args)?))
}

pub(super) fn get_group_mask(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        let mask = app.tuning().await?.trace_mask;
        let mut all = Map::new();
        all.insert("tpoint_group_mask".to_owned(), json!(hex(groups_on(mask))));
        for (number, group) in GROUPS.iter().enumerate() {
            let on = of_group(mask, number);
            let points = group.points.iter().zip(0..);
            let points: Vec<Value> = points
                .map(|((name, _), id)| {
                    json!({"name": name, "tpoint_id": id, "enabled": on & (1u64 << id) != 0})
                })
                .collect();
            let described = json!({"enabled": on != 0, "mask": hex(1 << number), "tpoint_mask": hex(on),
                "tpoints": points});
            all.insert(group.name.to_owned(), described);
        }
        Ok(Value::Object(all))
    })
}

pub(super) fn get_info(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        let tuning = app.tuning().await?;
        if tuning.trace_file.is_empty() {
            let failure = Failure::new(Errno::ENODATA, "the data plane has no file of traces");
            return Err(failure.into());
        }
        let mask = tuning.trace_mask;
        let mut all = Map::new();
        all.insert("tpoint_shm_path".to_owned(), json!(tuning.trace_file));
        all.insert("tpoint_group_mask".to_owned(), json!(hex(groups_on(mask))));
        for (number, group) in GROUPS.iter().enumerate() {
            let on = of_group(mask, number);
            let described = json!({"mask": hex(1 << number), "tpoint_mask": hex(on)});
            all.insert(group.name.to_owned(), described);
        }
        Ok(Value::Object(all))
    })
}
