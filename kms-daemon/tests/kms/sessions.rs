//! Filesystem sessions.

use crate::fixture::Kms;
use kms_api::proto::{self, filesystem_keys_client::FilesystemKeysClient};
use kms_client::{ClientError, Code, EncryptionContext, KeyState, Session};
use std::time::Duration;

const VOLUME: [u8; 16] = [4; 16];
const DRAIN: Duration = Duration::from_secs(1);

fn contexts(count: u64) -> Vec<EncryptionContext> {
    (0..count)
        .map(|inode| EncryptionContext::data_key(VOLUME, 1, inode))
        .collect()
}

fn code<T>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Kms(error)) => error.code,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it succeeded"),
    }
}

/// Issues keys, and gives them with what is needed to open them again.
type Wrapped = Vec<(EncryptionContext, Vec<u8>)>;
fn issue(session: &Session, key: &str, count: u64) -> (Wrapped, Vec<[u8; 32]>) {
    let contexts = contexts(count);
    let issued = session.issue_data_keys(key, &contexts).unwrap();
    let plain = issued.iter().map(|issued| *issued.key.expose()).collect();
    let wrapped = issued.into_iter().map(|issued| issued.wrapped);
    (contexts.into_iter().zip(wrapped).collect(), plain)
}

/// Runs a revocation while this process does what a mount does: it lets go, and says so.
fn revoke(kms: &Kms, session: &Session, arguments: &[&str]) {
    let mut watch = session.watch().unwrap();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| kms.ctl(arguments));
        assert!(watch.wait());
        let epoch = session.renew(Duration::MAX).unwrap().revocation_epoch;
        session.acknowledge(epoch).unwrap();
        call.join().unwrap().unwrap();
    });
}

#[test]
fn keys_are_issued_and_opened_also_after_a_restart() {
    let mut kms = Kms::start();
    let key = kms.create_key();
    let client = kms.client();
    let session = client.open_session(VOLUME, 0, DRAIN).unwrap();
    // More than one batch of 256.
    let (items, plain) = issue(&session, &key, 600);
    let distinct: std::collections::HashSet<_> = plain.iter().collect();
    assert_eq!(distinct.len(), 600);
    let open = |session: &Session| -> Vec<[u8; 32]> {
        let opened = session.open_data_keys(&items).unwrap();
        opened.into_iter().map(|key| *key.unwrap().expose()).collect()
    };
    assert!(open(&session) == plain);
    assert!(
        !crate::fixture::holds_any(&kms.home(), &plain),
        "a data key lies in the home"
    );
    kms.restart();
    assert_eq!(code(session.renew(Duration::MAX)), Code::SessionNotFound);
    assert_eq!(code(session.open_data_keys(&items)), Code::SessionNotFound);
    let session = client.open_session(VOLUME, 0, DRAIN).unwrap();
    assert!(open(&session) == plain);
    session.close().unwrap();
}

#[test]
fn each_item_fails_by_itself() {
    let kms = Kms::start();
    let (good, disabled) = (kms.create_key(), kms.create_key());
    let client = kms.client();
    let session = client.open_session(VOLUME, 0, DRAIN).unwrap();
    let (mut items, plain) = issue(&session, &good, 3);
    let (others, _) = issue(&session, &disabled, 1);
    revoke(&kms, &session, &["disable-key", "--key-id", &disabled]);
    items.extend(others);
    items.push((EncryptionContext::data_key(VOLUME, 1, 99), items[0].1.clone()));
    items.push((items[0].0.clone(), b"no blob".to_vec()));
    let sixteen = kms
        .ctl(&[
            "generate-data-key-without-plaintext",
            "--key-id",
            &good,
            "--number-of-bytes",
            "16",
        ])
        .unwrap();
    let sixteen = crate::fixture::bytes(sixteen["CiphertextBlob"].as_str().unwrap());
    items.push((EncryptionContext::default(), sixteen));
    let opened = session.open_data_keys(&items).unwrap();
    let codes: Vec<_> = opened
        .iter()
        .map(|one| one.as_ref().err().map(|error| error.code))
        .collect();
    let invalid = Some(Code::InvalidParameter);
    assert_eq!(
        codes,
        [None, None, None, Some(Code::Disabled), invalid, invalid, invalid]
    );
    for (opened, plain) in opened.iter().zip(&plain) {
        assert!(opened.as_ref().ok().unwrap().expose() == plain);
    }
    assert_eq!(
        code(session.issue_data_keys(&disabled, &contexts(2))),
        Code::Disabled
    );
}

