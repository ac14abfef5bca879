//! The command line, as users of `aws kms` and `aliyun kms` know it.

use clap::{Args, Parser, Subcommand};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Control keys, encrypt and decrypt. Answers are JSON on standard output; errors are 'Code: message' on standard
/// error, with exit status 1. A KEY is a key id, an ARN, or alias/NAME.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
pub(crate) struct Arguments {
    /// kmsd's socket [default: $KMS_SOCKET, else $XDG_RUNTIME_DIR/kmsd/kmsd.sock, else /run/kmsd/kmsd.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// How long to wait for an answer; a revocation may wait as long as mounts may take to go dark, and to be ended
    #[arg(long, global = true, value_name = "N", default_value_t = 90)]
    pub(crate) timeout_seconds: u32,
    #[command(subcommand)]
    pub(crate) operation: Operation,
}

#[derive(Subcommand)]
pub(crate) enum Operation {
    #[command(flatten)]
    Key(KeyOperation),
    #[command(flatten)]
    Alias(AliasOperation),
    #[command(flatten)]
    Cryptography(CryptographyOperation),
    #[command(flatten)]
    Batch(BatchOperation),
    #[command(flatten)]
    Keystore(KeystoreOperation),
    /// Work on the audit log, offline
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
}

#[derive(Subcommand)]
pub(crate) enum KeyOperation {
    /// Make a symmetric key, enabled
    CreateKey {
        /// What the key is for, in your words
        #[arg(long, default_value = "")]
        description: String,
        /// Only Aliyun_AES_256
        #[arg(long, default_value = "Aliyun_AES_256")]
        key_spec: String,
        /// Only ENCRYPT/DECRYPT
        #[arg(long, default_value = "ENCRYPT/DECRYPT")]
        key_usage: String,
        /// Aliyun_KMS, or EXTERNAL for a key whose material you import
        #[arg(long, default_value = "Aliyun_KMS")]
        origin: String,
        /// Only SOFTWARE
        #[arg(long, default_value = "SOFTWARE")]
        protection_level: String,
    },
    /// Describe a key, in any state, and what is known to depend on it
    DescribeKey(Key),
    /// List all keys, a page at a time
    ListKeys(Page),
    /// Enable a disabled key
    EnableKey(Key),
    /// Disable a key; nothing can be encrypted or decrypted under it when this returns
    DisableKey(Key),
    /// Let a key's material be destroyed when the window has passed, by the clock and in time that kmsd has observed
    ///
    /// What is known to depend on the key is shown on standard error first. At a terminal it is asked whether to go on; without
    /// one, a key that something depends on needs --yes.
    ScheduleKeyDeletion {
        #[command(flatten)]
        key: Key,
        /// 7 to 30
        #[arg(long, value_name = "N")]
        pending_window_in_days: u32,
        /// Do not ask, whatever depends on the key
        #[arg(long)]
        yes: bool,
    },
    /// Get a wrapping key for the material of a key whose origin is EXTERNAL; it opens once, within 24 hours
    GetParametersForImport {
        #[command(flatten)]
        key: Key,
        /// Only RSAES_OAEP_SHA_256
        #[arg(long, default_value = "RSAES_OAEP_SHA_256")]
        wrapping_algorithm: String,
        /// Only RSA_2048
        #[arg(long, default_value = "RSA_2048")]
        wrapping_key_spec: String,
    },
    /// Import 32 bytes of material, wrapped; a key that had material takes only the same again
    ImportKeyMaterial {
        #[command(flatten)]
        key: Key,
        /// Base64, or fileb://PATH
        #[arg(long, value_parser = bytes)]
        encrypted_key_material: Bytes,
        /// Base64, or fileb://PATH
        #[arg(long, value_parser = bytes)]
        import_token: Bytes,
        /// When the material is to go away, in seconds since the Unix epoch; 0: never
        #[arg(long, value_name = "N", default_value_t = 0)]
        key_material_expire_unix: u64,
    },
    /// Destroy imported material at once; our copy is removed, yours is not
    DeleteKeyMaterial(Key),
    /// Keep a key that was scheduled for deletion; it is enabled then
    CancelKeyDeletion(Key),
}

#[derive(Subcommand)]
pub(crate) enum KeystoreOperation {
    /// Counters since kmsd started
    GetMetrics,
    /// Tell what the keystore is: its epoch, its root slot and what destroying it is worth, whether it is for drills
    GetKeystoreInfo,
    /// Take the host's clock for right after it was set by more than an hour, which suspends the destruction of keys
    ConfirmClock,
    /// Shift the clocks of a keystore made with 'kmsd init --drill', then destroy what is due
    AdvanceClock {
        /// 1 to 316224000
        #[arg(long, value_name = "N")]
        seconds: u64,
    },
}

#[derive(Subcommand)]
pub(crate) enum AliasOperation {
    /// Name a key
    CreateAlias(AliasAndKey),
    /// Let an alias name another key
    UpdateAlias(AliasAndKey),
    /// Remove an alias; the key stays
    DeleteAlias {
        /// alias/NAME
        #[arg(long)]
        alias_name: String,
    },
    /// List all aliases, a page at a time
    ListAliases(Page),
    /// List the aliases of a key
    ListAliasesByKeyId {
        #[command(flatten)]
        key: Key,
        #[command(flatten)]
        page: Page,
    },
}

