//! What the rows of the keystore hold, once opened. docs/kms-format.md says how they are keyed and sealed.

use kms_api::proto::KeyState;
use prost::Message;

/// The key of the one [`ManifestRow`] of an epoch.
pub const MANIFEST_KEY: &[u8] = b"manifest";
/// The key of the one [`CheckpointRow`].
pub const CHECKPOINT_KEY: &[u8] = b"audit";
/// The key of the one [`TimeRow`].
pub const TIME_KEY: &[u8] = b"time";

/// The origin of a key whose material is imported.
pub(crate) const EXTERNAL: &str = "EXTERNAL";

/// The keystore as a whole.
#[derive(Clone, PartialEq, Message)]
pub struct ManifestRow {
    /// Moves with every write of this row.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// UUID.
    #[prost(bytes = "vec", tag = "2")]
    pub keystore_id: Vec<u8>,
    /// UUID of this replica.
    #[prost(bytes = "vec", tag = "3")]
    pub node_id: Vec<u8>,
    /// The root epoch under which this row is sealed.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Moves with every restrictive change; a kmsd that answers less than it once did was rolled back.
    #[prost(uint64, tag = "5")]
    pub state_seq: u64,
    /// Moves with every revocation.
    #[prost(uint64, tag = "6")]
    pub revocation_epoch: u64,
    /// Part of every ARN and blob.
    #[prost(string, tag = "7")]
    pub region: String,
    /// Part of every ARN.
    #[prost(string, tag = "8")]
    pub account: String,
    /// Milliseconds since the Unix epoch.
    #[prost(int64, tag = "9")]
    pub created_ms: i64,
    /// Whether this keystore was ever opened under a clock that can be shifted.
    #[prost(bool, tag = "10")]
    pub test_clock: bool,
    /// What the rows of keys, material and aliases must add up to; see `store`.
    #[prost(bytes = "vec", tag = "11")]
    pub row_set: Vec<u8>,
}

/// What was seen of the clocks; docs/kms-format.md says what for.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TimeRow {
    /// CLOCK_BOOTTIME that daemons of this keystore saw pass, in milliseconds.
    #[prost(uint64, tag = "1")]
    pub observed_ms: u64,
    /// /proc/sys/kernel/random/boot_id of the last of them.
    #[prost(string, tag = "2")]
    pub boot_id: String,
    /// CLOCK_BOOTTIME when this was written, in milliseconds.
    #[prost(uint64, tag = "3")]
    pub boot_ms: u64,
    /// The wall clock when this was written, in milliseconds since the Unix epoch.
    #[prost(int64, tag = "4")]
    pub wall_ms: i64,
    /// The wall clock less CLOCK_BOOTTIME, as they were believed last, in milliseconds.
    #[prost(int64, tag = "5")]
    pub offset_ms: i64,
    /// Nothing is destroyed until an administrator has confirmed the clock.
    #[prost(bool, tag = "6")]
    pub suspended: bool,
    /// How far AdvanceClock has shifted both clocks, in milliseconds; 0 but in a keystore for drills.
    #[prost(uint64, tag = "7")]
    pub shift_ms: u64,
}

/// How far the audit log is known to reach.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CheckpointRow {
    /// Frames in the log.
    #[prost(uint64, tag = "1")]
    pub records: u64,
    /// Digest of the last of them.
    #[prost(bytes = "vec", tag = "2")]
    pub head: Vec<u8>,
    /// Where it ends.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
}

/// One version of a CMK; its material is a row of its own.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct VersionRow {
    /// UUID.
    #[prost(bytes = "vec", tag = "1")]
    pub version_id: Vec<u8>,
    /// Milliseconds since the Unix epoch.
    #[prost(int64, tag = "2")]
    pub created_ms: i64,
}

