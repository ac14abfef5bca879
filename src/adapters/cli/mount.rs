//! `cmkfs mount`: the process that serves a mount from its first request to its last.

use super::background::{Report, Side, split};
use super::options::{MountOptions, parse};
use super::{
    Failure, MountArguments, control, existing_directory, harden::harden, key_failure, logging, one_line,
    open_failure, read_superblock,
};
use crate::adapters::fuse::{Mounted, Unmounter};
use crate::adapters::kms::{Holder, SessionKeys};
use crate::engine::{Domain, KeyService, Superblock, SystemClock, Volume};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is to be mounted, with every path made independent of the working directory.
struct Plan {
    volume: PathBuf,
    mountpoint: PathBuf,
    socket: PathBuf,
    superblock: Superblock,
    options: MountOptions,
    log_file: Option<PathBuf>,
    foreground: bool,
}

pub(super) fn run(arguments: &MountArguments, socket: &Path) -> Result<(), Failure> {
    let plan = plan(arguments, socket)?;
    let mut report = if plan.foreground {
        Report::to_nobody()
    } else {
        match split()? {
            Side::Parent(outcome) => return outcome,
            Side::Child(report) => report,
        }
    };
    let served = match logging::start(plan.foreground, plan.log_file.as_deref()) {
        Ok(flush) => {
            let served = serve(&plan, &mut report);
            if let Err(message) = &served
                && !plan.foreground
                && !report.is_awaited()
            {
                tracing::error!("{message}");
            }
            drop(flush);
            served
        }
        Err(message) => Err(message),
    };
    match served {
        // The parent says it, on the terminal.
        Err(message) if report.is_awaited() => {
            report.failed(&one_line(&message));
            std::process::exit(1);
        }
        Err(_) if !plan.foreground => std::process::exit(1),
        other => other,
    }
}

fn plan(arguments: &MountArguments, socket: &Path) -> Result<Plan, Failure> {
    let mut options = parse(&arguments.options, rustix::process::geteuid().is_root())?;
    options.engine.accept_restore = arguments.accept_restore;
    let volume = existing_directory(&arguments.volume, "volume")?;
    let mountpoint = existing_directory(&arguments.mountpoint, "mount point")?;
    if mountpoint.starts_with(&volume) || volume.starts_with(&mountpoint) {
        return Err(format!(
            "the volume {} and the mount point {} lie one inside the other",
            volume.display(),
            mountpoint.display()
        ));
    }
    let absolute =
        |path: &Path| std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()));
    Ok(Plan {
        superblock: read_superblock(&volume, socket)?,
        socket: absolute(socket)?,
        log_file: arguments.log_file.as_deref().map(absolute).transpose()?,
        foreground: arguments.foreground,
        volume,
        mountpoint,
        options,
    })
}

fn serve(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    harden()?;
    let holder = Holder {
        socket: plan.socket.clone(),
        volume: plan.superblock.volume(),
        location: plan.volume.clone(),
        drain_max: plan.options.engine.drain_max,
    };
    let keys = SessionKeys::open(holder, plan.superblock.cmk_arn());
    let keys = Arc::new(keys.map_err(|error| key_failure(&error, &plan.socket))?);
    let volume = Volume::open(
        &plan.volume,
        plan.options.engine,
        Arc::clone(&keys) as Arc<dyn KeyService>,
        Arc::new(SystemClock),
    )
    .map_err(|error| open_failure(&error, &plan.volume, &plan.socket))?;
    let served = serve_open(plan, &volume, &keys, report);
    let closed = volume
        .close()
        .map_err(|error| format!("what was written last may be lost: {error}"));
    if Arc::into_inner(volume).is_none() {
        tracing::warn!("something refers to the volume still");
    }
    keys.close();
    served.and(closed)
}

fn serve_open(
    plan: &Plan,
    volume: &Arc<Volume>,
    keys: &Arc<SessionKeys>,
    report: &mut Report,
) -> Result<(), Failure> {
    let _control = control::start(
        Arc::downgrade(volume),
        &plan.volume,
        &plan.mountpoint,
        &plan.superblock,
        &plan.socket,
    )?;
    let watched = Arc::downgrade(volume);
    let ring = move |domain: Domain| {
        if let Some(volume) = watched.upgrade() {
            volume.ask_for_key_state(domain);
        }
    };
    let _watching = keys
        .watch(Arc::new(ring))
        .map_err(|error| format!("no thread to watch the key with: {error}"))?;
    // Blocked from before the mount is there, so that none of them finds it half made.
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("no signals: {error}"))?;
    let mounted = Mounted::start(
        volume,
        &plan.volume,
        &plan.mountpoint,
        plan.options.flags,
        plan.options.cache,
        keys.ledgers(),
        |handles| {
            keys.attach(handles)
                .map_err(|error| std::io::Error::other(error.to_string()))
        },
    )
    .map_err(|error| format!("cannot mount on {}: {error}", plan.mountpoint.display()))?;
    let handle = signals.handle();
    let unmounter = mounted.unmounter();
    let unmounting = std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                tracing::info!(signal, "unmounting");
                end(&unmounter);
            }
        });
    let unmounting = unmounting.map_err(|error| format!("no thread for signals: {error}"))?;
    tracing::info!("the volume is mounted");
    report.ready();
    let ended = mounted
        .wait()
        .map_err(|error| format!("the mount broke off: {error}"));
    handle.close();
    if unmounting.join().is_err() {
        tracing::error!("the thread for signals panicked");
    }
    ended
}

/// A busy mount leaves the tree at once, and ends when the last program has let go of it.
fn end(mount: &Unmounter) {
    let done = mount.unmount(false).or_else(|error| {
        tracing::warn!(%error, "the mount is in use: it ends when its last user does");
        mount.unmount(true)
    });
    match done {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!("the mount is not there to be unmounted; it ends when its last user does")
        }
        Err(error) => tracing::error!(%error, "cannot unmount"),
    }
}
