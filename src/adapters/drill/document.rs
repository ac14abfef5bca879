//! What the signed documents have in common: which kinds there are, checks and what they come to, the signature. Two kinds are
//! never taken for each other: the kind is a field that is signed, what the signature covers begins with it, and the file
//! names it differently.

use super::sign::SigningKey;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// About a capability, shown on data made for the purpose.
    DrillReport,
    /// About one key, which is destroyed.
    DestructionRecord,
    /// About one key whose material was imported: our copy of it is gone, and nothing is said of its owner's.
    RemovalRecord,
}

impl Kind {
    /// Version of the fields, of every kind.
    pub const FORMAT: u64 = 1;
    /// All of them.
    pub const ALL: [Self; 3] = [Self::DrillReport, Self::DestructionRecord, Self::RemovalRecord];

    /// As it stands in a document.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DrillReport => "drill report",
            Self::DestructionRecord => "destruction record",
            Self::RemovalRecord => "removal record",
        }
    }

    /// The member of a file that holds the document.
    #[must_use]
    pub const fn member(self) -> &'static str {
        match self {
            Self::DrillReport => "report",
            Self::DestructionRecord | Self::RemovalRecord => "record",
        }
    }

    /// Of a document.
    pub(super) fn of(content: &Value) -> Option<Self> {
        let name = content.get("document")?.as_str()?;
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What a signature of such a document covers: worth nothing for anything else.
    pub(super) fn signed_bytes(self, content: &Value) -> Vec<u8> {
        let label = format!("cmkfs {} {}\0", self.name(), Self::FORMAT);
        [label.as_bytes(), content.to_string().as_bytes()].concat()
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It held.
    Pass,
    /// It did not.
    Fail,
    /// Nothing is known of it.
    NotTested,
}

impl Outcome {
    /// As it stands in a report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
            Self::NotTested => "NOT TESTED",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::Pass, Self::Fail, Self::NotTested]
            .into_iter()
            .find(|outcome| outcome.name() == name)
    }
}

/// What a whole drill comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overall {
    /// Every check was made, and held.
    Pass,
    /// What was checked held; something could not be.
    Incomplete,
    /// Something did not hold.
    Failed,
}

impl Overall {
    /// What these checks come to: none at all prove nothing.
    pub fn of(outcomes: impl IntoIterator<Item = Outcome>) -> Self {
        let mut sum = None;
        for outcome in outcomes {
            sum = Some(match (sum, outcome) {
                (Some(Self::Failed), _) | (_, Outcome::Fail) => Self::Failed,
                (Some(Self::Incomplete), _) | (_, Outcome::NotTested) => Self::Incomplete,
                _ => Self::Pass,
            });
        }
        sum.unwrap_or(Self::Failed)
    }

    /// As it stands in a report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Incomplete => "INCOMPLETE",
            Self::Failed => "FAILED",
        }
    }
}

/// One check.
#[derive(Debug, Clone)]
pub struct Check {
    /// A word for programs.
    pub id: &'static str,
    /// Of the drill; a record has none.
    pub step: Option<u8>,
    /// What is claimed, for people.
    pub claim: String,
    /// How it came out.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
}

impl Check {
    pub(super) fn value(&self) -> Value {
        let mut value = json!({
            "id": self.id,
            "claim": self.claim,
            "result": self.outcome.name(),
            "detail": self.detail,
        });
        if let (Some(step), Some(fields)) = (self.step, value.as_object_mut()) {
            fields.insert("step".to_owned(), json!(step));
        }
        value
    }
}

/// Lower-case hexadecimal digits of a SHA-256 digest.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The bytes of a document's file. There is one such file for a document: what differs by a byte is another, or none.
pub(super) fn file_bytes(document: &Value) -> Vec<u8> {
    format!("{document:#}\n").into_bytes()
}

/// Signs a document, and gives the bytes of its file.
#[must_use]
pub fn sign(kind: Kind, content: &Value, key: &SigningKey) -> Vec<u8> {
    let signature = key.sign(&kind.signed_bytes(content));
    file_bytes(&json!({
        kind.member(): content,
        "signature": {
            "algorithm": "Ed25519",
            "public_key": key.public().text(),
            "value": hex::encode(signature),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_was_not_tested_bars_a_pass_and_whatever_failed_anything_better() {
        use Outcome::{Fail, NotTested, Pass};
        for (outcomes, overall) in [
            (vec![Pass, Pass], Overall::Pass),
            (vec![Pass, NotTested, Pass], Overall::Incomplete),
            (vec![NotTested, Fail, Pass], Overall::Failed),
            (vec![Fail, NotTested], Overall::Failed),
            (vec![], Overall::Failed),
        ] {
            assert_eq!(Overall::of(outcomes.clone()), overall, "{outcomes:?}");
        }
    }
}
