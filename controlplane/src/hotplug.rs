//! Plugging a function into the host and taking it out again: the data plane's part, the VMM's, and the wait for the guest.

use core::time::Duration;

use ferry_shared::errno::Errno;
use ferry_shared::limits::HOTPLUG_WAIT_SECS;
use ferry_shared::msg::Failure;
use ferry_shared::msg::PlugState;
use tokio::time::timeout;

use crate::app::App;
use crate::host;
use crate::host::LinkError;
use crate::model::Model;

/// Offers a device to the host, and has the VMM take it where there is a link. With `wait` the guest's driver has taken it
/// when this succeeds.
pub(crate) async fn plug(app: &App, name: &str, wait: bool) -> Result<(), Failure> {
    let begun = app.model().device_hotplug(name);
    let (plugged, step) = begun?;
    app.carry_out(step).await?;
    if let Some(link) = &plugged.link
        && let Err(refused) = host::add(link, &plugged.function).await
    {
        take_back(app, name).await;
        return Err(refused.into());
    }
    if !wait {
        return Ok(());
    }
    let decided = |model: &Model| {
        let state = model.plug_state(name);
        state != Some(PlugState::PlugInProgress)
    };
    let limit = Duration::from_secs(HOTPLUG_WAIT_SECS);
    let Ok(reported) = timeout(limit, app.reported(decided)).await else {
        let detail = format!(
            "device {name} is offered to the host, whose driver has not taken it for {HOTPLUG_WAIT_SECS} s; it stays \
             offered, and virtio_fs_doca_device_hotunplug --dev-name {name} takes it back"
        );
        return Err(Failure::new(Errno::ETIMEDOUT, detail));
    };
    reported?;
    match app.model().plug_state(name) {
        Some(PlugState::PowerOn) => Ok(()),
        _ => Err(Failure::new(
            Errno::ECANCELED,
            format!("device {name} was unplugged before the host's driver had taken it"),
        )),
    }
}

/// A VMM that does not take a function must not find it later.
async fn take_back(app: &App, name: &str) {
    let begun = app.model().device_hotunplug(name, true);
    if let Ok((_, step)) = begun
        && let Err(Failure { errno, detail }) = app.carry_out(step).await
    {
        tracing::warn!(device = name, %errno, detail, "cannot take a function back that the VMM has not taken");
    }
}

/// Takes a device away from the host, once the guest lets go of it. With `wait` it is gone when this succeeds.
pub(crate) async fn unplug(app: &App, name: &str, wait: bool) -> Result<(), Failure> {
    let limit = Duration::from_secs(HOTPLUG_WAIT_SECS);
    let waited = timeout(limit, begin_unplug(app, name, wait)).await;
    waited.unwrap_or_else(|_| {
        let detail = format!(
            "the host has not let go of device {name} for {HOTPLUG_WAIT_SECS} s; it was asked to and may still do so: \
             unmount it in the guest, and repeat virtio_fs_doca_device_hotunplug --dev-name {name}"
        );
        Err(Failure::new(Errno::ETIMEDOUT, detail))
    })
}

async fn begin_unplug(app: &App, name: &str, wait: bool) -> Result<(), Failure> {
    let begun = app.model().device_hotunplug(name, false);
    let (plugged, step) = begun?;
    app.carry_out(step).await?;
    let gone = |model: &Model| {
        model
            .plug_state(name)
            .is_none_or(|s| s == PlugState::PowerOff)
    };
    if gone(&app.model()) {
        // No VMM was there.
        return Ok(());
    }
    let told = match &plugged.link {
        Some(link) => match host::remove(link, &plugged.function, wait).await {
            Ok(()) => true,
            // It has attached by itself.
            Err(LinkError::Unknown { .. }) => false,
            Err(error) => return Err(error.into()),
        },
        None => false,
    };
    if !told && !gone(&app.model()) {
        let again = app.model().device_hotunplug(name, true);
        let (_, step) = again?;
        app.carry_out(step).await?;
    }
    if wait {
        app.reported(gone).await?;
    }
    Ok(())
}
