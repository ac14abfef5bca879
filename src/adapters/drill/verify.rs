//! What anybody can check of a document, with the key that was pinned: which kind it is, that it was signed so, byte for byte, and
//! that what it claims follows from what is in it.

use super::document::{Kind, Outcome, Overall, file_bytes, sha256};
use super::markers::{Kind as Marker, Markers, Nonce};
use super::record;
use super::report::{Phase, judge};
use super::sign::PublicKey;
use super::timeline::Darkness;
use serde_json::Value;

/// Longest document that is read.
pub const BYTES_MAX: u64 = 1 << 30;

/// What a document that is genuine says.
#[derive(Debug)]
pub struct Verified {
    /// What it is.
    pub kind: Kind,
    /// The document.
    pub content: Value,
    /// What it comes to.
    pub overall: Overall,
}

impl Verified {
    /// Whether it is what was asked for.
    ///
    /// # Errors
    /// It is another kind of document.
    pub fn must_be(&self, expected: Kind) -> Result<(), String> {
        if self.kind == expected {
            return Ok(());
        }
        Err(format!(
            "it is a {}, and no {}",
            self.kind.name(),
            expected.name()
        ))
    }
}

/// Checks a document's bytes against the pinned key, and against the nonce if the verifier chose one.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(bytes: &[u8], key: PublicKey, nonce: Option<Nonce>) -> Result<Verified, String> {
    let mut document: Value = serde_json::from_slice(bytes)
        .map_err(|error| format!("it is neither a drill report nor a record: {error}"))?;
    if file_bytes(&document) != bytes {
        return Err("its bytes are not those that were signed: it was reformatted or changed".to_owned());
    }
    let members = document.as_object().map(serde_json::Map::len);
    let content = ["report", "record"]
        .into_iter()
        .find_map(|name| document.get(name));
    let content = content
        .filter(|_| members == Some(2))
        .ok_or("it is neither a signed drill report nor a signed record")?;
    let kind = Kind::of(content).ok_or("it does not say what it is, or is of a later version")?;
    let member = kind.member();
    if document.get(member).is_none() {
        return Err(format!(
            "it says that it is a {}, and its file that it is something else",
            kind.name()
        ));
    }
    check_signature(&document, kind, content, key)?;
    let content = document.get_mut(member).map(Value::take).unwrap_or_default();
    if number(&content, "format")? != Kind::FORMAT {
        return Err(format!("it is no {} of this version", kind.name()));
    }
    let overall = overall(&content)?;
    let said = content.get("nonce").and_then(Value::as_str);
    if nonce.is_some_and(|nonce| said != Some(nonce.text().as_str())) {
        return Err("it answers another challenge than the nonce that was given".to_owned());
    }
    match kind {
        Kind::DrillReport => follows(&content)?,
        Kind::DestructionRecord | Kind::RemovalRecord => record::verify::follows(kind, &content)?,
    }
    Ok(Verified {
        kind,
        content,
        overall,
    })
}

fn check_signature(document: &Value, kind: Kind, content: &Value, key: PublicKey) -> Result<(), String> {
    let signature = document.get("signature").and_then(Value::as_object);
    let text = |name: &str| signature?.get(name)?.as_str();
    if text("algorithm") != Some("Ed25519") {
        return Err(format!("it is no signed {}", kind.name()));
    }
    if text("public_key") != Some(key.text().as_str()) {
        return Err("it was signed with another key than the one that was given".to_owned());
    }
    let value = text("value")
        .and_then(|digits| hex::decode(digits).ok())
        .unwrap_or_default();
    // One spelling alone, so that no byte can be changed unnoticed.
    let is_plain = text("value") == Some(hex::encode(&value).as_str());
    let count = signature.map(serde_json::Map::len);
    if !is_plain || count != Some(3) || !key.has_signed(&kind.signed_bytes(content), &value) {
        return Err(format!(
            "the signature is wrong: it was changed, or never signed with this key as a {}",
            kind.name()
        ));
    }
    Ok(())
}

/// What the checks come to, which is what the document must say.
fn overall(content: &Value) -> Result<Overall, String> {
    let mut outcomes = Vec::new();
    for check in list(content, "checks")? {
        let result = string(check, "result")?;
        outcomes.push(Outcome::parse(result).ok_or_else(|| format!("'{result}' is no result of a check"))?);
    }
    let overall = Overall::of(outcomes);
    if string(content, "result")? != overall.name() {
        return Err(format!(
            "its result does not follow from its checks, which come to {}",
            overall.name()
        ));
    }
    Ok(overall)
}