#[derive(Subcommand)]
pub(crate) enum CryptographyOperation {
    /// Encrypt up to 6 KiB
    Encrypt {
        #[command(flatten)]
        key: Key,
        /// Base64, or fileb://PATH
        #[arg(long, value_parser = bytes)]
        plaintext: Bytes,
        #[command(flatten)]
        context: Context,
    },
    /// Decrypt a ciphertext blob, which names its key
    Decrypt {
        /// Base64, or fileb://PATH
        #[arg(long, value_parser = bytes)]
        ciphertext_blob: Bytes,
        #[command(flatten)]
        context: Context,
    },
    /// Make a data key: in the clear and wrapped
    GenerateDataKey(DataKey),
    /// Make a data key: wrapped only
    GenerateDataKeyWithoutPlaintext(DataKey),
}

#[derive(Subcommand)]
pub(crate) enum BatchOperation {
    /// Encrypt, many at once: [{"KeyId": KEY, "Plaintext": BASE64, "EncryptionContext": {...}}, ...]
    #[command(name = "batch-encrypt")]
    Encrypt(Items),
    /// Decrypt, many at once: [{"CiphertextBlob": BASE64, "EncryptionContext": {...}}, ...]
    #[command(name = "batch-decrypt")]
    Decrypt(Items),
    /// Make data keys, many at once: [{"KeyId": KEY, "KeySpec": ..., "NumberOfBytes": N, "EncryptionContext": {...}}, ...]
    #[command(name = "batch-generate-data-key")]
    GenerateDataKey(Items),
    /// Make data keys, wrapped only, many at once; items as those of batch-generate-data-key
    #[command(name = "batch-generate-data-key-without-plaintext")]
    GenerateDataKeyWithoutPlaintext(Items),
}

#[derive(Subcommand)]
pub(crate) enum AuditCommand {
    /// Check every record of an audit log; name the first bad one
    Verify {
        /// The keystore's directory
        #[arg(
            long,
            value_name = "DIR",
            required_unless_present = "file",
            conflicts_with = "file"
        )]
        home: Option<PathBuf>,
        /// The log itself, or a copy of it
        #[arg(long, value_name = "PATH")]
        file: Option<PathBuf>,
        /// A head that was kept elsewhere: the log must contain it, so that no tail was cut before it
        #[arg(long, value_name = "HEX")]
        head: Option<String>,
    },
}

#[derive(Args)]
pub(crate) struct Key {
    /// The key's id, its ARN, or alias/NAME
    #[arg(long, value_name = "KEY")]
    pub(crate) key_id: String,
}

#[derive(Args)]
pub(crate) struct AliasAndKey {
    /// alias/NAME
    #[arg(long)]
    pub(crate) alias_name: String,
    /// The key's id or ARN
    #[arg(long, value_name = "KEY")]
    pub(crate) key_id: String,
}

#[derive(Args)]
pub(crate) struct Page {
    /// From 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) page_number: u32,
    /// 1 to 100
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) page_size: u32,
}

#[derive(Args)]
pub(crate) struct Context {
    /// A JSON object of strings; decryption needs the very same
    #[arg(long, value_name = "JSON", value_parser = context, default_value = "{}")]
    pub(crate) encryption_context: Entries,
}

#[derive(Args)]
pub(crate) struct DataKey {
    #[command(flatten)]
    pub(crate) key: Key,
    /// AES_256 (the default) or AES_128
    #[arg(long, conflicts_with = "number_of_bytes")]
    pub(crate) key_spec: Option<String>,
    /// 1 to 1024
    #[arg(long, value_name = "N")]
    pub(crate) number_of_bytes: Option<u32>,
    #[command(flatten)]
    pub(crate) context: Context,
}

#[derive(Args)]
pub(crate) struct Items {
    /// A JSON array of 1 to 256 items, or file://PATH
    #[arg(long, value_name = "JSON", value_parser = items)]
    pub(crate) items: serde_json::Value,
}

/// What --plaintext and --ciphertext-blob mean.
#[derive(Clone)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

/// What --encryption-context means.
#[derive(Clone)]
pub(crate) struct Entries(pub(crate) BTreeMap<String, String>);

fn bytes(text: &str) -> Result<Bytes, String> {
    match text.strip_prefix("fileb://") {
        Some(path) => std::fs::read(path)
            .map(Bytes)
            .map_err(|error| format!("{path}: {error}")),
        None => crate::json::base64_decode(text)
            .map(Bytes)
            .ok_or_else(|| "must be base64, or fileb://PATH".to_owned()),
    }
}

fn context(text: &str) -> Result<Entries, String> {
    serde_json::from_str(text)
        .map(Entries)
        .map_err(|_| "must be a JSON object of strings".to_owned())
}

fn items(text: &str) -> Result<serde_json::Value, String> {
    let read;
    let text = match text.strip_prefix("file://") {
        Some(path) => {
            read = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
            &read
        }
        None => text,
    };
    serde_json::from_str(text).map_err(|error| format!("must be a JSON array: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
