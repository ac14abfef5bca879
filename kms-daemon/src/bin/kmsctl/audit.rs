//! `kmsctl audit verify`: offline, and without a key.

use crate::json::time;
use kms_daemon::audit::{Digest, verify as check};
use serde_json::{Value, json};
use std::path::Path;

pub(crate) fn verify(home: Option<&Path>, file: Option<&Path>, head: Option<&str>) -> Result<Value, String> {
    let path = match (file, home) {
        (Some(file), _) => file.to_owned(),
        (None, Some(home)) => kms_daemon::audit_log(home),
        (None, None) => return Err("InvalidParameter: name --home or --file".to_owned()),
    };
    let head = head.map(parse_head).transpose()?;
    let report =
        check(&path, head).map_err(|error| format!("AuditLogInvalid: {}: {error}", path.display()))?;
    let reach = if report.witnessed > 0 {
        format!(
            "no record up to {} is missing; a tail cut after it cannot be seen here",
            report.witnessed
        )
    } else {
        "a tail cut at any record cannot be seen here: compare with a head kept elsewhere (--head)".to_owned()
    };
    Ok(json!({
        "KeystoreId": report.keystore_id.to_string(),
        "Records": report.records,
        "Head": hex::encode(report.head),
        "FirstTime": report.first_ms.map(time),
        "LastTime": report.last_ms.map(time),
        "WitnessedRecords": report.witnessed,
        "CutTail": reach,
    }))
}

fn parse_head(text: &str) -> Result<Digest, String> {
    let mut head = Digest::default();
    hex::decode_to_slice(text, &mut head)
        .map_err(|_| "InvalidParameter: --head must be 64 hexadecimal digits".to_owned())?;
    Ok(head)
}
