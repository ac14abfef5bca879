//! The `FilesystemKeys` service.

use super::Gate;
use super::exit::watch_exit;
use crate::engine::{Anchor, Asked, Call, Engine, KeyEvent, Move, Trail, Usage, Watched};
use kms_api::proto::{self, filesystem_keys_server::FilesystemKeys};
use kms_api::{Code, KmsError};
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// State changes that wait for one watcher to read them, at most.
const WATCH_BACKLOG: usize = 64;

pub(crate) struct FilesystemService(pub(crate) Arc<Gate>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl FilesystemKeys for FilesystemService {
    async fn open_session(
        &self,
        request: Request<proto::OpenSessionRequest>,
    ) -> Answer<proto::OpenSessionResponse> {
        let process = super::peer::process(&request);
        let gate = Arc::clone(&self.0);
        let handler =
            move |engine: &Engine, call: &Call, _: &mut Trail, request: proto::OpenSessionRequest| {
                let process = process.ok_or_else(|| {
                    KmsError::new(
                        Code::NoPermission,
                        "a session needs a process that this host can name",
                    )
                })?;
                let asked = Asked {
                    client_public: &request.client_public_key,
                    volume: &request.volume,
                    domain: request.domain,
                    boot_id: &request.boot_id,
                    drain_max_ms: request.drain_max_ms,
                };
                let (opened, exit) = engine.open_session(call, process, &asked)?;
                tokio::spawn(watch_exit(gate, exit));
                Ok(proto::OpenSessionResponse {
                    session_id: opened.id.to_vec(),
                    server_public_key: opened.server_public.to_vec(),
                    lease_ttl_ms: opened.lease_ttl_ms,
                    position: Some(position(engine)),
                })
            };
        self.0.serve("OpenSession", request, handler).await
    }

    async fn issue_data_keys(
        &self,
        request: Request<proto::IssueDataKeysRequest>,
    ) -> Answer<proto::IssueDataKeysResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::IssueDataKeysRequest| {
                let contexts: Vec<_> = request
                    .contexts
                    .into_iter()
                    .map(|context| context.entries)
                    .collect();
                let (session, random) = (&request.session_id, &request.request_random);
                let (wrapped, keys) =
                    engine.issue_data_keys(call, trail, session, random, &request.key_id, &contexts)?;
                Ok(proto::IssueDataKeysResponse {
                    wrapped,
                    nonce: keys.nonce.to_vec(),
                    sealed_keys: keys.sealed,
                })
            };
        self.0.serve("IssueDataKeys", request, handler).await
    }

    async fn open_data_keys(
        &self,
        request: Request<proto::OpenDataKeysRequest>,
    ) -> Answer<proto::OpenDataKeysResponse> {
        let handler =
            |engine: &Engine, call: &Call, trail: &mut Trail, request: proto::OpenDataKeysRequest| {
                let items = request.items.into_iter();
                let items: Vec<_> = items
                    .map(|item| (item.encryption_context, item.wrapped))
                    .collect();
                let (session, random) = (&request.session_id, &request.request_random);
                let (results, keys) = engine.open_data_keys(call, trail, session, random, &items)?;
                let request_id = call.request_id.to_string();
                let error = |result: Result<(), KmsError>| match result {
                    Ok(()) => proto::Error::default(),
                    Err(error) => error.to_proto(&request_id),
                };
                Ok(proto::OpenDataKeysResponse {
                    errors: results.into_iter().map(error).collect(),
                    nonce: keys.nonce.to_vec(),
                    sealed_keys: keys.sealed,
                })
            };
        self.0.serve("OpenDataKeys", request, handler).await
    }

    async fn renew_session(
        &self,
        request: Request<proto::RenewSessionRequest>,
    ) -> Answer<proto::RenewSessionResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::RenewSessionRequest| {
            let renewed = engine.renew_session(call, &request.session_id);
            engine.count_unaudited(call, renewed.is_ok());
            let renewed = renewed?;
            let keys = renewed.keys.into_iter().map(|(id, state)| proto::KeyStatus {
                arn: engine.arn(id),
                state: state.into(),
            });
            Ok(proto::RenewSessionResponse {
                lease_ttl_ms: renewed.lease_ttl_ms,
                revocation_epoch: renewed.revocation_epoch,
                keys: keys.collect(),
                position: Some(position(engine)),
            })
        };
        self.0.serve_with("RenewSession", request, handler).await
    }

    type WatchSessionStream = ReceiverStream<Result<proto::KeyStateEvent, Status>>;

    async fn watch_session(
        &self,
        request: Request<proto::WatchSessionRequest>,
    ) -> Answer<Self::WatchSessionStream> {
        let handler = |engine: &Engine, call: &Call, _: &mut Trail, request: proto::WatchSessionRequest| {
            // Subscribed before the answer, so that no change after it is missed.
            let events = engine.watch();
            Ok((engine.watch_session(call, &request.session_id)?, events))
        };
        let (watched, events) = self.0.serve("WatchSession", request, handler).await?.into_inner();
        let (sender, receiver) = mpsc::channel(WATCH_BACKLOG);
        let forwarder = Forwarder {
            engine: Arc::clone(&self.0.engine),
            watched,
            events,
            stopping: self.0.stopping.clone(),
        };
        tokio::spawn(forwarder.run(sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn acknowledge_revocation(
        &self,
        request: Request<proto::AcknowledgeRevocationRequest>,
    ) -> Answer<proto::AcknowledgeRevocationResponse> {
        let handler =
            |engine: &Engine, call: &Call, _: &mut Trail, request: proto::AcknowledgeRevocationRequest| {
                engine.acknowledge_revocation(call, &request.session_id, request.revocation_epoch)?;
                Ok(proto::AcknowledgeRevocationResponse {})
            };
        self.0.serve("AcknowledgeRevocation", request, handler).await
    }

    async fn report_usage(
        &self,
        request: Request<proto::ReportUsageRequest>,
    ) -> Answer<proto::ReportUsageResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::ReportUsageRequest| {
            let usage = Usage {
                key: &request.key_id,
                location: &request.location,
                files: request.files,
                bytes: request.bytes,
                removed: request.removed,
            };
            engine.report_usage(call, &request.session_id, &usage)?;
            Ok(proto::ReportUsageResponse {})
        };
        self.0.serve_with("ReportUsage", request, handler).await
    }

    async fn get_anchor(
        &self,
        request: Request<proto::GetAnchorRequest>,
    ) -> Answer<proto::GetAnchorResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::GetAnchorRequest| {
            let found = engine.get_anchor(call, &request.session_id);
            engine.count_unaudited(call, found.is_ok());
            Ok(proto::GetAnchorResponse {
                anchor: found?.map(anchor_message),
            })
        };
        self.0.serve_with("GetAnchor", request, handler).await
    }

    async fn advance_anchor(
        &self,
        request: Request<proto::AdvanceAnchorRequest>,
    ) -> Answer<proto::AdvanceAnchorResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::AdvanceAnchorRequest| {
            let from = request.from.map(anchor);
            let to = request.to.map(anchor).ok_or_else(no_anchor)?;
            let moved = engine.move_anchor(call, &request.session_id, Move::From(from.as_ref()), &to);
            moved.map(|()| proto::AdvanceAnchorResponse {})
        };
        self.0.serve_with("AdvanceAnchor", request, handler).await
    }

    async fn accept_restore(
        &self,
        request: Request<proto::AcceptRestoreRequest>,
    ) -> Answer<proto::AcceptRestoreResponse> {
        let handler = |engine: &Engine, call: &Call, request: proto::AcceptRestoreRequest| {
            let to = request.to.map(anchor).ok_or_else(no_anchor)?;
            let moved = engine.move_anchor(call, &request.session_id, Move::Restored, &to);
            moved.map(|()| proto::AcceptRestoreResponse {})
        };
        self.0.serve_with("AcceptRestore", request, handler).await
    }

    async fn close_session(
        &self,
        request: Request<proto::CloseSessionRequest>,
    ) -> Answer<proto::CloseSessionResponse> {
        let handler = |engine: &Engine, call: &Call, _: &mut Trail, request: proto::CloseSessionRequest| {
            engine.close_session(call, &request.session_id)?;
            Ok(proto::CloseSessionResponse {})
        };
        self.0.serve("CloseSession", request, handler).await
    }
}

