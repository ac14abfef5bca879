//! Watching the processes that hold data keys: when one ends without having closed its session, nobody but kmsd can say when
//! what the kernel caches of its mount must go.

use super::Gate;
use crate::engine::Exit;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits until a session or its process ends, and sees to what an ended process leaves.
pub(crate) async fn watch_exit(gate: Arc<Gate>, exit: Exit) {
    let session = exit.session;
    let engine = Arc::clone(&gate.engine);
    wait(exit).await;
    // It may have to wait for the kernel.
    let seen_to = tokio::task::spawn_blocking(move || engine.process_exited(session));
    match seen_to.await {
        Ok(true) => (gate.forget)(session),
        Ok(false) => {}
        Err(_) => tracing::error!("what an ended process left was not seen to; see above"),
    }
}

async fn wait(exit: Exit) {
    let Exit { process, over, .. } = exit;
    if let Some(process) = process {
        let ended = async {
            let descriptor = process.descriptor().try_clone_to_owned()?;
            // SAFETY: the descriptor is owned by what it is registered with, which nothing here takes it out of.
            let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? };
            watched.readable().await.map(drop)
        };
        tokio::select! {
            ended = ended => if let Err(error) = ended {
                tracing::error!(%error, "a process that holds keys cannot be watched");
                over.notified().await;
            },
            () = over.notified() => {}
        }
    }
}