/// Whether everything that was written follows from the challenge.
fn check_markers(report: &Value) -> Result<(), String> {
    let said = string(report, "nonce")?;
    let large = list(report, "markers")?
        .iter()
        .find(|marker| marker.get("kind").and_then(Value::as_str) == Some(Marker::Large.name()))
        .map_or(Ok(0), |marker| number(marker, "length"))?;
    let markers = Markers::new(Nonce::parse(said)?, large);
    for marker in list(report, "markers")? {
        let kind = Marker::ALL
            .into_iter()
            .find(|kind| marker.get("kind").and_then(Value::as_str) == Some(kind.name()));
        let expected = markers.expected(kind.ok_or("a marker of an unknown kind")?);
        if string(marker, "sha256")? != expected.sha256 || string(marker, "name")? != expected.name {
            return Err(format!(
                "the {} marker does not follow from the nonce",
                expected.kind.name()
            ));
        }
    }
    Ok(())
}

/// Whether what a report claims follows from its logs, as far as that can be computed anew.
fn follows(report: &Value) -> Result<(), String> {
    for log in list(report, "logs")? {
        if sha256(log_text(log)?.as_bytes()) != string(log, "sha256")? {
            return Err(format!("the log {} does not have its hash", string(log, "name")?));
        }
    }
    for run in list(report, "recovery_runs")? {
        let value = run
            .get("value")
            .ok_or("a run of the recovery program without its answer")?;
        if sha256(value.to_string().as_bytes()) != string(run, "sha256")? {
            return Err(format!(
                "the answer {} does not have its hash",
                string(run, "name")?
            ));
        }
    }
    for phase in list(report, "phases")? {
        follows_from_log(report, phase)?;
    }
    check_markers(report)
}

fn follows_from_log(report: &Value, phase: &Value) -> Result<(), String> {
    let (name, log) = (string(phase, "name")?, string(phase, "log")?);
    let found = list(report, "logs")?
        .iter()
        .find(|candidate| candidate.get("name").and_then(Value::as_str) == Some(log));
    let text = log_text(found.ok_or_else(|| format!("there is no log {log}"))?)?;
    let darkness = Darkness {
        called_ns: number(phase, "called_ns")?,
        returned_ns: number(phase, "returned_ns")?,
        until_ns: number(phase, "until_ns")?,
    };
    let last_ns = number(phase.get("load").unwrap_or(&Value::Null), "last_success_ns")?;
    let id = Phase::check_id(name);
    let check = list(report, "checks")?
        .iter()
        .find(|check| check.get("id").and_then(Value::as_str) == Some(id));
    let claims =
        string(check.ok_or_else(|| format!("there is no check {id}"))?, "result")? == Outcome::Pass.name();
    match (claims, judge(&text, darkness, last_ns)) {
        (true, Err(why)) => Err(format!("{id} is reported to have held, but by its log: {why}")),
        _ => Ok(()),
    }
}

fn log_text(log: &Value) -> Result<String, String> {
    let mut text = String::new();
    for line in list(log, "lines")? {
        text.push_str(line.as_str().ok_or("a log has a line that is no text")?);
        text.push('\n');
    }
    Ok(text)
}

pub(super) fn string<'v>(of: &'v Value, name: &str) -> Result<&'v str, String> {
    of.get(name)
        .and_then(Value::as_str)
        .ok_or_else(|| format!("it has no '{name}'"))
}

pub(super) fn number(of: &Value, name: &str) -> Result<u64, String> {
    of.get(name)
        .and_then(Value::as_u64)
        .ok_or_else(|| format!("it has no '{name}'"))
}

pub(super) fn list<'v>(of: &'v Value, name: &str) -> Result<&'v [Value], String> {
    let found = of.get(name).and_then(Value::as_array);
    found
        .map(Vec::as_slice)
        .ok_or_else(|| format!("it has no '{name}'"))
}

#[cfg(test)]
mod tests {
    use super::super::document::{Check, sign};
    use super::super::report::Findings;
    use super::super::sign::SigningKey;
    use super::super::timeline::tests::{DARK, good};
    use super::super::timeline::{Access, Record};
    use super::super::watch::Load;
    use super::*;
    use serde_json::json;

    fn findings(records: &[Record]) -> Findings {
        let nonce = Nonce::parse(&"5a".repeat(32)).unwrap();
        let markers = Markers::new(nonce, 4096);
        let mut findings = Findings {
            markers: vec![markers.expected(Marker::Small), markers.expected(Marker::Large)],
            ..Findings::default()
        };
        findings.facts.insert("nonce".to_owned(), json!(nonce.text()));
        findings.checks.push(Check {
            id: "revocation-live",
            step: Some(2),
            claim: "nothing is readable".to_owned(),
            outcome: Outcome::Pass,
            detail: String::new(),
        });
        findings.raw.push(("run".to_owned(), json!({ "files": [] })));
        findings.phases.push(Phase {
            name: "live",
            darkness: DARK,
            before: None,
            enabled_ns: Some(9100),
            load: Load {
                successes: 1,
                last_success_ns: 1999,
                failures: 3,
            },
            lines: records.iter().map(Record::line).collect(),
        });
        findings
    }

