//! gRPC: who calls, what is asked, and what is answered. The rules are the engine's.

mod convert;
mod exit;
mod filesystem;
mod kms;
mod peer;

pub(crate) use exit::watch_exit;
pub(crate) use filesystem::FilesystemService;
pub(crate) use kms::KmsService;
pub(crate) use peer::Peer;

use crate::engine::{Call, Engine, SessionId, Trail};
use kms_api::{Code, KmsError};
use std::sync::Arc;
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};

/// What both services need.
pub(crate) struct Gate {
    pub(crate) engine: Arc<Engine>,
    /// Whom kmsd serves beside root: its own user.
    pub(crate) own_uid: u32,
    /// Turns true when the daemon stops: streams end, so that it need not wait for their clients.
    pub(crate) stopping: watch::Receiver<bool>,
    /// Room for changes of keys' states.
    pub(crate) changes: Semaphore,
    /// Told of a session that has ended.
    pub(crate) forget: fn(SessionId),
}

impl Gate {
    /// Answers one audited call that changes a key's state, and may wait long.
    async fn serve_change<Q, A>(
        &self,
        operation: &'static str,
        request: Request<Q>,
        handler: impl FnOnce(&Engine, &Call, &mut Trail, Q) -> Result<A, KmsError> + Send + 'static,
    ) -> Result<Response<A>, Status>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        // It is never closed.
        let _turn = self.changes.acquire().await;
        self.serve(operation, request, handler).await
    }

    /// Answers one audited call, on a thread that may block.
    async fn serve<Q, A>(
        &self,
        operation: &'static str,
        request: Request<Q>,
        handler: impl FnOnce(&Engine, &Call, &mut Trail, Q) -> Result<A, KmsError> + Send + 'static,
    ) -> Result<Response<A>, Status>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        self.serve_with(operation, request, |engine, call, request| {
            engine.run(call, |trail| handler(engine, call, trail, request))
        })
        .await
    }

    /// Answers one call whose handler sees to its own audit record.
    async fn serve_with<Q, A>(
        &self,
        operation: &'static str,
        request: Request<Q>,
        handler: impl FnOnce(&Engine, &Call, Q) -> Result<A, KmsError> + Send + 'static,
    ) -> Result<Response<A>, Status>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        let (engine, own_uid) = (Arc::clone(&self.engine), self.own_uid);
        let task = tokio::task::spawn_blocking(move || {
            let principal = peer::principal(&request);
            let call = Call::new(principal, operation).map_err(|error| error.to_status(""))?;
            let answer = if peer::admitted(&call.principal, own_uid) {
                handler(&engine, &call, request.into_inner())
            } else {
                Err(engine.refuse(&call))
            };
            answer.map_err(|error| error.to_status(&call.request_id.to_string()))
        });
        // The engine catches panics of its own; what panics outside it was not begun.
        let answer = task
            .await
            .map_err(|_| KmsError::new(Code::InternalFailure, "kmsd failed; see its log").to_status(""))?;
        answer.map(Response::new)
    }
}
