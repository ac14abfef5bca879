//! kill -9 in the midst of work: what was acknowledged is there, and the log is whole.

use crate::fixture::Kms;
use kms_api::proto;
use kms_client::Client;
use std::collections::BTreeMap;
use std::sync::mpsc;

/// What one worker was told had happened: keys and whether they are enabled, and aliases.
#[derive(Default)]
struct Acknowledged {
    keys: BTreeMap<String, bool>,
    aliases: BTreeMap<String, String>,
}

/// Works until the daemon is gone. What was asked for last and not answered may have happened or not: its key is left
/// out of what is checked.
fn work(client: &Client, name: &str, told: &mpsc::Sender<()>) -> Acknowledged {
    let mut done = Acknowledged::default();
    for number in 0_u32.. {
        let create = proto::CreateKeyRequest::default();
        let Ok(created) = client.call(|mut kms| async move { kms.create_key(create).await }) else {
            break;
        };
        let key_id = created.key_metadata.unwrap().key_id;
        done.keys.insert(key_id.clone(), true);
        let alias_name = format!("alias/{name}-{number}");
        let alias = proto::CreateAliasRequest {
            alias_name: alias_name.clone(),
            key_id: key_id.clone(),
        };
        if client
            .call(|mut kms| async move { kms.create_alias(alias).await })
            .is_err()
        {
            break;
        }
        done.aliases.insert(alias_name, key_id.clone());
        let disable = proto::DisableKeyRequest {
            key_id: key_id.clone(),
        };
        if client
            .call(|mut kms| async move { kms.disable_key(disable).await })
            .is_err()
        {
            done.keys.remove(&key_id);
            break;
        }
        done.keys.insert(key_id, false);
        // Nobody listens after the kill.
        let _ = told.send(());
    }
    done
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let mut kms = Kms::start();
    let mut all = Acknowledged::default();
    for round in 0..6_u32 {
        let (told, progress) = mpsc::channel();
        let rounds = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|worker| {
                    let (client, told) = (kms.client(), told.clone());
                    scope.spawn(move || work(&client, &format!("{round}-{worker}"), &told))
                })
                .collect();
            drop(told);
            // Another moment in each round, counted in work done.
            for _ in 0..=round * 7 {
                progress.recv().unwrap();
            }
            kms.kill();
            let done: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
            done
        });
        for done in rounds {
            all.keys.extend(done.keys);
            all.aliases.extend(done.aliases);
        }
        kms.serve(&[]);
        kms.verify().unwrap();
        let client = kms.client();
        for (key, enabled) in &all.keys {
            let state = client.describe_key(key).unwrap().key_state();
            assert_eq!(
                state == proto::KeyState::Enabled,
                *enabled,
                "round {round}, key {key}"
            );
        }
        for (alias, key) in &all.aliases {
            assert_eq!(&client.describe_key(alias).unwrap().key_id, key, "round {round}");
        }
    }
}