    fn key() -> SigningKey {
        SigningKey::generate().unwrap()
    }

    #[test]
    fn a_genuine_report_is_accepted_and_none_with_one_changed_byte() {
        let key = key();
        let file = sign(Kind::DrillReport, &findings(&good()).value(), &key);
        let verified = verify(&file, key.public(), None).unwrap();
        assert_eq!(verified.overall, Overall::Pass);
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut changed = file.clone();
                changed[at] ^= 1 << bit;
                assert!(
                    verify(&changed, key.public(), None).is_err(),
                    "byte {at}, bit {bit}"
                );
            }
        }
    }

    #[test]
    fn a_byte_more_or_less_anywhere_is_refused() {
        let key = key();
        let file = sign(Kind::DrillReport, &findings(&good()).value(), &key);
        for at in 0..file.len() {
            let mut shorter = file.clone();
            shorter.remove(at);
            assert!(verify(&shorter, key.public(), None).is_err(), "without byte {at}");
            for byte in *b" \n0," {
                let mut longer = file.clone();
                longer.insert(at, byte);
                assert!(
                    verify(&longer, key.public(), None).is_err(),
                    "with a byte at {at}"
                );
            }
        }
        for more in [&b"\n"[..], b" ", b"{}"] {
            assert!(verify(&[&file, more].concat(), key.public(), None).is_err());
        }
    }

    #[test]
    fn another_key_another_nonce_and_another_form_are_refused() {
        let key_of_report = key();
        let file = sign(Kind::DrillReport, &findings(&good()).value(), &key_of_report);
        assert!(
            verify(&file, key().public(), None)
                .unwrap_err()
                .contains("another key")
        );
        let pinned = key_of_report.public();
        let asked = Nonce::parse(&"5a".repeat(32)).unwrap();
        verify(&file, pinned, Some(asked)).unwrap();
        let other = Nonce::parse(&"5b".repeat(32)).unwrap();
        assert!(
            verify(&file, pinned, Some(other))
                .unwrap_err()
                .contains("another challenge")
        );
        let compact = serde_json::from_slice::<Value>(&file).unwrap().to_string();
        assert!(
            verify(compact.as_bytes(), pinned, None)
                .unwrap_err()
                .contains("reformatted")
        );
    }

    /// Signed, but untrue: whoever made it wrote PASS where its own log says otherwise.
    #[test]
    fn a_signed_report_that_its_own_logs_contradict_is_refused() {
        let key = key();
        let refused = |findings: &Findings| {
            verify(
                &sign(Kind::DrillReport, &findings.value(), &key),
                key.public(),
                None,
            )
            .unwrap_err()
        };
        let mut late = good();
        late.push(Record {
            access: Access::MappedShared,
            begin_ns: 2001,
            end_ns: 2002,
            errno: 0,
        });
        assert!(refused(&findings(&late)).contains("mapped-shared"));
        let mut unseen = findings(&good());
        unseen.phases[0].load.last_success_ns = 2001;
        assert!(refused(&unseen).contains("without pauses"));
        let mut value = findings(&good()).value();
        value["result"] = json!("INCOMPLETE");
        assert!(
            verify(&sign(Kind::DrillReport, &value, &key), key.public(), None)
                .unwrap_err()
                .contains("does not follow")
        );
        let mut value = findings(&good()).value();
        value["logs"][0]["lines"][1] = json!("large,500,510,5");
        assert!(
            verify(&sign(Kind::DrillReport, &value, &key), key.public(), None)
                .unwrap_err()
                .contains("hash")
        );
        let mut value = findings(&good()).value();
        value["markers"][0]["sha256"] = json!("00");
        assert!(
            verify(&sign(Kind::DrillReport, &value, &key), key.public(), None)
                .unwrap_err()
                .contains("nonce")
        );
        let mut value = findings(&good()).value();
        value["document"] = json!("destruction record");
        assert!(verify(&sign(Kind::DrillReport, &value, &key), key.public(), None).is_err());
    }

    #[test]
    fn a_report_of_a_failed_drill_is_genuine_and_says_so() {
        let key = key();
        let mut findings = findings(&good());
        findings.checks[0].outcome = Outcome::Fail;
        let verified = verify(
            &sign(Kind::DrillReport, &findings.value(), &key),
            key.public(),
            None,
        )
        .unwrap();
        assert_eq!(verified.overall, Overall::Failed);
    }
}
