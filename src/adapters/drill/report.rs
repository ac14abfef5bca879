//! The drill report: what was tested, how it came out, and everything that it follows from. It is a statement about a
//! capability, on data made for the purpose; it is no destruction record, which is about a production key.

use super::document::{Check, Kind, Overall, sha256};
use super::markers::Expected;
use super::timeline::{self, Darkness};
use super::watch::Load;
use serde_json::{Map, Value, json};

/// One time that the key was taken away under the eyes of an observer.
#[derive(Debug, Clone)]
pub struct Phase {
    /// live, stopped, killed.
    pub name: &'static str,
    /// When.
    pub darkness: Darkness,
    /// When something was done to the mount before the call, and what.
    pub before: Option<(u64, &'static str)>,
    /// When the key was enabled again and its call had returned.
    pub enabled_ns: Option<u64>,
    /// What the loops without pauses did.
    pub load: Load,
    /// The observer's log.
    pub lines: Vec<String>,
}

impl Phase {
    /// The name of the check that is about it.
    #[must_use]
    pub const fn check_id(name: &str) -> &'static str {
        match name.as_bytes() {
            b"live" => "revocation-live",
            b"stopped" => "revocation-stopped",
            _ => "revocation-killed",
        }
    }

    /// Whether nothing that began after the call had returned succeeded.
    ///
    /// # Errors
    /// What did.
    pub fn held(&self) -> Result<timeline::Verdict, String> {
        judge(
            &timeline::text(&self.lines),
            self.darkness,
            self.load.last_success_ns,
        )
    }

    fn value(&self) -> Value {
        json!({
            "name": self.name,
            "log": log_name(self.name),
            "called_ns": self.darkness.called_ns,
            "returned_ns": self.darkness.returned_ns,
            "until_ns": self.darkness.until_ns,
            "before": self.before.map(|(at_ns, what)| json!({ "at_ns": at_ns, "what": what })),
            "enabled_ns": self.enabled_ns,
            "load": {
                "successes": self.load.successes,
                "last_success_ns": self.load.last_success_ns,
                "failures": self.load.failures,
            },
        })
    }
}

fn log_name(phase: &str) -> String {
    format!("observer-{phase}")
}

/// Judges a log and what its observer says of the loops without pauses.
///
/// # Errors
/// What did not hold.
pub fn judge(text: &str, darkness: Darkness, last_success_ns: u64) -> Result<timeline::Verdict, String> {
    let verdict = timeline::Verdict::of(&timeline::parse(text)?, darkness);
    verdict.held()?;
    if last_success_ns > darkness.returned_ns {
        return Err(
            "a loop without pauses succeeded with an access that began after the call had returned"
                .to_owned(),
        );
    }
    Ok(verdict)
}

/// Everything that a report is made of.
#[derive(Debug, Default)]
pub struct Findings {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
    /// Those that were reached.
    pub phases: Vec<Phase>,
    /// What was written.
    pub markers: Vec<Expected>,
    /// Facts: tool, media, key, host, times, people.
    pub facts: Map<String, Value>,
    /// Raw answers of the recovery program, by name.
    pub raw: Vec<(String, Value)>,
    /// What is out of reach.
    pub limits: Vec<String>,
}

impl Findings {
    /// What it all comes to.
    #[must_use]
    pub fn overall(&self) -> Overall {
        Overall::of(self.checks.iter().map(|check| check.outcome))
    }

    /// The unsigned report.
    #[must_use]
    pub fn value(&self) -> Value {
        let mut checks: Vec<&Check> = self.checks.iter().collect();
        // They were made in another order: three times a key is taken away and given back.
        checks.sort_by_key(|check| check.step);
        let checks = checks.into_iter().map(Check::value);
        let markers = self.markers.iter().map(|marker| {
            json!({
                "kind": marker.kind.name(),
                "name": marker.name,
                "length": marker.length,
                "sha256": marker.sha256,
            })
        });
        let logs = self.phases.iter().map(|phase| {
            let text = timeline::text(&phase.lines);
            let lines: Vec<&str> = text.lines().collect();
            json!({ "name": log_name(phase.name), "sha256": sha256(text.as_bytes()), "lines": lines })
        });
        let raw = self.raw.iter().map(|(name, value)| {
            json!({ "name": name, "sha256": sha256(value.to_string().as_bytes()), "value": value })
        });
        let mut report = self.facts.clone();
        let mut put = |name: &str, value: Value| report.insert(name.to_owned(), value);
        put("document", json!(Kind::DrillReport.name()));
        put("format", json!(Kind::FORMAT));
        put(
            "not_a_destruction_record",
            json!(
                "This report is about a capability, shown on data made for the purpose. It says nothing of any production key, \
                   and is no record that one was destroyed."
            ),
        );
        put("checks", checks.collect());
        put("phases", self.phases.iter().map(Phase::value).collect());
        put("markers", markers.collect());
        put("logs", logs.collect());
        put("recovery_runs", raw.collect());
        put("limits", json!(self.limits));
        put("result", json!(self.overall().name()));
        Value::Object(report)
    }
}