/// One CMK. Tag 15 is kept for an idempotency token.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct KeyRow {
    /// Moves with every write of this row.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// UUID.
    #[prost(bytes = "vec", tag = "2")]
    pub key_id: Vec<u8>,
    /// The numbers are those of the protocol.
    #[prost(enumeration = "KeyState", tag = "3")]
    pub state: i32,
    /// Aliyun_AES_256
    #[prost(string, tag = "4")]
    pub key_spec: String,
    /// ENCRYPT/DECRYPT
    #[prost(string, tag = "5")]
    pub key_usage: String,
    /// Aliyun_KMS or EXTERNAL
    #[prost(string, tag = "6")]
    pub origin: String,
    /// SOFTWARE
    #[prost(string, tag = "7")]
    pub protection_level: String,
    /// The user's words.
    #[prost(string, tag = "8")]
    pub description: String,
    /// The uid that made it.
    #[prost(uint32, tag = "9")]
    pub creator_uid: u32,
    /// Milliseconds since the Unix epoch.
    #[prost(int64, tag = "10")]
    pub created_ms: i64,
    /// When deletion is due, by the wall clock; set in PendingDeletion, and kept in Destroyed.
    #[prost(int64, optional, tag = "11")]
    pub delete_ms: Option<i64>,
    /// UUID of the version that encrypts.
    #[prost(bytes = "vec", tag = "12")]
    pub primary_version: Vec<u8>,
    /// Every version, oldest first.
    #[prost(message, repeated, tag = "13")]
    pub versions: Vec<VersionRow>,
    /// The observed time at which deletion is due, in milliseconds; both must have passed. Set in PendingDeletion only.
    #[prost(uint64, optional, tag = "16")]
    pub delete_observed_ms: Option<u64>,
    /// What the key becomes when the slot that opens its material is gone: the ratchet has left its material behind.
    #[prost(enumeration = "KeyState", optional, tag = "17")]
    pub destroying: Option<i32>,
    /// When its material was destroyed, in milliseconds since the Unix epoch.
    #[prost(int64, optional, tag = "18")]
    pub destroyed_ms: Option<i64>,
    /// Origin EXTERNAL: whether it has its material.
    #[prost(bool, tag = "19")]
    pub imported: bool,
    /// When imported material goes away, in milliseconds since the Unix epoch.
    #[prost(int64, optional, tag = "20")]
    pub material_expires_ms: Option<i64>,
    /// Of the material that was imported first: only the same may come again. HMAC-SHA-256 of the key id, the version id and the
    /// material, under the key below.
    #[prost(bytes = "vec", tag = "21")]
    pub fingerprint: Vec<u8>,
    /// Random, 32 bytes.
    #[prost(bytes = "vec", tag = "22")]
    pub fingerprint_key: Vec<u8>,
    /// When its deletion was asked for, by the wall clock; set in PendingDeletion, and kept in Destroyed.
    #[prost(int64, optional, tag = "23")]
    pub scheduled_ms: Option<i64>,
    /// The root epoch in which its material was left behind last.
    #[prost(uint64, optional, tag = "24")]
    pub left_epoch: Option<u64>,
}

impl KeyRow {
    /// Whether it waits for material that is to be imported.
    pub(crate) fn lacks_material(&self) -> bool {
        self.origin == EXTERNAL && !self.imported
    }
}

/// One alias.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AliasRow {
    /// Moves with every write of this row.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// alias/NAME
    #[prost(string, tag = "2")]
    pub name: String,
    /// UUID.
    #[prost(bytes = "vec", tag = "3")]
    pub key_id: Vec<u8>,
}

/// One holder of data keys: a session, and the CMKs under which it was given something.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct HolderRow {
    /// The session's id.
    #[prost(bytes = "vec", tag = "1")]
    pub session_id: Vec<u8>,
    /// UUID.
    #[prost(bytes = "vec", tag = "2")]
    pub volume: Vec<u8>,
    /// The boot of the host during which it was opened: no holder outlives its kernel.
    #[prost(string, tag = "3")]
    pub boot_id: String,
    /// Of the process.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// The process.
    #[prost(int32, tag = "5")]
    pub pid: i32,
    /// When the process began, in clock ticks since the boot.
    #[prost(uint64, tag = "6")]
    pub started_ticks: u64,
    /// The anonymous device of its mount, once it has one.
    #[prost(uint32, optional, tag = "7")]
    pub device_minor: Option<u32>,
    /// How long it may take to go dark.
    #[prost(uint32, tag = "8")]
    pub drain_max_ms: u32,
    /// UUIDs of CMKs.
    #[prost(bytes = "vec", repeated, tag = "9")]
    pub keys: Vec<Vec<u8>>,
    /// The key domain of the volume, at most 65535.
    #[prost(uint32, tag = "10")]
    pub domain: u32,
}

/// What a mount last reported of one key domain of a volume, which is encrypted under a CMK. Its key names all three.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DependantRow {
    /// Where the volume lies on its host; not UTF-8 becomes U+FFFD. 1 to 4096 bytes.
    #[prost(string, tag = "1")]
    pub location: String,
    /// Of the domain.
    #[prost(uint64, tag = "2")]
    pub files: u64,
    /// Of their content.
    #[prost(uint64, tag = "3")]
    pub bytes: u64,
    /// By the wall clock, in milliseconds since the Unix epoch.
    #[prost(int64, tag = "4")]
    pub reported_ms: i64,
    /// The uid that reported it.
    #[prost(uint32, tag = "5")]
    pub uid: u32,
}

/// How far a key domain of a volume is known to have come. Its key is the volume's UUID (16) and the domain (2).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AnchorRow {
    /// The number of a durable commit.
    #[prost(uint64, tag = "1")]
    pub commit_seq: u64,
    /// What the domain's root was then, as its mount makes it: 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub mac: Vec<u8>,
    /// Inode numbers below this were given out, in whatever became of the volume.
    #[prost(uint64, tag = "3")]
    pub ino_limit: u64,
    /// When it moved last, in milliseconds since the Unix epoch.
    #[prost(int64, tag = "4")]
    pub moved_ms: i64,
    /// The CMK that the domain's volume key is under: UUID.
    #[prost(bytes = "vec", tag = "5")]
    pub key_id: Vec<u8>,
}
