//! The reversible part, on a volume that is in use: in a directory of the drill's own, which is removed, and with the key
//! given back whatever happens.

use super::LiveVolume;
use super::course::Course;
use super::facts;
use super::kms::Kms;
use kms_client::Client;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for one call: a revocation may have to end a mount.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long removing the drill's directory may take.
const REMOVAL_MAX: Duration = Duration::from_secs(20);

/// Gives the key back when it is dropped.
struct Guard<'c> {
    kms: Kms<'c>,
    key: &'c str,
    is_armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.is_armed
            && let Err(error) = self.kms.enable(self.key)
        {
            eprintln!(
                "cmkfs: THE KEY IS STILL DISABLED ({error}): run 'kmsctl enable-key --key-id {}'",
                self.key
            );
        }
    }
}

/// Removes the drill's directory when it is dropped.
struct Canary(PathBuf);

impl Drop for Canary {
    fn drop(&mut self) {
        // The key may have been given back a moment ago. Interrupted or not, it is removed.
        let start = Instant::now();
        while let Err(error) = std::fs::remove_dir_all(&self.0) {
            if error.kind() == std::io::ErrorKind::NotFound {
                return;
            }
            if start.elapsed() > REMOVAL_MAX {
                eprintln!("cmkfs: {} is left behind ({error}): remove it", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Course<'_> {
    pub(super) fn on_volume(&mut self, live: &LiveVolume) -> Result<(), String> {
        let client = Client::connect(&live.socket, CALL_TIMEOUT).map_err(|error| format!("kmsd: {error}"))?;
        let kms = Kms::over(&client);
        let key = kms.describe(&live.key)?;
        if key.key_state() != kms_client::proto::KeyState::Enabled {
            return Err(format!(
                "the key {} is not enabled: a drill begins with one that is",
                key.key_id
            ));
        }
        facts::of_key(&mut self.findings.facts, &key, &kms.keystore()?);
        self.step(1, "markers written and read, in a directory of the drill's own");
        let cmkfs = std::env::current_exe().map_err(|error| format!("this program's own file: {error}"))?;
        let canary = Canary(
            live.mountpoint
                .join(format!(".cmkfs-drill-{}", std::process::id())),
        );
        let mut watch = self.begin_watch(&cmkfs, &canary.0, "plant")?;
        self.readable(
            &mut watch,
            ("markers-written", 1, "what was written is read back"),
        )?;
        let needles = self.content_needles(64);
        watch.tell("stir")?;
        let claim = "before: the search of the mount's memory finds content and names";
        match needles.search(live.pid) {
            Ok(found) if found.has("content:") && found.has("name:") => {
                self.check(
                    "memory-mount-before",
                    3,
                    claim,
                    Ok(format!("found in {} bytes", found.searched)),
                );
            }
            Ok(found) => self.check(
                "memory-mount-before",
                3,
                claim,
                Err(format!("found alone: {}", found.names())),
            ),
            Err(error) => self.not_tested(
                "memory-mount-before",
                3,
                claim,
                &format!("not permitted: {error}"),
            ),
        }
        self.step(2, "the key is taken away under load");
        let mut guard = Guard {
            kms: Kms::over(&client),
            key: &key.key_id,
            is_armed: true,
        };
        let dark = self.darken("live", &mut watch, &kms, &key.key_id, None)?;
        self.step(3, "what is left is searched");
        self.search_until_gone(
            &needles,
            "memory-mount-after",
            live.pid,
            "after: no content or name in the mount's memory",
        )?;
        self.search_volume(&live.volume, None)?;
        self.storage_of_memory(&[live.pid], "the mount's process");
        self.bypasses(&live.mountpoint);
        self.step(4, "the key is given back");
        self.lighten(dark, watch, &kms, &key.key_id)?;
        guard.is_armed = false;
        drop(guard);
        drop(canary);
        self.irreversible(&live.volume);
        self.hardware();
        Ok(())
    }

    fn irreversible(&mut self, volume: &Path) {
        let why = format!(
            "{} is in use: neither its mount nor its key is destroyed for a drill; run one with --scratch",
            volume.display()
        );
        for (id, step, claim) in [
            (
                "memory-keys",
                3,
                "no key material in the memory of either daemon after the call",
            ),
            (
                "revocation-stopped",
                2,
                "the same while the mount's process is stopped",
            ),
            (
                "revocation-killed",
                2,
                "the same after the mount's process was killed",
            ),
            ("destroyed", 5, "the key is destroyed once its window has passed"),
            (
                "recovery-without-old-slot",
                5,
                "without the old slot's content nothing is recovered",
            ),
        ] {
            self.not_tested(id, step, claim, &why);
        }
    }
}
