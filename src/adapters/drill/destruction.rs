//! Step 5: the key is destroyed, and a program that shares no code with the daemons tries to undo that.

use super::copies::Collector;
use super::course::Course;
use super::document::sha256;
use super::facts;
use super::scratch::Scratch;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// When copies were made.
const MOMENTS: [&str; 4] = ["before", "disabled", "pending", "destroyed"];

impl Course<'_> {
    pub(super) fn destroy(
        &mut self,
        scratch: &mut Scratch,
        key: &str,
        collector: Collector,
    ) -> Result<(), String> {
        self.step(5, "the key is destroyed, and what can be recovered is tried");
        let survivor = scratch.kms()?.create_key("a key that outlives the drill's")?;
        let days = scratch.kms()?.schedule_deletion(key)?;
        let marker = scratch
            .mountpoint()
            .join("drill")
            .join(self.markers.name(super::markers::Kind::Small));
        let seen = match std::fs::read(&marker) {
            Err(error) if error.raw_os_error() == Some(libc::EKEYREVOKED) => Ok(error.to_string()),
            other => Err(format!("{:?}", other.map(|bytes| bytes.len()))),
        };
        self.check("pending-refused", 5, "a key pending deletion opens nothing", seen);
        self.take_copy(scratch, "pending")?;
        scratch.unmount()?;
        self.doing(&format!("the test clock is advanced by {} days", days + 1));
        let destroyed = scratch.kms()?.advance_days(days + 1)?;
        let described = scratch.kms()?.describe(key)?;
        let seen = match described.destruction_date_ms {
            Some(_) if destroyed.iter().any(|id| id == key) => {
                Ok(format!("by a TEST CLOCK that was advanced by {} days", days + 1))
            }
            _ => Err(format!("its state is {:?}", described.key_state())),
        };
        self.check(
            "destroyed",
            5,
            "the key is destroyed once its window has passed",
            seen,
        );
        self.mount_is_refused(scratch);
        self.take_copy(scratch, "destroyed")?;
        let kept = collector
            .finish()
            .map_err(|error| format!("the collector: {error}"))?;

        let keystore = scratch.kms()?.keystore()?;
        let current = scratch.keystore().join(format!("slot-{}", keystore.epoch));
        let old = scratch.path("withheld").join("slot-1");
        let all = [MOMENTS.as_slice(), &["collected"]].concat();
        let negative = self.run_recovery(scratch, &all, std::slice::from_ref(&current), false)?;
        let positive = self.run_recovery(scratch, &all, &[current, old], false)?;
        self.judge_without(&negative, key, &survivor.key_id, keystore.epoch, kept);
        self.judge_with(&positive, key);
        self.judge_erasure(&keystore.erasure, &keystore.root_slot);
        self.findings
            .raw
            .push(("old slot content withheld".to_owned(), negative));
        self.findings
            .raw
            .push(("old slot content handed over".to_owned(), positive));
        Ok(())
    }

    fn mount_is_refused(&mut self, scratch: &mut Scratch) {
        let seen = match scratch.mount() {
            Ok(()) => Err("it mounts".to_owned()),
            Err(said) if said.contains("destroyed") => Ok(said),
            Err(said) => Err(format!("it is refused otherwise: {said}")),
        };
        self.check("mount-refused", 5, "the volume does not mount any more", seen);
    }

    /// Runs the recovery program over these copies.
    pub(super) fn run_recovery(
        &mut self,
        scratch: &Scratch,
        moments: &[&str],
        slots: &[PathBuf],
        with_windows: bool,
    ) -> Result<Value, String> {
        self.doing("the recovery program runs");
        let mut command = Command::new(&scratch.programs().recover);
        for moment in moments {
            let copy = scratch.path("copies").join(moment);
            if *moment == "collected" {
                command.arg("--keystore").arg(copy);
            } else {
                command.arg("--keystore").arg(copy.join("keystore"));
                command.arg("--volume").arg(copy.join("volume"));
            }
        }
        for slot in slots {
            command.arg("--slot").arg(slot);
        }
        if with_windows {
            command.arg("--windows");
        }
        let output = command
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cmkfs-recover: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("cmkfs-recover: {error}"))
    }

    /// Without the old slot: nothing of the destroyed key, and what survives to show that the program does work.
    fn judge_without(&mut self, answer: &Value, key: &str, survivor: &str, epoch: u64, kept: u64) {
        let id = |key: &str| json!(key.replace('-', ""));
        let (dead, alive) = (id(key), id(survivor));
        let materials = items(answer, "materials");
        let has = |id: &Value| {
            materials
                .iter()
                .any(|material| material.get("key_id") == Some(id))
        };
        let volumes = items(answer, "volumes");
        let opened: Vec<_> = volumes
            .iter()
            .filter(|volume| {
                volume.get("volume_key_opened") != Some(&json!(false)) || !items(volume, "files").is_empty()
            })
            .collect();
        let roots = answer.get("roots_opened").cloned().unwrap_or_default();
        let whole = volumes
            .iter()
            .filter(|volume| volume.get("is_whole") == Some(&json!(true)))
            .count();
        let tried = answer.get("attempts").cloned().unwrap_or_default();
        let named = answer
            .get("material_rows_named")
            .and_then(Value::as_u64)
            .unwrap_or_default();
        let seen = if has(&dead) || !opened.is_empty() || roots != json!([epoch]) {
            Err(format!(
                "recovered: materials {materials:?}, volumes {opened:?}, roots {roots}"
            ))
        } else if whole < MOMENTS.len() || named < 2 {
            Err(format!(
                "it was not put to the test: {whole} of {} volumes could be read",
                MOMENTS.len()
            ))
        } else {
            Ok(format!(
                "OLD SLOT CONTENT WITHHELD. It had {} files of {} bytes, {kept} of them kept from between the copies, the root \
                 key of epoch {epoch}, and recovered no key, no name, no file; attempts: {tried}",
                answer.get("files_read").unwrap_or(&Value::Null),
                answer.get("bytes_read").unwrap_or(&Value::Null),
            ))
        };
        self.check(
            "recovery-without-old-slot",
            5,
            "from every copy and the current root, without the old slot's content, nothing is recovered",
            seen,
        );
        let seen = match has(&alive) {
            true => Ok("its material was recovered with the current root".to_owned()),
            false => Err("its material was not recovered: the program may not work at all".to_owned()),
        };
        self.check(
            "recovery-control-survivor",
            5,
            "control: a key that was not destroyed is recovered by the same run",
            seen,
        );
    }

    /// With the old slot: everything.
    fn judge_with(&mut self, answer: &Value, key: &str) {
        let dead = json!(key.replace('-', ""));
        let materials = items(answer, "materials");
        let volumes = items(answer, "volumes");
        let mut recovered = 0;
        let mut missing = Vec::new();
        for volume in volumes {
            let copy = volume.get("copy").and_then(Value::as_str).unwrap_or_default();
            for marker in &self.findings.markers {
                let is_it = |file: &&Value| {
                    let path = file.get("path").and_then(Value::as_str).unwrap_or_default();
                    path == format!("drill/{}", marker.name)
                };
                let found = items(volume, "files").iter().find(is_it);
                match found.and_then(|file| file.get("sha256")).and_then(Value::as_str) {
                    Some(sum) if sum == marker.sha256 => recovered += 1,
                    _ => missing.push(format!("{} of {copy}", marker.kind.name())),
                }
            }
        }
        let seen = if !materials
            .iter()
            .any(|material| material.get("key_id") == Some(&dead))
        {
            Err(
                "the destroyed key's material was not recovered: the test of its absence proves nothing"
                    .to_owned(),
            )
        } else if missing.is_empty() && recovered > 0 {
            Ok(format!(
                "the key's material, and {recovered} files of {} copies, with equal checksums",
                volumes.len()
            ))
        } else {
            Err(format!("not recovered: {}", missing.join(", ")))
        };
        self.check(
            "recovery-control-old-slot",
            5,
            "control: with the old slot's content the same program recovers everything",
            seen,
        );
    }

    /// What destroying this slot is worth. It is never said to be more.
    fn judge_erasure(&mut self, erasure: &str, slot: &str) {
        let facts = &mut self.findings.facts;
        facts.insert("erasure".to_owned(), json!(erasure));
        facts.insert("root_slot".to_owned(), json!(slot));
        let claim = "the medium of the old slot cannot give its content again";
        self.not_tested("erasure", 5, claim, &facts::erasure_worth(erasure, slot));
    }
}

fn items<'v>(of: &'v Value, name: &str) -> &'v [Value] {
    of.get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// SHA-256 of a program's file.
pub(super) fn program_digest(path: &std::path::Path) -> Value {
    std::fs::read(path).map_or(Value::Null, |bytes| json!(sha256(&bytes)))
}