#[test]
fn renewal_tells_the_state_of_every_key_that_is_used() {
    let kms = Kms::start();
    let (one, two, unused) = (kms.create_key(), kms.create_key(), kms.create_key());
    let session = kms.client().open_session(VOLUME, 0, DRAIN).unwrap();
    assert_eq!(session.renew(Duration::MAX).unwrap().keys, []);
    issue(&session, &one, 1);
    issue(&session, &two, 1);
    let states = || {
        let renewal = session.renew(Duration::MAX).unwrap();
        assert!(renewal.lease_ttl > Duration::ZERO && renewal.lease_ttl <= Duration::from_secs(10));
        let state = |key: &str| {
            let mut found = renewal.keys.iter().filter(|status| status.arn.ends_with(key));
            found.next().map(|status| status.state)
        };
        (renewal.revocation_epoch, state(&one), state(&two), state(&unused))
    };
    let enabled = Some(KeyState::Enabled);
    let (epoch, ..) = states();
    assert_eq!(states(), (epoch, enabled, enabled, None));
    revoke(&kms, &session, &["disable-key", "--key-id", &one]);
    assert_eq!(states(), (epoch + 1, Some(KeyState::Disabled), enabled, None));
    kms.ctl(&["enable-key", "--key-id", &one]).unwrap();
    assert_eq!(states(), (epoch + 1, enabled, enabled, None));
    let window = ["--pending-window-in-days", "7", "--yes"];
    let schedule = [&["schedule-key-deletion", "--key-id", &two], &window[..]].concat();
    revoke(&kms, &session, &schedule);
    assert_eq!(
        states(),
        (epoch + 2, enabled, Some(KeyState::PendingDeletion), None)
    );
}

/// A process that serves two domains has a session for each. After a restart the first of them to come back must not answer for
/// the other: it could not say that the other's keys are gone, and kmsd would end this very process.
#[test]
fn after_a_restart_each_domain_s_session_answers_for_its_own_key() {
    let mut kms = Kms::start();
    let keys = [kms.create_key(), kms.create_key()];
    let client = kms.client();
    let open = |domain| client.open_session(VOLUME, domain, DRAIN).unwrap();
    for (domain, key) in (0..).zip(&keys) {
        issue(&open(domain), key, 1);
    }
    kms.restart();
    // The other way round: neither is favoured by coming first.
    let second = open(1);
    let first = open(0);
    for (session, key, other) in [(&first, &keys[0], &keys[1]), (&second, &keys[1], &keys[0])] {
        let used = session.renew(Duration::MAX).unwrap().keys;
        assert_eq!(used.len(), 1);
        assert!(used[0].arn.ends_with(key) && !used[0].arn.ends_with(other));
    }
    revoke(&kms, &first, &["disable-key", "--key-id", &keys[0]]);
    assert_eq!(kms.state(&keys[1]), "Enabled");
    revoke(&kms, &second, &["disable-key", "--key-id", &keys[1]]);
}

/// The raw protocol, for what the client library would never send.
fn raw(
    kms: &Kms,
) -> (
    tokio::runtime::Runtime,
    FilesystemKeysClient<tonic::transport::Channel>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let uri = format!("unix://{}", kms.socket().display());
    let connect = async { tonic::transport::Endpoint::try_from(uri).unwrap().connect().await };
    let channel = runtime.block_on(connect).unwrap();
    (runtime, FilesystemKeysClient::new(channel))
}

fn raw_code(status: &tonic::Status) -> Code {
    kms_api::KmsError::from_status(status).unwrap().code
}

fn open_request() -> proto::OpenSessionRequest {
    proto::OpenSessionRequest {
        client_public_key: kms_api::session::KeyPair::generate().unwrap().public().to_vec(),
        volume: VOLUME.to_vec(),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap()
            .trim()
            .to_owned(),
        drain_max_ms: None,
        domain: 0,
    }
}

#[test]
fn a_session_that_is_unknown_or_ended_is_refused() {
    let kms = Kms::start();
    let (runtime, mut client) = raw(&kms);
    for session_id in [vec![], vec![0; 16], vec![0; 17]] {
        let renewed = runtime.block_on(client.renew_session(proto::RenewSessionRequest { session_id }));
        assert_eq!(raw_code(&renewed.unwrap_err()), Code::SessionNotFound);
    }
    let opened = runtime
        .block_on(client.open_session(open_request()))
        .unwrap()
        .into_inner();
    let session_id = opened.session_id;
    let close = proto::CloseSessionRequest {
        session_id: session_id.clone(),
    };
    runtime.block_on(client.close_session(close)).unwrap();
    let renewed = runtime.block_on(client.renew_session(proto::RenewSessionRequest { session_id }));
    assert_eq!(raw_code(&renewed.unwrap_err()), Code::SessionNotFound);
}