fn position(engine: &Engine) -> proto::KeystorePosition {
    let position = engine.position();
    proto::KeystorePosition {
        keystore_id: position.keystore_id.as_bytes().to_vec(),
        epoch: position.epoch,
        state_seq: position.state_seq,
        audit_records: position.audit.records,
        audit_head: position.audit.head,
    }
}

fn anchor(message: proto::Anchor) -> Anchor {
    Anchor {
        commit_seq: message.commit_seq,
        mac: message.mac,
        ino_limit: message.ino_limit,
    }
}

fn anchor_message(anchor: Anchor) -> proto::Anchor {
    proto::Anchor {
        commit_seq: anchor.commit_seq,
        mac: anchor.mac,
        ino_limit: anchor.ino_limit,
    }
}

fn no_anchor() -> KmsError {
    KmsError::invalid("To", "is missing")
}

/// Carries the changes that concern one session to its watcher.
struct Forwarder {
    engine: Arc<Engine>,
    watched: Watched,
    events: broadcast::Receiver<KeyEvent>,
    stopping: watch::Receiver<bool>,
}

impl Forwarder {
    /// Ends with the watcher, the daemon, or a watcher that fell too far behind: that one must renew to learn what it
    /// missed, and is told so by the end of its stream.
    async fn run(mut self, sender: mpsc::Sender<Result<proto::KeyStateEvent, Status>>) {
        loop {
            let event = tokio::select! {
                event = self.events.recv() => event,
                _ = self.stopping.wait_for(|&stopping| stopping) => return,
                () = sender.closed() => return,
            };
            let Ok(event) = event else { return };
            if !self.watched.concerns(&event) {
                continue;
            }
            let message = proto::KeyStateEvent {
                arn: self.engine.arn(event.key_id),
                state: event.state.into(),
                revocation_epoch: event.revocation_epoch,
            };
            if sender.try_send(Ok(message)).is_err() {
                return;
            }
        }
    }
}
