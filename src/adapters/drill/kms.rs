//! kmsd, as drills and records call it.

use kms_client::proto::{self, KeyMetadata};
use kms_client::{Client, ClientError};

const DAY_S: u64 = 86_400;

/// Calls that drills and records make.
pub struct Kms<'c>(&'c Client);

impl<'c> Kms<'c> {
    /// Over this client.
    #[must_use]
    pub const fn over(client: &'c Client) -> Self {
        Self(client)
    }

    /// Makes a key.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn create_key(&self, description: &str) -> Result<KeyMetadata, String> {
        let request = proto::CreateKeyRequest {
            description: description.to_owned(),
            ..proto::CreateKeyRequest::default()
        };
        let answer = self
            .0
            .call(|mut kms| async move { kms.create_key(request).await })
            .map_err(said)?;
        answer.key_metadata.ok_or_else(|| "kmsd: no metadata".to_owned())
    }

    /// Describes a key.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn describe(&self, key: &str) -> Result<KeyMetadata, String> {
        self.0.describe_key(key).map_err(said)
    }

    /// Takes a key away.
    ///
    /// # Errors
    /// What kmsd said; `RevocationIncomplete` among it.
    pub fn disable(&self, key: &str) -> Result<(), String> {
        let request = proto::DisableKeyRequest {
            key_id: key.to_owned(),
        };
        self.0
            .call(|mut kms| async move { kms.disable_key(request).await })
            .map_err(said)?;
        Ok(())
    }

    /// Gives a key back.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn enable(&self, key: &str) -> Result<(), String> {
        let request = proto::EnableKeyRequest {
            key_id: key.to_owned(),
        };
        self.0
            .call(|mut kms| async move { kms.enable_key(request).await })
            .map_err(said)?;
        Ok(())
    }

    /// Schedules a key's deletion, with the least window there is; answers its length in days.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn schedule_deletion(&self, key: &str) -> Result<u32, String> {
        let days = 7;
        let request = proto::ScheduleKeyDeletionRequest {
            key_id: key.to_owned(),
            pending_window_in_days: days,
        };
        self.0
            .call(|mut kms| async move { kms.schedule_key_deletion(request).await })
            .map_err(said)?;
        Ok(days)
    }

    /// Shifts the clock of a keystore for drills; answers the keys that were destroyed.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn advance_days(&self, days: u32) -> Result<Vec<String>, String> {
        let request = proto::AdvanceClockRequest {
            seconds: u64::from(days) * DAY_S,
        };
        let answer = self
            .0
            .call(|mut kms| async move { kms.advance_clock(request).await })
            .map_err(said)?;
        Ok(answer.destroyed_key_ids)
    }

    /// What is known to depend on a key.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn dependants(&self, key: &str) -> Result<Vec<proto::Dependant>, String> {
        self.0.list_dependants(key).map_err(said)
    }

    /// What the keystore is.
    ///
    /// # Errors
    /// What kmsd said.
    pub fn keystore(&self) -> Result<proto::GetKeystoreInfoResponse, String> {
        let request = proto::GetKeystoreInfoRequest {};
        self.0
            .call(|mut kms| async move { kms.get_keystore_info(request).await })
            .map_err(said)
    }
}

/// How kmsd refused, or failed.
fn said(error: ClientError) -> String {
    format!("kmsd: {error}")
}