/// The child connects by itself, so that the kernel names its pid; it inherits nothing of the session but its id.
#[test]
fn a_session_of_another_process_is_refused() {
    const ROLE: &str = "KMS_TEST_STOLEN_SESSION";
    if let Ok(stolen) = std::env::var(ROLE) {
        let (socket, id) = stolen.split_once(' ').unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let renewed = runtime.block_on(async {
            let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{socket}")).unwrap();
            let mut client = FilesystemKeysClient::new(endpoint.connect().await.unwrap());
            let session_id = hex::decode(id).unwrap();
            client
                .renew_session(proto::RenewSessionRequest { session_id })
                .await
        });
        assert_eq!(raw_code(&renewed.unwrap_err()), Code::SessionNotFound);
        return;
    }
    let kms = Kms::start();
    let (runtime, mut client) = raw(&kms);
    let opened = runtime
        .block_on(client.open_session(open_request()))
        .unwrap()
        .into_inner();
    let mut thief = std::process::Command::new(std::env::current_exe().unwrap());
    thief.args(["--exact", "sessions::a_session_of_another_process_is_refused"]);
    thief.env(
        ROLE,
        format!("{} {}", kms.socket().display(), hex::encode(&opened.session_id)),
    );
    let said = thief.output().unwrap();
    assert!(said.status.success(), "{said:?}");
    assert!(
        String::from_utf8_lossy(&said.stdout).contains("1 passed"),
        "{said:?}"
    );
    let session_id = opened.session_id;
    runtime
        .block_on(client.renew_session(proto::RenewSessionRequest { session_id }))
        .unwrap();
}

#[test]
fn what_would_give_no_secret_or_is_of_another_boot_opens_no_session() {
    let kms = Kms::start();
    let (runtime, mut client) = raw(&kms);
    let good = open_request;
    let bad = [
        proto::OpenSessionRequest {
            client_public_key: vec![0; 32],
            ..good()
        },
        proto::OpenSessionRequest {
            client_public_key: vec![1; 31],
            ..good()
        },
        proto::OpenSessionRequest {
            volume: vec![1; 15],
            ..good()
        },
        proto::OpenSessionRequest {
            boot_id: "another".to_owned(),
            ..good()
        },
        proto::OpenSessionRequest {
            domain: 65_536,
            ..good()
        },
    ];
    for request in bad {
        let opened = runtime.block_on(client.open_session(request));
        assert_eq!(raw_code(&opened.unwrap_err()), Code::InvalidParameter);
    }
}

#[test]
fn a_watcher_hears_of_the_keys_it_uses_and_ends_with_the_daemon() {
    let mut kms = Kms::start();
    let (used, other) = (kms.create_key(), kms.create_key());
    let (runtime, mut client) = raw(&kms);
    let opened = runtime
        .block_on(client.open_session(open_request()))
        .unwrap()
        .into_inner();
    let issue = proto::IssueDataKeysRequest {
        session_id: opened.session_id.clone(),
        request_random: vec![1; 16],
        key_id: used.clone(),
        contexts: vec![proto::issue_data_keys_request::Context::default()],
    };
    runtime.block_on(client.issue_data_keys(issue)).unwrap();
    let session_id = opened.session_id;
    let watch = proto::WatchSessionRequest {
        session_id: session_id.clone(),
    };
    let mut events = runtime
        .block_on(client.watch_session(watch))
        .unwrap()
        .into_inner();
    kms.ctl(&["disable-key", "--key-id", &other]).unwrap();
    let acknowledge = |epoch| proto::AcknowledgeRevocationRequest {
        session_id: session_id.clone(),
        revocation_epoch: epoch,
    };
    std::thread::scope(|scope| {
        let call = scope.spawn(|| kms.ctl(&["disable-key", "--key-id", &used]));
        let event = runtime.block_on(events.message()).unwrap().unwrap();
        assert!(event.arn.ends_with(&used));
        assert_eq!(event.state(), proto::KeyState::Disabled);
        let epoch = event.revocation_epoch;
        let early = runtime.block_on(client.acknowledge_revocation(acknowledge(epoch + 1)));
        assert_eq!(raw_code(&early.unwrap_err()), Code::InvalidParameter);
        // It waits for this.
        assert!(!call.is_finished());
        runtime
            .block_on(client.acknowledge_revocation(acknowledge(epoch)))
            .unwrap();
        call.join().unwrap().unwrap();
    });

    kms.stop();
    assert!(matches!(runtime.block_on(events.message()), Ok(None) | Err(_)));
}
